//! Health: what is wrong is seen where an operator looks first.

use anyhow::Result;
use outbox_tests::cluster::Cluster;
use outbox_tests::session::Session;
use outbox_tests::wait::LONG;

/// Whether a check is well, by its name.
async fn well(session: &Session, check: &str) -> Result<bool> {
    session.one(&format!("SELECT ok FROM outbox.health() WHERE check_name = '{check}'")).await
}

#[tokio::test]
async fn health_tells_what_is_missing_and_what_was_given_up() -> Result<()> {
    let cluster = Cluster::shared().await?;
    let session = cluster.connect(&cluster.database().await?).await?;
    assert!(well(&session, "worker").await? && well(&session, "trigger").await?);
    assert!(!well(&session, "consumers").await?);
    session.batch_execute("SELECT outbox.attach('me')").await?;
    assert!(well(&session, "consumers").await?);

    session.until("SELECT ok FROM outbox.health() WHERE check_name = 'dead_letters'", LONG).await?;
    session
        .batch_execute(
            "SELECT outbox.publish('a', '{}'); SELECT outbox.reject(claim_token, id, 'no') FROM outbox.claim()",
        )
        .await?;
    assert!(!well(&session, "dead_letters").await?);
    session.batch_execute("SELECT outbox.purge_failed()").await?;
    assert!(well(&session, "dead_letters").await?);

    for trigger in ["after_outbox_insert", "after_outbox_change"] {
        session.batch_execute(&format!("ALTER TABLE outbox_events DISABLE TRIGGER {trigger}")).await?;
        assert!(!well(&session, "trigger").await?, "{trigger}");
        session.batch_execute(&format!("ALTER TABLE outbox_events ENABLE TRIGGER {trigger}")).await?;
        assert!(well(&session, "trigger").await?, "{trigger}");
    }
    Ok(())
}

//! The application locks, deletes and edits rows of its table as it likes: nobody's events wait for that but those.

use anyhow::Result;
use outbox_tests::cluster::{Cluster, Stop};
use outbox_tests::relay::Relay;
use outbox_tests::session::Session;
use outbox_tests::wait::LONG;
use outbox_tests::world::World;

use crate::claims::{NONE, claim, insert};

/// A statement that must not wait: with what it waits for, it fails.
async fn at_once(session: &Session) -> Result<()> {
    Ok(session.batch_execute("SET statement_timeout = '10s'").await?)
}

#[tokio::test]
async fn a_locked_event_holds_up_none_but_its_aggregate() -> Result<()> {
    let World { cluster, database, mut session } = World::new().await?;
    at_once(&session).await?;
    session.batch_execute("LISTEN outbox_events").await?;
    let application = cluster.connect(&database).await?;
    let ids = insert(&session, &["a", "b", "a", ""]).await?;
    application.batch_execute(&format!("BEGIN; SELECT FROM outbox_events WHERE id = {} FOR UPDATE", ids[0])).await?;
    let (claimed, token) = claim(&session, "10").await?;
    assert_eq!(claimed, [ids[1], ids[3]]);
    session.execute(&format!("SELECT outbox.ack({token})"), &[]).await?;
    application.batch_execute("COMMIT").await?;
    // No statement says that the row is free: a timer looks.
    let (claimed, _) = loop {
        session.notification(LONG).await?;
        let claimed = claim(&session, "10").await?;
        if claimed.0 != NONE {
            break claimed;
        }
    };
    assert_eq!(claimed, [ids[0], ids[2]]);
    Ok(())
}

#[tokio::test]
async fn many_locked_events_hide_nothing_behind_them() -> Result<()> {
    let World { cluster, database, session } = World::new().await?;
    at_once(&session).await?;
    let application = cluster.connect(&database).await?;
    insert(&session, &vec!["a"; 3000]).await?;
    let last = insert(&session, &["b"]).await?;
    application
        .batch_execute("BEGIN; SELECT FROM outbox_events WHERE aggregate_id = 'a' ORDER BY id LIMIT 1 FOR UPDATE")
        .await?;
    assert_eq!(claim(&session, "10").await?.0, last);
    Ok(())
}

#[tokio::test]
async fn a_retry_of_a_locked_event_holds_up_no_other() -> Result<()> {
    let World { cluster, database, session } = World::new().await?;
    at_once(&session).await?;
    session.batch_execute("SELECT outbox.add_rabbitmq('q')").await?;
    let application = cluster.connect(&database).await?;
    let ids = insert(&session, &["a", "b"]).await?;
    let (_, token) = claim(&session, "10").await?;
    for id in &ids {
        session.execute(&format!("SELECT outbox.fail({token}, {id}, 'no luck', '0')"), &[]).await?;
    }
    application.batch_execute(&format!("BEGIN; SELECT FROM outbox_events WHERE id = {} FOR UPDATE", ids[0])).await?;
    assert_eq!(claim(&session, "10").await?.0, [ids[1]]);
    application.batch_execute("COMMIT").await?;
    session.until(&format!("SELECT EXISTS (SELECT FROM outbox.claim(10) WHERE id = {})", ids[0]), LONG).await
}

/// Whatever is reported of an event whose row is locked takes effect when it is free, and others don't wait for it.
#[tokio::test]
async fn an_outcome_of_a_locked_event_is_kept_until_it_is_free() -> Result<()> {
    for (call, status) in [
        ("ack({t}, ARRAY[{i}::bigint]) = 1", "processed"),
        ("fail({t}, {i}, 'no luck', '1 hour')", "pending"),
        ("reject({t}, {i}, 'no good')", "failed"),
        ("release({t}) = 0", "pending"),
    ] {
        let World { cluster, database, session } = World::new().await?;
        at_once(&session).await?;
        session.batch_execute("SELECT outbox.add_rabbitmq('q')").await?;
        let application = cluster.connect(&database).await?;
        let ids = insert(&session, &["a"]).await?;
        let (_, token) = claim(&session, "10").await?;
        application.batch_execute("BEGIN; SELECT FROM outbox_events FOR UPDATE").await?;
        let call = call.replace("{t}", &token.to_string()).replace("{i}", &ids[0].to_string());
        assert!(session.one::<bool>(&format!("SELECT outbox.{call}")).await?, "{call}");
        assert_eq!(session.one::<String>("SELECT status FROM outbox_events").await?, "processing", "{call}");
        let others = insert(&session, &["b"]).await?;
        assert_eq!(claim(&session, "10").await?.0, others, "{call}");
        application.batch_execute("COMMIT").await?;
        session.until(&format!("SELECT status = '{status}' FROM outbox_events WHERE id = {}", ids[0]), LONG).await?;
    }
    Ok(())
}

/// Two acknowledged events, one of them listed, whose rows are locked by the transaction that is returned.
async fn acknowledged_while_locked(cluster: &Cluster, database: &str) -> Result<(Session, Session)> {
    let (application, consumer) = (cluster.connect(database).await?, cluster.connect(database).await?);
    consumer.batch_execute("SELECT outbox.add_rabbitmq('q'), outbox.attach('me')").await?;
    let ids = insert(&consumer, &["a", "b"]).await?;
    let (_, token) = claim(&consumer, "1").await?;
    consumer.execute(&format!("SELECT outbox.fail({token}, {}, 'no luck', '0')", ids[0]), &[]).await?;
    let (claimed, token) = claim(&consumer, "10, NULL, '1 hour'").await?;
    assert_eq!(claimed, ids);
    application.batch_execute("BEGIN; SELECT FROM outbox_events FOR UPDATE").await?;
    assert_eq!(consumer.one::<i64>(&format!("SELECT outbox.ack({token})")).await?, 2);
    Ok((application, consumer))
}

const ALL_PROCESSED: &str = "SELECT bool_and(status = 'processed') AND count(*) = 2 FROM outbox_events";
const NOTHING_KEPT: &str =
    "SELECT NOT EXISTS (SELECT FROM outbox.claims) AND NOT EXISTS (SELECT FROM outbox.postponed)";

#[tokio::test]
async fn what_was_acknowledged_while_it_was_locked_is_not_given_back_with_its_session() -> Result<()> {
    let World { cluster, database, session } = World::new().await?;
    let (application, consumer) = acknowledged_while_locked(cluster, &database).await?;
    drop(consumer);
    session.until("SELECT consumers = 0 AND worker_state = 'idle' FROM outbox.stats()", LONG).await?;
    session.until("SELECT bool_and(attachment IS NULL) FROM outbox.claims", LONG).await?;
    assert_eq!(claim(&session, "10").await?.0, NONE);
    application.batch_execute("COMMIT").await?;
    session.until(ALL_PROCESSED, LONG).await?;
    session.until(NOTHING_KEPT, LONG).await
}

#[tokio::test]
async fn what_was_acknowledged_while_it_was_locked_is_not_given_back_by_a_crash() -> Result<()> {
    let cluster = Cluster::start().await?;
    let database = cluster.database().await?;
    let _sessions = acknowledged_while_locked(&cluster, &database).await?;
    cluster.restart(Stop::Immediate).await?;
    let session = cluster.connect(&database).await?;
    session.until(ALL_PROCESSED, LONG).await?;
    session.until(NOTHING_KEPT, LONG).await
}

#[tokio::test]
async fn what_was_acknowledged_while_it_was_locked_is_not_released() -> Result<()> {
    let World { cluster, database, session } = World::new().await?;
    let (application, consumer) = acknowledged_while_locked(cluster, &database).await?;
    let token: i64 = session.one("SELECT token FROM outbox.claims").await?;
    application.batch_execute("COMMIT").await?;
    assert_eq!(consumer.one::<i64>(&format!("SELECT outbox.release({token})")).await?, 0);
    session.until(ALL_PROCESSED, LONG).await?;
    session.until(NOTHING_KEPT, LONG).await
}

#[tokio::test]
async fn an_open_transaction_that_analyzes_everything_stops_no_claim() -> Result<()> {
    let World { cluster, database, session } = World::new().await?;
    at_once(&session).await?;
    let operator = cluster.connect(&database).await?;
    let ids = insert(&session, &["a"]).await?;
    operator.batch_execute("BEGIN; ANALYZE").await?;
    let (claimed, token) = claim(&session, "10").await?;
    assert_eq!(claimed, ids);
    assert_eq!(session.one::<i64>(&format!("SELECT outbox.ack({token})")).await?, 1);
    Ok(())
}

/// Deletes of waiting events by the application beside relays: no deadlock, no orphan, and what waited behind them goes on.
#[tokio::test]
async fn deletes_of_waiting_events_take_their_turn() -> Result<()> {
    let cluster = Cluster::with(&[("outbox.webhook_allow_networks", "127.0.0.0/8")]).await?;
    let database = cluster.database().await?;
    let session = cluster.connect(&database).await?;
    // Nothing listens there: deliveries open the circuit, and most wait in their lines.
    session
        .batch_execute(
            "SELECT outbox.add_webhook('w', 'http://127.0.0.1:9/', settings => '{\"base\": 0.05, \"cap\": 0.1}')",
        )
        .await?;
    let _relays = (Relay::start(&cluster, &database, None).await?, Relay::start(&cluster, &database, None).await?);
    let writers = (0..4).map(async |n| {
        let application = cluster.connect(&database).await?;
        for _ in 0..60 {
            insert(&application, &["a", "b", "c", "a", "b"]).await?;
            let delete = format!(
                "DELETE FROM outbox_events WHERE id IN (SELECT id FROM outbox_events WHERE status <> 'processed' ORDER BY id {} LIMIT 4)",
                if n % 2 == 0 { "" } else { "DESC" }
            );
            match application.batch_execute(&delete).await {
                // Two deletes of the application's own may meet.
                Err(error) if error.code().is_some_and(|code| code.code() == "40P01") => {}
                other => other?,
            }
        }
        anyhow::Ok(())
    });
    futures_util::future::try_join_all(writers).await?;
    assert!(!cluster.log().contains("outbox.claim"), "a claim or settlement met a deadlock:\n{}", cluster.log());
    session.batch_execute("DELETE FROM outbox_events").await?;
    session.until("SELECT NOT EXISTS (SELECT FROM outbox.delivery)", LONG).await?;
    session.until("SELECT pending = 0 AND processing = 0 FROM outbox.stats()", LONG).await
}

#[tokio::test]
async fn what_waits_behind_a_deleted_event_goes_on() -> Result<()> {
    let World { cluster, database, session } = World::new().await?;
    let application = cluster.connect(&database).await?;
    session.batch_execute("SELECT outbox.add_rabbitmq('q')").await?;
    let ids = insert(&session, &["a", "a", "a"]).await?;
    let (_, token) = claim(&session, "10").await?;
    session.execute(&format!("SELECT outbox.fail({token}, {}, 'no luck', '1 day')", ids[0]), &[]).await?;
    assert_eq!(claim(&session, "10").await?.0, NONE);
    application.execute(&format!("DELETE FROM outbox_events WHERE id = {}", ids[0]), &[]).await?;
    session.until(&format!("SELECT EXISTS (SELECT FROM outbox.claim(1) WHERE id = {})", ids[1]), LONG).await
}

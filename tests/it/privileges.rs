//! What each role may do, and nothing more.

use anyhow::Result;
use outbox_tests::cluster::Cluster;
use outbox_tests::session::Session;

/// Runs the statement as the role and tells whether it was allowed.
async fn may(session: &Session, role: &str, statement: &str) -> Result<bool> {
    session.batch_execute(&format!("SET ROLE {role}")).await?;
    let result = session.batch_execute(statement).await;
    session.batch_execute("RESET ROLE").await?;
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.code().is_some_and(|code| code.code() == "42501") => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[tokio::test]
async fn each_role_can_do_its_work_and_nothing_else() -> Result<()> {
    let cluster = Cluster::start().await?;
    let database = cluster.database().await?;
    let session = cluster.connect(&database).await?;
    session
        .batch_execute(
            "CREATE ROLE nobody_special; CREATE ROLE producer; CREATE ROLE relay; CREATE ROLE monitor;
             SELECT outbox.grant_producer('producer'), outbox.grant_relay('relay'), outbox.grant_monitor('monitor');
             SELECT outbox.add_webhook('hook', 'https://example.com/');",
        )
        .await?;
    let all = ["nobody_special", "producer", "relay", "monitor"];
    for (statement, allowed) in [
        ("INSERT INTO outbox_events (event_type, event_data) VALUES ('a', '{}')", &["producer"][..]),
        ("INSERT INTO outbox_events (event_type, event_data) VALUES ('a', '{}') RETURNING id, event_id", &["producer"]),
        ("SELECT outbox.publish('a', '{}')", &["producer"]),
        ("INSERT INTO outbox_events (event_type, event_data, status) VALUES ('a', '{}', 'processed')", &[]),
        ("SELECT event_data FROM outbox_events", &[]),
        ("UPDATE outbox_events SET status = 'processed'", &[]),
        ("DELETE FROM outbox_events", &[]),
        ("SELECT outbox.attach('me')", &["relay"]),
        ("SELECT outbox.claim()", &["relay"]),
        ("SELECT outbox.ack(1)", &["relay"]),
        ("SELECT outbox.fail(1, 1, 'x')", &["relay"]),
        ("SELECT outbox.reject(1, 1, 'x')", &["relay"]),
        ("SELECT outbox.release(1)", &["relay"]),
        ("SELECT outbox.settle('{}', '{}')", &["relay"]),
        ("SELECT outbox.relay_destinations()", &["relay"]),
        ("SELECT outbox.stats()", &["relay", "monitor"]),
        ("SELECT outbox.health()", &["relay", "monitor"]),
        ("SELECT outbox.metrics()", &["relay", "monitor"]),
        ("SELECT * FROM outbox.tally", &[]),
        ("SELECT * FROM outbox.destinations", &["relay", "monitor"]),
        ("SELECT * FROM outbox.deliveries", &["relay", "monitor"]),
        ("SELECT outbox.event(gen_random_uuid())", &["relay"]),
        ("SELECT outbox.first_time('a', gen_random_uuid())", &["producer", "relay"]),
        ("SELECT * FROM outbox.inbox", &[]),
        ("SELECT outbox.alter_destination('hook', '{}')", &[]),
        ("SELECT outbox.send_test('hook')", &[]),
        ("SELECT outbox.backfill('hook')", &[]),
        ("SELECT * FROM outbox.secret", &[]),
        ("SELECT * FROM outbox.destination", &[]),
        ("SELECT outbox.add_rabbitmq('r')", &[]),
        ("SELECT outbox.replay_failed()", &[]),
        ("SELECT outbox.rotate_secret('hook')", &[]),
        ("SELECT outbox.grant_relay('nobody_special')", &[]),
    ] {
        for role in all {
            assert_eq!(may(&session, role, statement).await?, allowed.contains(&role), "{role}: {statement}");
        }
    }
    Ok(())
}

/// Claims and settlements wait for whoever holds the lock that they take.
#[tokio::test]
async fn no_role_can_keep_others_from_claiming() -> Result<()> {
    let cluster = Cluster::start().await?;
    let session = cluster.connect(&cluster.database().await?).await?;
    session
        .batch_execute(
            "CREATE ROLE nobody_special; CREATE ROLE producer; CREATE ROLE relay; CREATE ROLE monitor;
             SELECT outbox.grant_producer('producer'), outbox.grant_relay('relay'), outbox.grant_monitor('monitor');
             CREATE ROLE reader; GRANT USAGE ON SCHEMA outbox TO reader;",
        )
        .await?;
    for role in ["nobody_special", "producer", "relay", "monitor", "reader"] {
        for mode in ["ACCESS SHARE", "SHARE UPDATE EXCLUSIVE", "EXCLUSIVE", "ACCESS EXCLUSIVE"] {
            let lock = format!("BEGIN; LOCK TABLE outbox.claim_lock IN {mode} MODE; COMMIT");
            session.batch_execute(&format!("SET ROLE {role}")).await?;
            let error = session.batch_execute(&lock).await.expect_err(role);
            assert_eq!(error.code().map(|code| code.code()), Some("42501"), "{role}: {mode}: {error}");
            session.batch_execute("ROLLBACK; RESET ROLE").await?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn nothing_is_executable_by_public_and_every_definer_pins_its_path() -> Result<()> {
    let cluster = Cluster::shared().await?;
    let session = cluster.connect(&cluster.database().await?).await?;
    let members = "pg_proc p JOIN pg_depend d ON d.objid = p.oid AND d.deptype = 'e'
                   JOIN pg_extension x ON x.oid = d.refobjid AND x.extname = 'pg_outbox'";
    let open: Option<String> = session
        .one(&format!("SELECT string_agg(p.oid::regprocedure::text, ', ') FROM {members} WHERE has_function_privilege('public', p.oid, 'EXECUTE')"))
        .await?;
    assert_eq!(open, None, "executable by PUBLIC");
    let unpinned: Option<String> = session
        .one(&format!(
            "SELECT string_agg(p.oid::regprocedure::text, ', ') FROM {members}
              WHERE p.prosecdef AND NOT coalesce(p.proconfig::text LIKE '%search_path%', false)"
        ))
        .await?;
    assert_eq!(unpinned, None, "SECURITY DEFINER without a search_path");
    Ok(())
}

#[tokio::test]
async fn no_view_shows_a_secret() -> Result<()> {
    let cluster = Cluster::shared().await?;
    let session = cluster.connect(&cluster.database().await?).await?;
    let secret: String = session
        .one(r#"SELECT outbox.add_webhook('h', 'https://example.com/?token=hidden', settings => '{"headers": {"x-key": "hidden"}}')"#)
        .await?;
    session.batch_execute("SELECT outbox.send_test('h')").await?;
    let event = "(SELECT outbox.event(event_id) FROM outbox_events)";
    for source in ["outbox.destinations", "outbox.deliveries", "outbox.health()", "outbox.stats()", event] {
        let text: Option<String> = session.one(&format!("SELECT string_agg(x::text, ' ') FROM {source} x")).await?;
        let text = text.unwrap_or_default();
        assert!(!text.contains(&secret) && !text.contains("hidden"), "{source}: {text}");
    }
    Ok(())
}

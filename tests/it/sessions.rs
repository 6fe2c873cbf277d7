//! The relay's sessions with PostgreSQL: what settings of a role can't change, what is given up, what comes back by itself.

use anyhow::{Context, Result, ensure};
use outbox_tests::cluster::Cluster;
use outbox_tests::receiver::Receiver;
use outbox_tests::relay::{self, Relay};
use outbox_tests::session::Session;
use outbox_tests::wait::{self, LONG};
use outbox_tests::world::World;

use crate::pools::check;

const ALL_PROCESSED: &str = "SELECT bool_and(status = 'processed') FROM outbox_events";

/// Whatever a role or a database may set that could stand in the relay's way.
const POISON: [(&str, &str); 14] = [
    ("default_transaction_isolation", "serializable"),
    ("default_transaction_read_only", "on"),
    ("default_transaction_deferrable", "on"),
    ("lock_timeout", "300ms"),
    ("statement_timeout", "300ms"),
    ("idle_session_timeout", "300ms"),
    ("idle_in_transaction_session_timeout", "300ms"),
    ("search_path", "pg_temp"),
    ("client_encoding", "LATIN1"),
    ("DateStyle", "SQL, DMY"),
    ("TimeZone", "Asia/Kathmandu"),
    ("bytea_output", "escape"),
    ("row_security", "off"),
    ("exit_on_error", "on"),
];

struct Stage {
    session: Session,
    receiver: Receiver,
    database: String,
}

/// A database with one webhook.
async fn stage(cluster: &Cluster) -> Result<Stage> {
    let World { database, session, .. } = World::on(cluster).await?;
    let receiver = Receiver::start()?;
    session.execute("SELECT outbox.add_webhook('hook', $1)", &[&receiver.url("/")]).await?;
    Ok(Stage { session, receiver, database })
}

/// A role of a relay, with these settings, and the URL of its login.
async fn role(cluster: &Cluster, stage: &Stage, settings: &[(&str, &str)]) -> Result<String> {
    let role = format!("relay_{}", stage.database);
    let session = &stage.session;
    session
        .batch_execute(&format!("CREATE ROLE {role} LOGIN PASSWORD 'word'; SELECT outbox.grant_relay('{role}')"))
        .await?;
    for (name, value) in settings {
        session.batch_execute(&format!("ALTER ROLE {role} SET {name} = '{value}'")).await?;
    }
    Ok(cluster.url_as(&role, "word", &stage.database))
}

#[tokio::test]
async fn settings_of_a_role_do_not_make_a_relay_deliver_twice() -> Result<()> {
    let cluster = Cluster::shared().await?;
    let stage = stage(cluster).await?;
    let url = role(cluster, &stage, &POISON).await?;
    let relay = Relay::with(&url, None, &[]).await?;
    stage.session.batch_execute("SELECT outbox.publish('first', '{}')").await?;
    stage.receiver.wait_for(1, LONG).await?;
    stage.session.until(ALL_PROCESSED, LONG).await?;

    // An operator holds the claims' lock for longer than the role's time-outs.
    let mut operator = cluster.connect(&stage.database).await?;
    let held = operator.transaction().await?;
    held.batch_execute("LOCK TABLE outbox.claim_lock IN ACCESS EXCLUSIVE MODE").await?;
    let publish = "SELECT outbox.publish('more', '{}') FROM generate_series(1, 40)";
    stage.session.batch_execute(publish).await?;
    let waits = "SELECT count(*) > 0 FROM pg_stat_activity
                  WHERE application_name = 'outbox-relay' AND datname = current_database() AND wait_event_type = 'Lock'
                        AND clock_timestamp() - query_start > interval '1.5 s'";
    stage.session.until(waits, LONG).await?;
    held.commit().await?;
    stage.session.until(ALL_PROCESSED, LONG).await?;
    assert_eq!(stage.receiver.count(), 41);
    assert_eq!(relay.metric("outbox_relay_reconnects_total").await?, 0.0, "{}", relay.log());
    Ok(())
}

#[tokio::test]
async fn a_role_that_a_database_imposes_takes_no_right_from_a_relay() -> Result<()> {
    let cluster = Cluster::shared().await?;
    let stage = stage(cluster).await?;
    let url = role(cluster, &stage, &[]).await?;
    let other = format!("other_{}", stage.database);
    let relay_role = format!("relay_{}", stage.database);
    stage
        .session
        .batch_execute(&format!(
            "CREATE ROLE {other}; GRANT {other} TO {relay_role}; ALTER DATABASE {} SET role = '{other}'",
            stage.database
        ))
        .await?;
    let (_, text) = check(&url)?;
    ensure!(text.contains("ok    privileges"), "{text}");
    let _relay = Relay::with(&url, None, &[]).await?;
    stage.session.batch_execute("RESET ROLE; SELECT outbox.publish('first', '{}')").await?;
    stage.receiver.wait_for(1, LONG).await.map(drop)
}

#[tokio::test]
async fn what_a_relay_gave_up_does_not_go_on_in_the_server() -> Result<()> {
    let cluster = Cluster::shared().await?;
    let stage = stage(cluster).await?;
    let _relay = Relay::start(cluster, &stage.database, None).await?;
    let mut operator = cluster.connect(&stage.database).await?;
    let held = operator.transaction().await?;
    held.batch_execute("LOCK TABLE outbox.claim_lock IN ACCESS EXCLUSIVE MODE").await?;
    stage.session.batch_execute("SELECT outbox.publish('a', '{}')").await?;
    let waiting = r"FROM pg_stat_activity WHERE application_name = 'outbox-relay' AND datname = current_database()
                     AND wait_event_type = 'Lock' AND query LIKE '%outbox.claim\_for(%'";
    stage.session.until(&format!("SELECT count(*) = 1 {waiting}"), LONG).await?;
    let pid: i32 = stage.session.one(&format!("SELECT pid {waiting}")).await?;
    // The other session is lost, and with it the work of both.
    let others = "SELECT bool_and(pg_terminate_backend(pid)) FROM pg_stat_activity
                   WHERE application_name = 'outbox-relay' AND datname = current_database() AND pid <> ";
    ensure!(stage.session.one::<bool>(&format!("{others}{pid}")).await?);
    stage.session.until(&format!("SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = {pid})"), LONG).await?;
    held.commit().await?;
    stage.receiver.wait_for(1, LONG).await.map(drop)
}

#[tokio::test]
async fn a_relay_goes_on_after_drop_and_create_extension() -> Result<()> {
    let cluster = Cluster::start().await?;
    let stage = stage(&cluster).await?;
    let relay = Relay::start(&cluster, &stage.database, None).await?;
    stage.session.batch_execute("SELECT outbox.publish('first', '{}')").await?;
    stage.receiver.wait_for(1, LONG).await?;
    stage.session.until(ALL_PROCESSED, LONG).await?;
    stage.session.batch_execute("DROP EXTENSION pg_outbox CASCADE").await?;
    let session = cluster.connect(&stage.database).await?;
    session.batch_execute("CREATE EXTENSION pg_outbox").await?;
    session.execute("SELECT outbox.add_webhook('hook', $1)", &[&stage.receiver.url("/")]).await?;
    session.batch_execute("SELECT outbox.publish('second', '{}')").await?;
    stage.receiver.wait_for(2, LONG).await.with_context(|| relay.log())?;
    session.until(ALL_PROCESSED, LONG).await
}

#[tokio::test]
async fn an_extension_of_another_minor_version_is_refused() -> Result<()> {
    let World { cluster, database, session } = World::new().await?;
    session.batch_execute("UPDATE pg_extension SET extversion = '0.99.0' WHERE extname = 'pg_outbox'").await?;
    let mut command = relay::command(None)?;
    command.arg("run").env("DATABASE_URL", cluster.url(&database)).env("HTTP_LISTEN", "127.0.0.1:0");
    let output = command.output()?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(64), "{text}");
    ensure!(text.lines().any(|line| line.starts_with("outbox-relay: ") && line.contains("0.99.0")), "{text}");
    Ok(())
}

/// A name whose first address accepts and says nothing.
#[tokio::test]
async fn a_dead_address_does_not_hide_the_next_of_the_same_name() -> Result<()> {
    let cluster = Cluster::shared().await?;
    let stage = stage(cluster).await?;
    // Without IPv6 the name has one address.
    let _silent = std::net::TcpListener::bind(("::1", cluster.port()));
    let url = cluster.url(&stage.database).replace("127.0.0.1", "localhost");
    let relay = Relay::spawn(&url, None, &[])?;
    wait::until("the relay to be ready", LONG, async || Ok((relay.get("/readyz").await?.0 == 200).then_some(())))
        .await
        .with_context(|| relay.log())?;
    stage.session.batch_execute("SELECT outbox.publish('first', '{}')").await?;
    stage.receiver.wait_for(1, LONG).await.map(drop)
}

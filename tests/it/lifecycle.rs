//! Databases come, go, are renamed and copied as if no worker were there; a worker that ends comes back; a dump holds all.

use anyhow::Result;
use nix::sys::signal::Signal;
use outbox_tests::cluster::Cluster;
use outbox_tests::session::Session;
use outbox_tests::wait::LONG;
use outbox_tests::world::World;

const IDLE: &str = "SELECT worker_state = 'idle' FROM outbox.stats()";

async fn worker_of(admin: &Session, database: &str) -> Result<bool> {
    Ok(admin
        .query_one(
            "SELECT count(*) = 1 FROM pg_stat_activity WHERE backend_type = 'pg_outbox worker' AND datname = $1",
            &[&database],
        )
        .await?
        .get(0))
}

async fn workers(admin: &Session, database: &str, count: i64) -> Result<()> {
    let query = format!(
        "SELECT count(*) = {count} FROM pg_stat_activity WHERE backend_type = 'pg_outbox worker' AND datname = '{database}'"
    );
    admin.until(&query, LONG).await
}

#[tokio::test]
async fn a_database_is_copied_renamed_and_dropped_with_its_worker_running() -> Result<()> {
    let cluster = Cluster::shared().await?;
    let database = cluster.database().await?;
    let admin = cluster.connect("postgres").await?;
    let (copy, renamed) = (format!("{database}_copy"), format!("{database}_renamed"));
    admin.batch_execute(&format!("CREATE DATABASE {copy} TEMPLATE {database}")).await?;
    workers(&admin, &database, 1).await?;
    workers(&admin, &copy, 1).await?;
    admin.batch_execute(&format!("ALTER DATABASE {copy} RENAME TO {renamed}")).await?;
    workers(&admin, &renamed, 1).await?;
    admin.batch_execute(&format!("DROP DATABASE {renamed}")).await?;
    workers(&admin, &renamed, 0).await?;
    admin.batch_execute(&format!("DROP DATABASE {database} WITH (FORCE)")).await?;
    workers(&admin, &database, 0).await?;
    Ok(())
}

#[tokio::test]
async fn the_worker_comes_back_when_such_a_command_fails() -> Result<()> {
    let cluster = Cluster::shared().await?;
    let database = cluster.database().await?;
    let admin = cluster.connect("postgres").await?;
    let session = cluster.connect(&database).await?;
    for command in [
        format!("ALTER DATABASE {database} RENAME TO postgres"),
        format!("DROP DATABASE {database}"),
        format!("ALTER DATABASE {database} SET TABLESPACE nowhere"),
        format!("CREATE DATABASE postgres TEMPLATE {database}"),
    ] {
        assert!(admin.batch_execute(&command).await.is_err(), "{command}");
        session.until(IDLE, LONG).await?;
    }
    assert!(worker_of(&admin, &database).await?);
    Ok(())
}

#[tokio::test]
async fn the_extension_is_dropped_kept_and_created_again() -> Result<()> {
    let cluster = Cluster::shared().await?;
    let database = cluster.database().await?;
    let admin = cluster.connect("postgres").await?;
    let session = cluster.connect(&database).await?;
    session.batch_execute("BEGIN; DROP EXTENSION pg_outbox; ROLLBACK").await?;
    session.until(IDLE, LONG).await?;
    session.batch_execute("DROP EXTENSION pg_outbox").await?;
    workers(&admin, &database, 0).await?;
    session.batch_execute(r#"CREATE SCHEMA "My Schema"; CREATE EXTENSION pg_outbox SCHEMA "My Schema""#).await?;
    workers(&admin, &database, 1).await?;
    session
        .batch_execute(r#"INSERT INTO "My Schema".outbox_events (event_type, event_data) VALUES ('a', '{}')"#)
        .await?;
    session.until("SELECT count(*) = 1 FROM outbox.claim()", LONG).await?;
    Ok(())
}

#[tokio::test]
async fn a_worker_that_was_ended_comes_back_and_announces() -> Result<()> {
    let cluster = Cluster::start().await?;
    let database = cluster.database().await?;
    for kill in [false, true] {
        let session = cluster.connect(&database).await?;
        let pid: i32 = session.one("SELECT worker_pid FROM outbox.stats()").await?;
        if kill {
            cluster.signal(pid, Signal::SIGKILL)?;
        } else {
            session.execute("SELECT pg_terminate_backend($1)", &[&pid]).await?;
        }
        let admin = outbox_tests::wait::until("a connection after the end of the worker", LONG, async || {
            let admin = cluster.connect(&database).await?;
            let query =
                format!("SELECT coalesce(worker_pid, {pid}) <> {pid} AND worker_state = 'idle' FROM outbox.stats()");
            Ok(admin.one::<bool>(&query).await?.then_some(admin))
        });
        let mut session = admin.await?;
        session
            .batch_execute(
                "LISTEN outbox_events; INSERT INTO outbox_events (event_type, event_data) VALUES ('a', '{}')",
            )
            .await?;
        session.notification(LONG).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_dump_holds_events_destinations_and_what_is_owed() -> Result<()> {
    let World { cluster, database, session } = World::new().await?;
    session
        .batch_execute(
            "SELECT outbox.add_rabbitmq('r');
             SELECT outbox.add_webhook('h', 'https://example.com/');
             INSERT INTO outbox_events (event_type, event_data) SELECT 'a', '{}' FROM generate_series(1, 4);
             SELECT outbox.settle(ARRAY[t], ARRAY[1], jsonb_build_array(
                 jsonb_build_object('token', t, 'id', 2, 'destination', 'h', 'outcome', 'failed', 'error', 'no luck', 'retry_in', 3600)))
               FROM (SELECT max(claim_token) AS t FROM outbox.claim(3)) c;",
        )
        .await?;
    let dump = cluster.dir().join(format!("{database}.dump"));
    let path = dump.to_str().unwrap_or_default();
    let dumped = outbox_tests::process::run({
        let mut command = cluster.client("pg_dump")?;
        command.args(["--format=custom", "--file", path, &cluster.url(&database)]);
        command
    })?;
    assert_eq!(String::from_utf8_lossy(&dumped.stderr), "", "nobody reads a nightly job's mail that always warns");
    let copy = cluster.empty_database().await?;
    outbox_tests::process::run({
        let mut command = cluster.client("pg_restore")?;
        command.args(["--exit-on-error", "--dbname", &cluster.url(&copy), path]);
        command
    })?;
    let restored = cluster.connect(&copy).await?;
    // 1 was delivered everywhere; 2 is owed to h; 2 (r), 3 were claimed by a consumer that is not there; 4 is new.
    restored.until("SELECT pending = 3 AND processing = 0 AND processed = 1 FROM outbox.stats()", LONG).await?;
    restored.until("SELECT array_agg(id ORDER BY id) = '{2,3,4}' FROM outbox.claim()", LONG).await?;
    let error: String = restored.one("SELECT last_error FROM outbox.deliveries WHERE destination = 'h'").await?;
    assert_eq!(error, "no luck");
    let next: i64 =
        restored.one("INSERT INTO outbox_events (event_type, event_data) VALUES ('a', '{}') RETURNING id").await?;
    assert_eq!(next, 5);
    let secrets: i64 = restored.one("SELECT count(*) FROM outbox.secret").await?;
    assert_eq!(secrets, 1);
    Ok(())
}

#[tokio::test]
async fn without_preload_the_extension_says_what_to_do() -> Result<()> {
    let cluster = Cluster::with(&[("shared_preload_libraries", "")]).await?;
    let session = cluster.connect("postgres").await?;
    let error = session.batch_execute("CREATE EXTENSION pg_outbox").await.expect_err("not preloaded");
    let error = error.as_db_error().expect("an error of the server");
    assert_eq!(error.code().code(), "55000");
    assert!(error.message().contains("shared_preload_libraries"), "{error}");
    assert!(error.hint().is_some_and(|hint| hint.contains("restart")), "{error}");
    Ok(())
}

//! The inbox of an idempotent consumer: an event is new once, for each consumer, whatever else goes on.

use anyhow::{Context, Result};
use outbox_tests::cluster::Cluster;
use outbox_tests::process::run;
use outbox_tests::session::Session;
use outbox_tests::wait::LONG;
use outbox_tests::world::World;

const EVENT: &str = "00000000-0000-7000-8000-000000000001";

async fn first_time(session: &Session, consumer: &str) -> Result<bool> {
    session.one(&format!("SELECT outbox.first_time('{consumer}', '{EVENT}')")).await
}

/// A session of a role that may do what a producer may.
async fn application(world: &World<'_>) -> Result<Session> {
    let session = world.cluster.connect(&world.database).await?;
    let role = format!("application_of_{}", world.database);
    let make = format!("CREATE ROLE {role}; SELECT outbox.grant_producer('{role}'); SET ROLE {role}");
    session.batch_execute(&make).await?;
    Ok(session)
}

#[tokio::test]
async fn an_event_is_new_once_for_each_consumer_in_a_transaction_that_commits() -> Result<()> {
    let world = World::new().await?;
    let session = application(&world).await?;
    session.batch_execute("BEGIN").await?;
    assert!(first_time(&session, "a").await?);
    session.batch_execute("ROLLBACK; BEGIN; SAVEPOINT s").await?;
    assert!(first_time(&session, "a").await?);
    session.batch_execute("ROLLBACK TO s").await?;
    assert!(first_time(&session, "a").await?);
    session.batch_execute("COMMIT").await?;
    assert!(!first_time(&session, "a").await?);
    assert!(first_time(&session, "b").await?);
    for arguments in
        ["'', gen_random_uuid()", "NULL, gen_random_uuid()", "'a', NULL", "repeat('a', 1001), gen_random_uuid()"]
    {
        let call = format!("SELECT outbox.first_time({arguments})");
        let error = session.batch_execute(&call).await.expect_err(&call);
        assert_eq!(error.code().map(|code| code.code()), Some("22023"), "{call}");
    }
    assert!(session.one::<bool>("SELECT outbox.first_time(repeat('é', 500), gen_random_uuid())").await?);
    Ok(())
}

#[tokio::test]
async fn who_comes_second_waits_for_the_first_and_is_first_only_if_that_rolls_back() -> Result<()> {
    for (end, again) in [("COMMIT", false), ("ROLLBACK", true)] {
        let world = World::new().await?;
        let (first, second) = (application(&world).await?, world.cluster.connect(&world.database).await?);
        first.batch_execute("BEGIN").await?;
        assert!(first_time(&first, "a").await?);
        let waits =
            "SELECT count(*) = 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'
                        AND query LIKE '%first_time%'";
        let ending = async {
            world.until(waits).await?;
            anyhow::Ok(first.batch_execute(end).await?)
        };
        let (answer, ended) = tokio::join!(first_time(&second, "a"), ending);
        ended?;
        assert_eq!(answer?, again, "{end}");
    }
    Ok(())
}

/// On a server of its own.
async fn keep(world: &World<'_>, retention: &str) -> Result<()> {
    world.execute(&format!("ALTER SYSTEM SET outbox.inbox_retention = '{retention}'")).await?;
    world.execute("SELECT pg_reload_conf()").await?;
    world.until(&format!("SELECT current_setting('outbox.inbox_retention') = '{retention}'")).await
}

#[tokio::test]
async fn what_was_seen_is_forgotten_at_its_moment_however_much_it_is_and_whoever_is_at_work() -> Result<()> {
    let cluster = Cluster::start().await?;
    let world = World::on(&cluster).await?;
    keep(&world, "3s").await?;
    let session = application(&world).await?;
    let worker: i32 = world.session.one("SELECT worker_pid FROM outbox.stats()").await?;
    let idle = "SELECT worker_state = 'idle' FROM outbox.stats()";
    let busy = cluster.connect(&world.database).await?;
    busy.batch_execute(
        "BEGIN; SELECT outbox.first_time('busy', gen_random_uuid()); LOCK TABLE outbox.claim_lock IN EXCLUSIVE MODE",
    )
    .await?;
    assert!(first_time(&session, "a").await?);
    session.batch_execute("SELECT outbox.first_time('many', gen_random_uuid()) FROM generate_series(1, 2500)").await?;
    let last: f64 = world.session.one("SELECT extract(epoch FROM max(seen_at))::float8 FROM outbox.inbox").await?;
    world.until(idle).await?;
    assert!(!first_time(&session, "a").await?);
    world.until("SELECT count(*) = 0 FROM outbox.inbox").await?;
    let now: f64 = world.session.one("SELECT extract(epoch FROM clock_timestamp())::float8").await?;
    assert!((3.0..13.0).contains(&(now - last)), "forgotten after {} s", now - last);
    assert!(first_time(&session, "a").await?);
    busy.batch_execute("COMMIT").await?;
    world.until("SELECT count(*) = 0 FROM outbox.inbox").await?;
    world.until(idle).await?;
    assert_eq!(world.session.one::<i32>("SELECT worker_pid FROM outbox.stats()").await?, worker);
    keep(&world, "-1").await?;
    assert!(first_time(&session, "a").await?);
    world.execute("UPDATE outbox.inbox SET seen_at = now() - interval '50 years'").await?;
    world.execute("SELECT outbox._due()").await?;
    assert!(!first_time(&session, "a").await?);
    Ok(())
}

#[tokio::test]
async fn a_restore_brings_the_inbox_back_and_it_is_forgotten_there_too() -> Result<()> {
    let cluster = Cluster::start().await?;
    let world = World::on(&cluster).await?;
    assert!(first_time(&world.session, "a").await?);
    world.execute("UPDATE outbox.inbox SET seen_at = now() - interval '30 days' + interval '20 seconds'").await?;
    let path = cluster.dir().join("inbox.dump");
    let path = path.to_str().context("a path in UTF-8")?;
    let mut dump = cluster.client("pg_dump")?;
    dump.args(["--format=custom", "--file", path, &cluster.url(&world.database)]);
    run(dump)?;
    let copy = cluster.empty_database().await?;
    let mut restore = cluster.client("pg_restore")?;
    restore.args(["--exit-on-error", "--dbname", &cluster.url(&copy), path]);
    run(restore)?;
    let copy = cluster.connect(&copy).await?;
    assert!(!first_time(&copy, "a").await?);
    copy.until("SELECT count(*) = 0 FROM outbox.inbox", LONG).await
}

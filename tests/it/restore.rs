//! A restore with a backlog: whatever the order in which rows arrive, nothing is lost, nothing that was delivered goes out
//! again, and nothing is concluded from rows that are still to come.

use std::process::Command;

use anyhow::Result;
use outbox_tests::cluster::Cluster;
use outbox_tests::process::run;
use outbox_tests::session::Session;
use outbox_tests::wait::LONG;
use outbox_tests::world::World;

use crate::claims::{NONE, claim, insert};

const EVENTS: i64 = 3000;

/// Delivered to `a`, parked for `b`, which is paused; one event is scheduled, one dead, one in flight.
async fn backlog(session: &Session) -> Result<()> {
    session.batch_execute("SELECT outbox.add_rabbitmq('a'), outbox.add_rabbitmq('b'), outbox.pause('b')").await?;
    session
        .execute(
            "INSERT INTO outbox_events (event_type, event_data, aggregate_type, aggregate_id)
             SELECT 'test.happened', '{}', 'test', (n % 100)::text FROM generate_series(1, $1::bigint) AS n",
            &[&EVENTS],
        )
        .await?;
    let (claimed, token) = claim(session, "5000, '{a}'").await?;
    assert_eq!(claimed.len() as i64, EVENTS);
    session.execute(&format!("SELECT outbox.ack({token})"), &[]).await?;
    session.batch_execute("SELECT outbox.publish('late', '{}', available_at => now() + interval '1 day')").await?;
    Ok(())
}

/// What must hold in the copy: nothing for `a`, everything for `b`.
async fn holds(copy: &Session) -> Result<()> {
    copy.until("SELECT pending = 3001 AND processing = 0 FROM outbox.stats()", LONG).await?;
    copy.until(&format!("SELECT ({}) = 0", crate::model::MISCOUNTED), LONG).await?;
    assert_eq!(claim(copy, "5000, '{a}'").await?.0, NONE, "it had them");
    copy.batch_execute("SELECT outbox.resume('b')").await?;
    let mut count = 0;
    while count < EVENTS {
        let (ids, token) = claim(copy, "1000").await?;
        assert_ne!(ids, NONE, "{count} so far");
        count += ids.len() as i64;
        copy.execute(&format!("SELECT outbox.ack({token})"), &[]).await?;
    }
    copy.until("SELECT pending = 1 FROM outbox.stats()", LONG).await?;
    assert!(copy.one::<bool>("SELECT ok FROM outbox.health() WHERE check_name = 'restore'").await?);
    Ok(())
}

fn dump(cluster: &Cluster, database: &str, format: &str) -> Result<String> {
    let path = cluster.dir().join(format!("{database}.{format}"));
    let path = path.to_str().unwrap_or_default().to_owned();
    let mut command = cluster.client("pg_dump")?;
    command.args(["--format", format, "--file", &path, &cluster.url(database)]);
    run(command)?;
    Ok(path)
}

fn restore(mut command: Command, arguments: &[&str]) -> Result<()> {
    command.args(arguments);
    run(command)?;
    Ok(())
}

#[tokio::test]
async fn a_backlog_comes_back_as_it_was() -> Result<()> {
    let World { cluster, database, session } = World::new().await?;
    backlog(&session).await?;
    let copies = [("custom", vec!["--jobs", "2"]), ("plain", vec![])];
    for (format, options) in copies {
        let path = dump(cluster, &database, format)?;
        let copy = cluster.empty_database().await?;
        let url = cluster.url(&copy);
        match format {
            "custom" => {
                let mut arguments = vec!["--exit-on-error", "--dbname", &url];
                arguments.extend(options);
                arguments.push(&path);
                restore(cluster.client("pg_restore")?, &arguments)?;
            }
            _ => restore(cluster.client("psql")?, &["-Xq", "-v", "ON_ERROR_STOP=1", "-f", &path, &url])?,
        }
        holds(&cluster.connect(&copy).await?).await?;
    }
    Ok(())
}

/// The table of events sorts before `outbox`, so that its rows come first, and the worker has long looked at them when the
/// deliveries arrive.
#[tokio::test]
async fn deliveries_that_come_long_after_their_events_are_taken_in() -> Result<()> {
    let cluster = Cluster::shared().await?;
    let database = cluster.empty_database().await?;
    let session = cluster.connect(&database).await?;
    session
        .batch_execute("CREATE SCHEMA app; SET search_path = app, public; CREATE EXTENSION pg_outbox SCHEMA app")
        .await?;
    session.until("SELECT worker_pid IS NOT NULL FROM outbox.stats()", LONG).await?;
    backlog(&session).await?;
    let path = dump(cluster, &database, "custom")?;
    let copy = cluster.empty_database().await?;
    let url = cluster.url(&copy);
    let part = |arguments: &[&str]| {
        let mut all = vec!["--exit-on-error", "--dbname", &url];
        all.extend(arguments);
        all.push(&path);
        restore(cluster.client("pg_restore")?, &all)
    };
    part(&["--section=pre-data"])?;
    let restored = cluster.connect(&copy).await?;
    restored.batch_execute("SET search_path = app, public").await?;
    for table in ["destination", "outbox_events", "delivery"] {
        part(&["--data-only", "--table", table])?;
        restored.until("SELECT recovered FROM outbox._counters()", LONG).await?;
        if table == "outbox_events" {
            restored.until("SELECT NOT ok FROM outbox.health() WHERE check_name = 'restore'", LONG).await?;
            assert_eq!(claim(&restored, "5000, '{a}'").await?.0, NONE, "nothing follows from rows that are missing");
        }
    }
    holds(&restored).await
}

#[tokio::test]
async fn a_token_from_before_a_restore_settles_nothing() -> Result<()> {
    let World { session, .. } = World::new().await?;
    insert(&session, &["a"]).await?;
    let (_, before) = claim(&session, "10").await?;
    session.execute(&format!("SELECT outbox.ack({before})"), &[]).await?;
    session.batch_execute("SELECT setval('outbox.claim_token_seq', 1)").await?;
    insert(&session, &["b"]).await?;
    let (_, after) = claim(&session, "10").await?;
    assert!(after > before, "{after} came after {before}");
    Ok(())
}

#[tokio::test]
async fn what_a_dump_did_not_hold_can_be_repaired() -> Result<()> {
    let World { session, .. } = World::new().await?;
    session.batch_execute("SELECT outbox.add_rabbitmq('q'), outbox.pause('q')").await?;
    let ids = insert(&session, &["a", "b"]).await?;
    session.batch_execute("SELECT outbox.add_rabbitmq('other', event_types => '{none}')").await?;
    claim(&session, "10").await?;
    session.batch_execute(&format!("DELETE FROM outbox.delivery WHERE id = {}", ids[0])).await?;
    session
        .batch_execute(
            "INSERT INTO outbox.delivery (id, destination, status, next_attempt_at) VALUES (99, 'q', 'pending', now())",
        )
        .await?;
    session.until("SELECT NOT ok FROM outbox.health() WHERE check_name = 'restore'", LONG).await?;
    assert_eq!(session.one::<i64>("SELECT outbox.repair()").await?, 2);
    session.batch_execute("SELECT outbox.resume('q')").await?;
    assert_eq!(claim(&session, "10").await?.0, ids);
    Ok(())
}

/// A claim that saw it without its patterns would take its events for unrouted.
#[tokio::test]
async fn a_destination_that_a_restore_brings_is_never_seen_without_its_patterns() -> Result<()> {
    let World { session, .. } = World::new().await?;
    session
        .batch_execute(
            "BEGIN;
             INSERT INTO outbox.destination (name, kind, event_types, exchange, routing_key, broker, since_token)
             VALUES ('a', 'rabbitmq', '{b.*,c}', 'x', 'y', 'default', 1)",
        )
        .await?;
    let patterns = "SELECT string_agg(like_pattern, ' ' ORDER BY like_pattern) FROM outbox.interest";
    assert_eq!(session.one::<Option<String>>(patterns).await?.as_deref(), Some("b.% c"));
    Ok(session.batch_execute("COMMIT").await?)
}

//! The relay beside servers that end and come back, beside other relays, with settings that are wrong, and idle.

use std::collections::{HashMap, HashSet};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use outbox_tests::broker::Broker;
use outbox_tests::cluster::{Cluster, Stop};
use outbox_tests::queue::{Message, Queue};
use outbox_tests::relay::{self, Relay};
use outbox_tests::session::Session;
use outbox_tests::wait::{self, LONG};
use uuid::Uuid;

const ALL_PROCESSED: &str = "SELECT bool_and(status = 'processed') FROM outbox_events";

/// A database with a destination for RabbitMQ.
async fn with_destination(cluster: &Cluster) -> Result<String> {
    let database = cluster.database().await?;
    cluster.connect(&database).await?.batch_execute("SELECT outbox.add_rabbitmq('rabbitmq')").await?;
    Ok(database)
}

/// A queue that gets everything.
async fn queue(broker: &Broker) -> Result<Queue> {
    let channel = broker.channel().await?;
    channel.bind("outbox_events", "#", "all").await?;
    channel.consume("all").await
}

/// Events of several aggregates, in one transaction.
async fn insert(session: &Session, count: i32, aggregates: i32) -> Result<()> {
    session
        .execute(
            "INSERT INTO outbox_events (event_type, aggregate_type, aggregate_id, event_data)
             SELECT 'test.happened', 'a', (n % $2)::text, jsonb_build_object('n', n) FROM generate_series(1, $1) n",
            &[&count, &aggregates],
        )
        .await?;
    Ok(())
}

/// Takes messages until each event of the table came at least once; in the order of each aggregate when first seen.
async fn all_arrive_in_order(session: &Session, queue: &mut Queue) -> Result<Vec<Message>> {
    let rows = session.query("SELECT event_id, aggregate_id, id FROM outbox_events", &[]).await?;
    let events: HashMap<Uuid, (String, i64)> = rows
        .iter()
        .map(|row| (row.get(0), (row.get::<_, Option<String>>(1).unwrap_or_default(), row.get(2))))
        .collect();
    let (mut seen, mut messages, mut latest) = (HashSet::new(), Vec::new(), HashMap::new());
    while seen.len() < events.len() {
        let message = queue.next(LONG).await.with_context(|| format!("{} of {}", seen.len(), events.len()))?;
        let event = message.event_id()?;
        let (aggregate, id) = events.get(&event).context("an event that nobody published")?;
        if seen.insert(event) {
            let before = latest.insert(aggregate.clone(), *id);
            ensure!(before.is_none_or(|before| before < *id), "aggregate {aggregate}: {id} after {before:?}");
        }
        messages.push(message);
    }
    Ok(messages)
}

#[tokio::test]
async fn two_relays_share_the_work() -> Result<()> {
    let cluster = Cluster::shared().await?;
    let database = with_destination(cluster).await?;
    let session = cluster.connect(&database).await?;
    let broker = Broker::shared().await?;
    let mut queue = queue(&broker).await?;
    let relays = [
        Relay::start(cluster, &database, Some(&broker)).await?,
        Relay::start(cluster, &database, Some(&broker)).await?,
    ];
    insert(&session, 5000, 500).await?;
    let messages = all_arrive_in_order(&session, &mut queue).await?;
    assert_eq!(messages.len(), 5000, "some came twice");
    session.until(ALL_PROCESSED, LONG).await?;
    for relay in &relays {
        let metric = async || {
            let processed = relay.metric("outbox_events_processed_total").await?;
            Ok((processed > 0.0).then_some(()))
        };
        wait::until("each relay to have had a share", LONG, metric).await?;
    }
    Ok(())
}

#[tokio::test]
async fn what_a_killed_relay_held_is_delivered_by_another() -> Result<()> {
    let cluster = Cluster::shared().await?;
    let database = with_destination(cluster).await?;
    let session = cluster.connect(&database).await?;
    let broker = Broker::own().await?;
    let mut queue = queue(&broker).await?;
    let relay = Relay::start(cluster, &database, Some(&broker)).await?;
    relay.logged("connected to RabbitMQ", LONG).await?;
    // A broker that says nothing has the relay hold what it claimed.
    broker.freeze();
    insert(&session, 1000, 1000).await?;
    session.until("SELECT count(*) = 1000 FROM outbox_events WHERE status = 'processing'", LONG).await?;
    relay.kill().await?;
    session.until("SELECT count(*) = 1000 FROM outbox_events WHERE status = 'pending'", LONG).await?;
    broker.thaw();
    let _other = Relay::start(cluster, &database, Some(&broker)).await?;
    all_arrive_in_order(&session, &mut queue).await?;
    session.until(ALL_PROCESSED, LONG).await?;
    assert_eq!(session.one::<i64>("SELECT sum(retry_count) FROM outbox_events").await?, 0);
    Ok(())
}

#[tokio::test]
async fn nothing_is_lost_when_postgresql_ends_in_the_middle() -> Result<()> {
    let cluster = Cluster::start().await?;
    let database = with_destination(&cluster).await?;
    let broker = Broker::shared().await?;
    let mut queue = queue(&broker).await?;
    let _relay = Relay::start(&cluster, &database, Some(&broker)).await?;
    for how in ["a child is killed", "immediate", "fast"] {
        let session = cluster.connect(&database).await?;
        insert(&session, 3000, 100).await?;
        session.until("SELECT count(*) > 100 FROM outbox_events WHERE status = 'processed'", LONG).await?;
        match how {
            "immediate" => cluster.restart(Stop::Immediate).await?,
            "fast" => cluster.restart(Stop::Fast).await?,
            _ => {
                let pid: i32 = session.one("SELECT pg_backend_pid()").await?;
                // The server ends all others once it has noticed.
                let other = cluster.connect(&database).await?;
                cluster.signal(pid, Signal::SIGKILL)?;
                let back = async || Ok(cluster.connect(&database).await.is_ok().then_some(()));
                wait::until("PostgreSQL to be gone", LONG, async || Ok(other.is_closed().then_some(()))).await?;
                wait::until("PostgreSQL to recover", LONG, back).await?;
            }
        }
        let session = cluster.connect(&database).await?;
        session.batch_execute("SELECT outbox.publish('last', '{}')").await?;
        all_arrive_in_order(&session, &mut queue).await.context(how)?;
        session.until(ALL_PROCESSED, LONG).await.context(how)?;
        session.batch_execute("DELETE FROM outbox_events").await?;
    }
    Ok(())
}

#[tokio::test]
async fn nothing_is_lost_when_rabbitmq_ends_in_the_middle() -> Result<()> {
    let cluster = Cluster::shared().await?;
    let database = with_destination(cluster).await?;
    let session = cluster.connect(&database).await?;
    let broker = Broker::own().await?;
    broker.channel().await?.bind("outbox_events", "#", "all").await?;
    let _relay = Relay::start(cluster, &database, Some(&broker)).await?;
    insert(&session, 20_000, 1000).await?;
    session.until("SELECT count(*) > 100 FROM outbox_events WHERE status = 'processed'", LONG).await?;
    broker.stop(false).await?;
    session.until("SELECT state = 'open' FROM outbox.destinations", LONG).await?;
    broker.resume().await?;
    let mut queue = broker.channel().await?.consume("all").await?;
    all_arrive_in_order(&session, &mut queue).await?;
    session.until(ALL_PROCESSED, LONG).await?;
    assert_eq!(session.one::<i64>("SELECT sum(retry_count) FROM outbox_events").await?, 0);
    Ok(())
}

#[tokio::test]
async fn sigterm_gives_back_what_is_not_delivered() -> Result<()> {
    let cluster = Cluster::shared().await?;
    let database = with_destination(cluster).await?;
    let session = cluster.connect(&database).await?;
    let broker = Broker::own().await?;
    let mut queue = queue(&broker).await?;
    let relay = Relay::with(&cluster.url(&database), Some(&broker.url()), &[("OUTBOX_GRACE_PERIOD", "1")]).await?;
    relay.logged("connected to RabbitMQ", LONG).await?;
    broker.freeze();
    insert(&session, 100, 100).await?;
    session.until("SELECT count(*) = 100 FROM outbox_events WHERE status = 'processing'", LONG).await?;
    assert!(relay.terminate(LONG).await?.success());
    session.until("SELECT count(*) = 100 FROM outbox_events WHERE status = 'pending'", LONG).await?;
    broker.thaw();
    let _next = Relay::start(cluster, &database, Some(&broker)).await?;
    all_arrive_in_order(&session, &mut queue).await?;
    Ok(())
}

#[tokio::test]
async fn idle_means_no_query_and_no_transaction() -> Result<()> {
    let cluster = Cluster::start().await?;
    let database = with_destination(&cluster).await?;
    let session = cluster.connect(&database).await?;
    let broker = Broker::shared().await?;
    let mut queue = queue(&broker).await?;
    let _relay = Relay::start(&cluster, &database, Some(&broker)).await?;
    session.batch_execute("SELECT outbox.publish('first', '{}')").await?;
    queue.next(LONG).await?;
    session.until(ALL_PROCESSED, LONG).await?;
    drop(session);
    cluster.falls_silent(&database).await
}

/// What `check` or `run` prints, and its exit code, when the configuration is wrong.
fn refused(arguments: &[&str], variables: &[(&str, &str)]) -> Result<(i32, String)> {
    let mut command: Command = relay::command(None)?;
    let output = command.args(arguments).envs(variables.iter().copied()).output()?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    Ok((output.status.code().context("no exit code")?, text))
}

#[test]
fn wrong_configuration_is_one_clear_line_without_a_password() -> Result<()> {
    let good = "postgres://me:hidden-word@localhost/db";
    for (variables, said) in [
        (&[][..], "DATABASE_URL"),
        (&[("DATABASE_URL", "mysql://me:hidden-word@localhost/db")], "postgres"),
        (&[("DATABASE_URL", "postgres://me:hidden-word@localhost:port/db")], "port"),
        (&[("DATABASE_URL", good), ("AMQP_URL", "http://me:hidden-word@localhost")], "amqp"),
        (&[("DATABASE_URL", good), ("HTTP_LISTEN", "nowhere")], "HTTP_LISTEN"),
        (&[("DATABASE_URL", good), ("OUTBOX_WEBHOOK_ALLOW_NETWORKS", "10.0.0.0/99")], "10.0.0.0/99"),
        (&[("DATABASE_URL", good), ("OUTBOX_CLAIM_BATCH", "0")], "claim"),
        (&[("DATABASE_URL", good), ("OUTBOX_CONFIG", "/nowhere/relay.toml")], "/nowhere/relay.toml"),
        (&[("DATABASE_URL", "postgres://me:hidden-word@localhost/db?sslmode=perhaps")], "sslmode"),
    ] {
        for command in ["run", "check"] {
            let (code, text) = refused(&[command], variables)?;
            assert_eq!(code, 64, "{variables:?}: {text}");
            assert!(text.contains(said), "{variables:?}: {text}");
            assert!(!text.contains("hidden-word"), "{text}");
            assert!(text.trim_end().lines().count() <= 1, "{variables:?}: {text}");
        }
    }
    for arguments in
        [&[][..], &["run", good], &["deliver", good], &["run", "--database-url"], &["run", "--lease=hidden-word"]]
    {
        let (code, text) = refused(arguments, &[])?;
        assert_eq!(code, 64, "{arguments:?}: {text}");
        assert!(!text.contains("hidden-word") && text.trim_end().lines().count() == 1, "{arguments:?}: {text}");
    }
    Ok(())
}

#[tokio::test]
async fn check_tries_each_connection() -> Result<()> {
    let cluster = Cluster::shared().await?;
    let database = cluster.database().await?;
    let broker = Broker::shared().await?;
    let (url, amqp) = (cluster.url(&database), broker.url());
    let (code, text) = refused(&["check"], &[("DATABASE_URL", &url), ("AMQP_URL", &amqp)])?;
    assert_eq!(code, 0, "{text}");
    assert!(text.lines().any(|line| line.contains("PostgreSQL")), "{text}");
    assert!(text.lines().any(|line| line.contains("rabbitmq: connected")), "{text}");

    // An exchange and a queue that the relay will declare are no fault yet.
    let add = r#"SELECT outbox.add_rabbitmq('new', 'not_yet_there', settings => '{"declare": "queue"}')"#;
    cluster.connect(&database).await?.batch_execute(add).await?;
    let (code, text) = refused(&["check"], &[("DATABASE_URL", &url), ("AMQP_URL", &amqp)])?;
    assert!(code == 0 && text.contains("destination new") && !text.contains("ERROR"), "{text}");

    let empty = cluster.url(&cluster.empty_database().await?);
    let wrong_password = cluster.url_as("nobody_there", "hidden-word", &database);
    let wrong_amqp = broker.url_as("guest", "hidden-word");
    for (url, amqp) in [
        (&*empty, &*amqp),
        (&wrong_password, &amqp),
        (&url, &wrong_amqp),
        ("postgres://me:hidden-word@127.0.0.1:1/db", &amqp),
        (&url, "amqp://me:hidden-word@127.0.0.1:1"),
    ] {
        let (code, text) = refused(&["check"], &[("DATABASE_URL", url), ("AMQP_URL", amqp)])?;
        assert_ne!(code, 0, "{text}");
        assert!(!text.contains("hidden-word") && !text.contains("lapin"), "{text}");
    }
    Ok(())
}

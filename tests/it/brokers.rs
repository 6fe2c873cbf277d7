//! Several brokers: each destination has its own by name, and the trouble of one is no other's.

use anyhow::{Context, Result, ensure};
use outbox_tests::broker::Broker;
use outbox_tests::relay::{self, Relay};
use outbox_tests::wait::LONG;
use outbox_tests::world::World;

async fn add(world: &World<'_>, name: &str, broker: &str) -> Result<()> {
    world.execute(&format!(r#"SELECT outbox.add_rabbitmq('{name}', settings => '{{"broker": "{broker}"}}')"#)).await
}

async fn relay_with(world: &World<'_>, brokers: &str) -> Result<Relay> {
    Relay::with(&world.cluster.url(&world.database), Some(brokers), &[]).await
}

#[tokio::test]
async fn each_destination_has_the_broker_that_it_names() -> Result<()> {
    let world = World::new().await?;
    let (one, eu, us) = (Broker::shared().await?, Broker::shared().await?, Broker::shared().await?);
    for broker in [&one, &eu, &us] {
        broker.channel().await?.bind("outbox_events", "#", "all").await?;
    }
    world.execute("SELECT outbox.add_rabbitmq('one')").await?;
    add(&world, "eu", "eu").await?;
    add(&world, "us", "us").await?;
    let relay = relay_with(&world, &format!("{}\neu={}", one.url(), eu.url())).await?;
    let event = world.publish("1").await?;
    for broker in [&one, &eu] {
        assert_eq!(broker.channel().await?.consume("all").await?.next(LONG).await?.event_id()?, event);
    }
    // Nobody here has that broker: it is left to others, and nothing is wrong with it.
    world.until("SELECT count(*) = 1 AND bool_and(destination = 'us' AND attempts = 0) FROM outbox.deliveries").await?;
    let shown = "SELECT state || coalesce(last_error, '') FROM outbox.destinations WHERE name = 'us'";
    assert_eq!(world.session.one::<String>(shown).await?, "active");
    ensure!(!relay.log().contains(r#""destination":"us""#), "{}", relay.log());

    let _other = relay_with(&world, &format!("us={}", us.url())).await?;
    assert_eq!(us.channel().await?.consume("all").await?.next(LONG).await?.event_id()?, event);
    world.processed().await?;

    // It moves to another broker.
    add(&world, "us", "eu").await?;
    world.until("SELECT broker = 'eu' FROM outbox.destination WHERE name = 'us'").await?;
    let moved = world.publish("1").await?;
    let mut queue = eu.channel().await?.consume("all").await?;
    for _ in 0..2 {
        assert_eq!(queue.next(LONG).await?.event_id()?, moved);
    }
    world.processed().await
}

#[tokio::test]
async fn a_broker_that_is_away_holds_up_its_own_destinations_alone() -> Result<()> {
    let world = World::new().await?;
    let (well, away) = (Broker::shared().await?, Broker::own().await?);
    for broker in [&well, &away] {
        broker.channel().await?.bind("outbox_events", "#", "all").await?;
    }
    add(&world, "well", "well").await?;
    add(&world, "away", "away").await?;
    let _relay = relay_with(&world, &format!("well={} away={}", well.url(), away.url())).await?;
    world.publish("1").await?;
    world.processed().await?;

    away.stop_app().await?;
    let mut queue = well.channel().await?.consume("all").await?;
    queue.next(LONG).await?;
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(world.publish("1").await?);
        assert_eq!(queue.next(LONG).await?.event_id().ok(), held.last().copied());
    }
    world
        .until("SELECT count(*) = 3 AND bool_and(destination = 'away' AND attempts = 0) FROM outbox.deliveries")
        .await?;
    let states = "SELECT bool_and(CASE name WHEN 'away' THEN last_error LIKE '%RabbitMQ%' ELSE state = 'active' END)
                    FROM outbox.destinations";
    world.until(states).await?;

    away.start_app().await?;
    let mut queue = away.channel().await?.consume("all").await?;
    queue.next(LONG).await?;
    for event in held {
        assert_eq!(queue.next(LONG).await?.event_id()?, event);
    }
    world.processed().await
}

#[tokio::test]
async fn check_tries_each_broker() -> Result<()> {
    let world = World::new().await?;
    let broker = Broker::shared().await?;
    let gone = format!("gone=amqp://u:hidden@127.0.0.1:{}", outbox_tests::scratch::free_port()?);
    world.execute(r#"SELECT outbox.add_rabbitmq('far', settings => '{"broker": "eu"}')"#).await?;
    let mut check = relay::command(None)?;
    check.arg("check").args(["--amqp-url", &broker.url(), "--amqp-url", &gone]);
    let output = check.env("DATABASE_URL", world.cluster.url(&world.database)).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code().context("no exit code")?, 1, "{text}");
    ensure!(text.contains("ok    rabbitmq: connected"), "{text}");
    ensure!(text.contains("ok    destinations: 1, of which this relay serves 0"), "{text}");
    ensure!(
        text.contains("ok    rabbitmq eu: AMQP_URL has no such broker, its destinations are left to others"),
        "{text}"
    );
    ensure!(text.contains("FAIL  rabbitmq gone: can't connect to RabbitMQ at 127.0.0.1") && !text.contains("hidden"));
    for wrong in [r#"{"broker": "a b"}"#, r#"{"broker": 7}"#, r#"{"broker": ""}"#] {
        let sql = "SELECT outbox.add_rabbitmq('mq', settings => $1::text::jsonb)";
        let error = world.session.execute(sql, &[&wrong]).await.err().with_context(|| format!("{wrong} was taken"))?;
        assert_eq!(error.code().map(|code| code.code()), Some("22023"), "{wrong}");
    }
    Ok(())
}

#[tokio::test]
async fn a_url_that_names_both_nodes_of_a_cluster_goes_on_with_the_one_that_is_left() -> Result<()> {
    let world = World::new().await?;
    let first = Broker::own().await?;
    let second = first.joined_by_another().await?;
    let nodes = second.ctl(&["cluster_status", "--formatter", "json"]).await?;
    let nodes: serde_json::Value = serde_json::from_str(&nodes)?;
    assert_eq!(nodes["running_nodes"].as_array().map(Vec::len), Some(2), "{nodes}");
    // The queue is on the second node: it stays when the first one goes.
    let channel = second.channel().await?;
    channel.bind("outbox_events", "#", "all").await?;
    let mut queue = channel.consume("all").await?;
    world.execute("SELECT outbox.add_rabbitmq('rabbitmq')").await?;
    let url = first.url().replacen(
        &format!("127.0.0.1:{}", first.port()),
        &format!("127.0.0.1:{},127.0.0.1:{}", first.port(), second.port()),
        1,
    );
    let relay = relay_with(&world, &url).await?;
    let mut expected = Vec::new();
    for _ in 0..3 {
        expected.push(world.publish("1").await?);
    }
    world.processed().await?;
    assert_eq!(connections(&first).await?, 1, "the first host is tried first: {}", relay.log());

    first.stop(false).await?;
    for _ in 0..3 {
        expected.push(world.publish("1").await?);
    }
    world.processed().await?;
    let mut arrived: Vec<uuid::Uuid> = Vec::new();
    for _ in 0..expected.len() {
        arrived.push(queue.next(LONG).await?.event_id()?);
    }
    assert_eq!(arrived, expected);
    let attempts = "SELECT coalesce(max(retry_count), 0) FROM outbox_events";
    assert_eq!(world.session.one::<i32>(attempts).await?, 0, "an outage uses no attempt");
    Ok(())
}

/// Of clients to this node, without those that the test itself has by another.
async fn connections(broker: &Broker) -> Result<usize> {
    Ok(broker.ctl(&["eval", "length(rabbit_networking:local_connections())."]).await?.trim().parse()?)
}

//! RabbitMQ under load: what it returns is told from what it takes, and consumers can bind before there is anything.

use std::collections::HashSet;

use anyhow::{Context, Result};
use lapin::ExchangeKind;
use lapin::options::{ExchangeDeclareOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use outbox_tests::wait::{self, LONG};
use uuid::Uuid;

use crate::rabbitmq::Site;

#[tokio::test]
async fn unroutable_events_among_many_are_told_from_those_that_arrive() -> Result<()> {
    let site = Site::shared().await?;
    let channel = site.broker.channel().await?;
    channel.bind("outbox_events", "a.*", "some").await?;
    site.add("mq", r#", settings => '{"max_attempts": 1}'"#).await?;
    let _relay = site.relay().await?;
    site.session
        .batch_execute(
            "INSERT INTO outbox_events (event_type, event_data)
             SELECT CASE WHEN random() < 0.5 THEN 'a.x' ELSE 'b.x' END, '{}' FROM generate_series(1, 4000)",
        )
        .await?;
    site.until("SELECT NOT bool_or(status IN ('pending', 'processing')) FROM outbox_events").await?;
    let outcomes =
        "SELECT string_agg(DISTINCT concat_ws(' ', event_type, status, left(last_error, 11)), '; ') FROM outbox_events";
    assert_eq!(site.session.one::<String>(outcomes).await?, "a.x processed; b.x failed unroutable:");

    let routable: Vec<Uuid> =
        site.session.one("SELECT array_agg(event_id) FROM outbox_events WHERE event_type = 'a.x'").await?;
    let mut missing: HashSet<Uuid> = routable.into_iter().collect();
    let mut queue = channel.consume("some").await?;
    while !missing.is_empty() {
        let message = queue.next(LONG).await.with_context(|| format!("{} did not arrive", missing.len()))?;
        assert_eq!(message.routing_key, "a.x");
        missing.remove(&message.event_id()?);
    }
    Ok(())
}

#[tokio::test]
async fn a_consumer_can_bind_before_the_first_event() -> Result<()> {
    let site = Site::shared().await?;
    site.add("bound", ", 'own.exchange'").await?;
    site.add("ready", r#", 'ready.exchange', 'fixed', settings => '{"declare": "queue"}'"#).await?;
    let _relay = site.relay().await?;
    // A channel closes when what it asks for is not there.
    let exchange = async || {
        let passive = ExchangeDeclareOptions { passive: true, ..Default::default() };
        let channel = site.broker.channel().await?;
        channel.exchange_declare("own.exchange".into(), ExchangeKind::Topic, passive, FieldTable::default()).await?;
        Ok(Some(()))
    };
    wait::until("the exchange", LONG, exchange).await?;
    let queue = async || {
        let passive = QueueDeclareOptions { passive: true, ..Default::default() };
        site.broker.channel().await?.queue_declare("ready".into(), passive, FieldTable::default()).await?;
        Ok(Some(()))
    };
    wait::until("the queue", LONG, queue).await?;

    let channel = site.broker.channel().await?;
    channel.bind("own.exchange", "#", "all").await?;
    let event = site.publish("1").await?;
    assert_eq!(channel.consume("all").await?.next(LONG).await?.event_id()?, event);
    assert_eq!(site.broker.channel().await?.consume("ready").await?.next(LONG).await?.event_id()?, event);
    site.processed().await?;
    site.until("SELECT retry_count = 0 FROM outbox_events").await
}

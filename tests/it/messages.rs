//! Where a message goes in RabbitMQ, what it says of its event, and what has to be declared for it.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use lapin::types::FieldTable;
use outbox_tests::broker::Broker;
use outbox_tests::wait::LONG;
use serde_json::json;
use uuid::Uuid;

use crate::rabbitmq::{Site, arrive};

#[tokio::test]
async fn exchange_and_routing_key_are_templates() -> Result<()> {
    let site = Site::shared().await?;
    let channel = site.broker.channel().await?;
    let key =
        "{event_type}/{aggregate_type}/{aggregate_id}/{tenant_id}/{metadata.region}/{metadata.shard}/{metadata.none}";
    channel.bind("tenant-acme.eu", "#", "all").await?;
    site.add("mq", &format!(", 'tenant-{{tenant_id}}.{{metadata.region}}', '{key}'")).await?;
    let _relay = site.relay().await?;
    site.session
        .batch_execute(
            r#"SELECT outbox.publish('contact.created', '{}', 'contact', '42', '{"region": "eu", "shard": 7}', tenant_id => 'acme')"#,
        )
        .await?;
    let message = channel.consume("all").await?.next(LONG).await?;
    assert_eq!(message.exchange, "tenant-acme.eu");
    assert_eq!(message.routing_key, "contact.created/contact/42/acme/eu/7/");
    site.processed().await
}

#[tokio::test]
async fn a_routing_key_that_amqp_cannot_carry_is_a_dead_letter() -> Result<()> {
    let site = Site::shared().await?;
    site.add("mq", ", routing_key => '{metadata.key}'").await?;
    let _relay = site.relay().await?;
    site.session
        .batch_execute("SELECT outbox.publish('a', '{}', metadata => jsonb_build_object('key', repeat('x', 256)))")
        .await?;
    site.until("SELECT status = 'failed' AND retry_count = 1 FROM outbox_events").await?;
    site.error("routing key has 256 bytes; RabbitMQ allows 255").await
}

#[tokio::test]
async fn what_is_declared_is_up_to_the_destination() -> Result<()> {
    let site = Site::shared().await?;
    let base = r#""base": 0.1, "cap": 0.5, "max_attempts": 1000"#;
    site.add("exchange", &format!(r#", 'x-exchange', settings => '{{"declare": "exchange", {base}}}'"#)).await?;
    site.add("kind", &format!(r#", 'x-direct', settings => '{{"exchange_type": "direct", {base}}}'"#)).await?;
    site.add("queue", &format!(r#", 'x-queue', settings => '{{"declare": "queue", {base}}}'"#)).await?;
    site.add("named", r#", 'x-queue', settings => '{"declare": "queue", "queue": "work", "queue_type": "classic"}'"#)
        .await?;
    site.add("direct", r#", '', 'domain.events.{event_type}', settings => '{"declare": "queue"}'"#).await?;
    let _relay = site.relay().await?;
    let event = site.publish("1").await?;

    // Without any binding by a consumer, three of them have a queue.
    site.until("SELECT count(*) = 2 AND bool_and(attempts > 0) FROM outbox.deliveries").await?;
    for queue in ["queue", "work", "domain.events.contact.created"] {
        let message = site.broker.channel().await?.consume(queue).await?.next(LONG).await?;
        assert_eq!(message.event_id()?, event, "{queue}");
    }
    let types = site.broker.ctl(&["list_queues", "-p", &site.broker.vhost, "name", "type", "durable"]).await?;
    let types: BTreeSet<Vec<&str>> = types.lines().map(|line| line.split_whitespace().collect()).collect();
    for expected in [
        vec!["queue", "quorum", "true"],
        vec!["work", "classic", "true"],
        vec!["domain.events.contact.created", "quorum", "true"],
    ] {
        assert!(types.contains(&expected), "{expected:?} is not in {types:?}");
    }
    let exchanges = site.broker.ctl(&["list_exchanges", "-p", &site.broker.vhost, "name", "type", "durable"]).await?;
    let exchanges: BTreeSet<Vec<&str>> = exchanges.lines().map(|line| line.split_whitespace().collect()).collect();
    for expected in
        [vec!["x-exchange", "topic", "true"], vec!["x-direct", "direct", "true"], vec!["x-queue", "topic", "true"]]
    {
        assert!(exchanges.contains(&expected), "{expected:?} is not in {exchanges:?}");
    }

    // The other two wait for a consumer to bind one.
    let channel = site.broker.channel().await?;
    channel.bind("x-exchange", "#", "all").await?;
    channel.declare("direct-queue", &[]).await?;
    let bind = lapin::options::QueueBindOptions::default();
    channel
        .queue_bind("direct-queue".into(), "x-direct".into(), "contact.created".into(), bind, FieldTable::default())
        .await?;
    assert_eq!(channel.consume("all").await?.next(LONG).await?.event_id()?, event);
    assert_eq!(site.broker.channel().await?.consume("direct-queue").await?.next(LONG).await?.event_id()?, event);
    site.processed().await
}

#[tokio::test]
async fn the_default_exchange_reaches_a_queue_by_its_name() -> Result<()> {
    let site = Site::shared().await?;
    let channel = site.broker.channel().await?;
    channel.declare("domain.events.contact.created", &[]).await?;
    site.add("mq", ", '', 'domain.events.{event_type}'").await?;
    let _relay = site.relay().await?;
    let event = site.publish("1").await?;
    let message = channel.consume("domain.events.contact.created").await?.next(LONG).await?;
    assert_eq!((message.event_id()?, message.exchange.as_str()), (event, ""));
    site.processed().await
}

#[tokio::test]
async fn a_message_says_what_its_event_is() -> Result<()> {
    let site = Site::shared().await?;
    let channel = site.broker.channel().await?;
    channel.bind("outbox_events", "#", "all").await?;
    let mut queue = channel.consume("all").await?;
    site.add("mq", "").await?;
    let _relay = site.relay().await?;
    let traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let event: Uuid = site
        .session
        .query_one(
            r#"SELECT outbox.publish('contact.created', '{"name": "Ada", "amount": 12345678901234567890.10}', 'contact', '42',
                      jsonb_build_object('traceparent', $1::text, 'tracestate', 'a=b', 'private', 'x'),
                      event_version => 'v2', tenant_id => 'acme')"#,
            &[&traceparent],
        )
        .await?
        .get(0);
    let message = queue.next(LONG).await?;
    assert_eq!(message.event_id()?, event);
    assert_eq!(message.kind.as_deref(), Some("contact.created"));
    assert_eq!(message.content_type.as_deref(), Some("application/json"));
    assert_eq!(message.delivery_mode, Some(2));
    let created: i64 =
        site.session.one("SELECT extract(epoch FROM created_at)::numeric::bigint FROM outbox_events").await?;
    let timestamp = i64::try_from(message.timestamp.unwrap_or_default())?;
    assert!((created - 1..=created).contains(&timestamp), "{timestamp} is not about {created}");
    let headers: Vec<(&str, &str)> =
        message.headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    assert_eq!(
        headers,
        [
            ("aggregate_id", "42"),
            ("aggregate_type", "contact"),
            ("attempt", "1"),
            ("event_version", "v2"),
            ("private", "x"),
            ("tenant_id", "acme"),
            ("traceparent", traceparent),
            ("tracestate", "a=b"),
        ]
    );
    let data: String = site.session.one("SELECT event_data::text FROM outbox_events").await?;
    assert_eq!(String::from_utf8(message.body.clone())?, data);

    site.session.batch_execute("SELECT outbox.publish('plain', '[1, null]')").await?;
    let message = queue.next(LONG).await?;
    assert_eq!(message.headers.keys().collect::<Vec<_>>(), ["attempt", "event_version"]);
    assert_eq!(message.json()?, serde_json::json!([1, null]));
    site.processed().await
}

#[tokio::test]
async fn metadata_is_headers_and_properties() -> Result<()> {
    let site = Site::shared().await?;
    let channel = site.broker.channel().await?;
    channel.bind("outbox_events", "#", "all").await?;
    let mut queue = channel.consume("all").await?;
    site.add("mq", "").await?;
    let relay = site.relay().await?;
    site.execute(
        r#"SELECT outbox.publish('contact.created', '{}', metadata => '{"correlation_id": "c-1", "priority": 5,
                  "expiration": "600000", "reply_to": "answers", "region": "eu", "vip": true, "shard": 7, "ratio": 1.50,
                  "big": 12345678901234567890, "attempt": 99, "list": [1], "none": null}')"#,
    )
    .await?;
    let message = queue.next(LONG).await?;
    assert_eq!(message.correlation_id.as_deref(), Some("c-1"));
    assert_eq!((message.priority, message.expiration.as_deref()), (Some(5), Some("600000")));
    assert_eq!(message.reply_to.as_deref(), Some("answers"));
    let headers: Vec<(&str, &str)> =
        message.headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    assert_eq!(
        headers,
        [
            ("attempt", "1"),
            ("big", "12345678901234567890"),
            ("correlation_id", "c-1"),
            ("event_version", "v1"),
            ("expiration", "600000"),
            ("priority", "5"),
            ("ratio", "1.5"),
            ("region", "eu"),
            ("reply_to", "answers"),
            ("shard", "7"),
            ("vip", "true"),
        ]
    );

    site.add("mq", r#", settings => '{"metadata": ["reg*"]}'"#).await?;
    relay.logged(r#""message":"changed""#, LONG).await?;
    let metadata = r#"{"correlation_id": "c-2", "region": "us"}"#;
    site.session.execute("SELECT outbox.publish('a', '{}', metadata => $1::text::jsonb)", &[&metadata]).await?;
    let message = queue.next(LONG).await?;
    assert_eq!(message.correlation_id, None);
    assert_eq!(message.headers.keys().collect::<Vec<_>>(), ["attempt", "event_version", "region"]);
    site.processed().await
}

#[tokio::test]
async fn no_metadata_breaks_the_channel_of_others() -> Result<()> {
    let site = Site::shared().await?;
    let channel = site.broker.channel().await?;
    channel.bind("outbox_events", "#", "all").await?;
    let mut queue = channel.consume("all").await?;
    site.add("mq", "").await?;
    let relay = site.relay().await?;
    site.publish("1").await?;
    queue.next(LONG).await?;
    for metadata in [
        json!({"CC": "other", "BCC": "other", "x-death": "x", "x-delay": "x", "x-match": 1, "": "x"}),
        json!({"expiration": "soon", "priority": 256, "reply_to": "amq.rabbitmq.reply-to", "correlation_id": "x".repeat(256)}),
        json!({"expiration": 4_294_967_296_u64, "priority": "x", "reply_to": "x".repeat(256)}),
        json!({("x".repeat(256)): 1, ("é".repeat(127)): "ü", "control\r\n": "\u{1}\u{7f}", "deep": [[1]], "n": 1e300}),
        json!({"large": "x".repeat(1 << 20), "small": "y"}),
        json!((0..20_000).map(|n| (format!("key-{n}"), n.into())).collect::<serde_json::Map<_, _>>()),
        json!([1, "x"]),
    ] {
        let sql = "SELECT outbox.publish('contact.created', '{}', 'contact', '1', metadata => $1::text::jsonb)";
        let event: Uuid = site.session.query_one(sql, &[&metadata.to_string()]).await?.get(0);
        let message = queue.next(LONG).await?;
        assert_eq!(message.event_id()?, event);
        assert_eq!(message.headers["attempt"], "1");
        if metadata.get("large").is_some() {
            assert_eq!(message.headers["small"], "y");
        }
    }
    site.processed().await?;
    assert_eq!(site.session.one::<i32>("SELECT max(retry_count) FROM outbox_events").await?, 0);
    ensure!(!relay.log().contains("channel closed"), "{}", relay.log());
    Ok(())
}

#[tokio::test]
async fn a_message_that_is_too_large_is_a_dead_letter_and_the_others_arrive() -> Result<()> {
    let site = Site::new(Broker::with("max_message_size = 1000").await?).await?;
    let channel = site.broker.channel().await?;
    channel.bind("outbox_events", "#", "all").await?;
    site.add("mq", "").await?;
    let first = site.publish("1").await?;
    site.session
        .batch_execute("SELECT outbox.publish('contact.grown', to_jsonb(repeat('x', 2000)), 'contact', '1')")
        .await?;
    let last = site.publish("1").await?;
    let _relay = site.relay().await?;
    arrive(&mut channel.consume("all").await?, &[first, last]).await?;
    site.until("SELECT count(*) = 2 FROM outbox_events WHERE status = 'processed'").await?;
    site.until("SELECT status = 'failed' FROM outbox_events WHERE event_type = 'contact.grown'").await?;
    site.error("too large for RabbitMQ: 406 PRECONDITION_FAILED - message size").await
}

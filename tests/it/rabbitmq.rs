//! RabbitMQ: every way in which it does not take an event has its own error, none counts as success, and the event
//! arrives once the cause is gone.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use lapin::ExchangeKind;
use lapin::options::{ExchangeDeclareOptions, ExchangeDeleteOptions};
use lapin::types::FieldTable;
use outbox_tests::broker::Broker;
use outbox_tests::cluster::Cluster;
use outbox_tests::queue::Queue;
use outbox_tests::relay::Relay;
use outbox_tests::scratch;
use outbox_tests::session::Session;
use outbox_tests::tls::Authority;
use outbox_tests::wait::LONG;
use uuid::Uuid;

pub struct Site {
    pub cluster: &'static Cluster,
    pub database: String,
    pub session: Session,
    pub broker: Broker,
}

impl Site {
    pub async fn new(broker: Broker) -> Result<Self> {
        let cluster = Cluster::shared().await?;
        let database = cluster.database().await?;
        let session = cluster.connect(&database).await?;
        Ok(Site { cluster, database, session, broker })
    }

    pub async fn shared() -> Result<Self> {
        Self::new(Broker::shared().await?).await
    }

    /// Adds a destination; the arguments are those after its name.
    pub async fn add(&self, name: &str, arguments: &str) -> Result<()> {
        self.session.batch_execute(&format!("SELECT outbox.add_rabbitmq('{name}'{arguments})")).await?;
        Ok(())
    }

    pub async fn relay(&self) -> Result<Relay> {
        Relay::start(self.cluster, &self.database, Some(&self.broker)).await
    }

    async fn relay_at(&self, amqp_url: &str) -> Result<Relay> {
        Relay::with(&self.cluster.url(&self.database), Some(amqp_url), &[]).await
    }

    pub async fn publish(&self, aggregate: &str) -> Result<Uuid> {
        let sql = "SELECT outbox.publish('contact.created', '{}', 'contact', $1)";
        Ok(self.session.query_one(sql, &[&aggregate]).await?.get(0))
    }

    pub async fn until(&self, condition: &str) -> Result<()> {
        self.session.until(condition, LONG).await
    }

    /// Waits for an error that holds this text, both in the delivery and in its event, which does not count as processed.
    async fn error(&self, text: &str) -> Result<()> {
        let like = format!("'%{}%'", text.replace('\'', "''"));
        self.until(&format!("SELECT bool_or(last_error LIKE {like}) FROM outbox.deliveries")).await?;
        let statuses =
            format!("SELECT string_agg(DISTINCT status, ' ') FROM outbox_events WHERE last_error LIKE {like}");
        let statuses: Option<String> = self.session.one(&statuses).await?;
        ensure!(statuses.as_ref().is_some_and(|s| !s.contains("processed")), "{text:?} is shown for {statuses:?}");
        Ok(())
    }

    /// The same for one that says the destination is down: it uses no attempt and opens the circuit.
    async fn down(&self, text: &str) -> Result<()> {
        self.error(text).await?;
        let like = format!("'%{}%'", text.replace('\'', "''"));
        self.until(&format!(
            "SELECT bool_or(state IN ('open', 'half-open') AND last_error LIKE {like}) FROM outbox.destinations"
        ))
        .await?;
        let used = "SELECT coalesce(sum(attempts), 0)::bigint FROM outbox.deliveries";
        ensure!(self.session.one::<i64>(used).await? == 0, "attempts were used up");
        ensure!(
            self.session.one::<i32>("SELECT max(retry_count) FROM outbox_events").await? == 0,
            "retries are counted"
        );
        Ok(())
    }

    /// Everything is settled and no circuit is open.
    pub async fn processed(&self) -> Result<()> {
        self.until("SELECT bool_and(status = 'processed') FROM outbox_events").await?;
        self.until("SELECT bool_and(state = 'active') FROM outbox.destinations").await
    }
}

/// The first arrivals of these events are in this order. At-least-once: some may come again.
async fn arrive(queue: &mut Queue, events: &[Uuid]) -> Result<()> {
    let mut seen = Vec::new();
    while seen.len() < events.len() {
        let event = queue.next(LONG).await?.event_id()?;
        if !seen.contains(&event) {
            seen.push(event);
        }
    }
    assert_eq!(seen, events);
    Ok(())
}

#[tokio::test]
async fn an_unroutable_event_is_tried_again_until_a_queue_is_bound() -> Result<()> {
    let site = Site::shared().await?;
    site.add("mq", r#", settings => '{"base": 0.2, "cap": 0.2, "max_attempts": 1000}'"#).await?;
    let _relay = site.relay().await?;
    let event = site.publish("1").await?;
    site.error("unroutable: no queue is bound to exchange \"outbox_events\" for routing key \"contact.created\"")
        .await?;
    site.until("SELECT attempts >= 2 FROM outbox.deliveries").await?;
    assert_eq!(site.session.one::<String>("SELECT state FROM outbox.destinations").await?, "active");

    let channel = site.broker.channel().await?;
    channel.bind("outbox_events", "contact.*", "contacts").await?;
    let message = channel.consume("contacts").await?.next(LONG).await?;
    assert_eq!(message.event_id()?, event);
    assert!(message.headers["attempt"].parse::<i32>()? >= 3, "{:?}", message.headers);
    site.processed().await
}

#[tokio::test]
async fn an_unroutable_event_becomes_a_dead_letter_and_can_be_replayed() -> Result<()> {
    let site = Site::shared().await?;
    site.add("mq", r#", settings => '{"base": 0.01, "max_attempts": 2}'"#).await?;
    let _relay = site.relay().await?;
    let event = site.publish("1").await?;
    site.until("SELECT status = 'failed' AND retry_count = 2 FROM outbox_events").await?;
    site.error("unroutable").await?;

    let channel = site.broker.channel().await?;
    channel.bind("outbox_events", "#", "all").await?;
    assert_eq!(site.session.one::<i64>("SELECT outbox.replay_failed()").await?, 1);
    assert_eq!(channel.consume("all").await?.next(LONG).await?.event_id()?, event);
    site.processed().await
}

#[tokio::test]
async fn a_full_queue_that_rejects_is_a_nack() -> Result<()> {
    let site = Site::shared().await?;
    let channel = site.broker.channel().await?;
    channel.declare("full", &[("x-max-length", "1"), ("x-overflow", "reject-publish")]).await?;
    site.add("mq", r#", '', 'full', settings => '{"base": 0.2, "cap": 0.2, "max_attempts": 1000}'"#).await?;
    let _relay = site.relay().await?;
    let first = site.publish("1").await?;
    site.until("SELECT status = 'processed' FROM outbox_events").await?;
    let second = site.publish("1").await?;
    site.until("SELECT last_error LIKE 'nacked by RabbitMQ%\"full\"%' AND attempts >= 2 FROM outbox.deliveries")
        .await?;
    site.until(
        "SELECT last_error LIKE 'nacked%' AND status <> 'processed' FROM outbox_events ORDER BY id DESC LIMIT 1",
    )
    .await?;

    arrive(&mut channel.consume("full").await?, &[first, second]).await?;
    site.processed().await
}

#[tokio::test]
async fn a_memory_alarm_holds_events_back_and_uses_no_attempt() -> Result<()> {
    let site = Site::new(Broker::own().await?).await?;
    let channel = site.broker.channel().await?;
    channel.bind("outbox_events", "#", "all").await?;
    site.add("mq", "").await?;
    let relay = site.relay().await?;
    let before = site.publish("0").await?;
    site.processed().await?;

    site.broker.ctl(&["set_vm_memory_high_watermark", "absolute", "1"]).await?;
    // The broker tells of an alarm when something is published, and may take that one still.
    let mut events = vec![before];
    while site.session.one::<String>("SELECT state FROM outbox.destinations").await? == "active" {
        ensure!(events.len() < 10_000, "no alarm");
        events.push(site.publish("1").await?);
        site.until("SELECT bool_and(status = 'processed' OR last_error IS NOT NULL) FROM outbox_events").await?;
    }
    let blocked = site.publish("1").await?;
    events.push(blocked);
    site.until("SELECT last_error LIKE 'RabbitMQ blocks publishers: %memory%' FROM outbox.destinations").await?;
    site.until("SELECT state IN ('open', 'half-open') FROM outbox.destinations").await?;
    site.until("SELECT bool_and(attempts = 0) FROM outbox.deliveries").await?;
    site.until("SELECT bool_and(retry_count = 0) AND bool_or(status = 'pending') FROM outbox_events").await?;
    assert!(relay.terminate(LONG).await?.success());
    let _relay = site.relay().await?;

    site.broker.ctl(&["set_vm_memory_high_watermark", "0.4"]).await?;
    arrive(&mut channel.consume("all").await?, &events).await?;
    site.processed().await
}

#[tokio::test]
async fn an_exchange_of_another_type_closes_the_channel() -> Result<()> {
    let site = Site::shared().await?;
    let channel = site.broker.channel().await?;
    let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
    channel.exchange_declare("other".into(), ExchangeKind::Fanout, durable, FieldTable::default()).await?;
    site.add("mq", r#", 'other', settings => '{"base": 0.1}'"#).await?;
    let _relay = site.relay().await?;
    let event = site.publish("1").await?;
    site.down("channel closed by RabbitMQ: 406 PRECONDITION_FAILED - inequivalent arg 'type' for exchange 'other'")
        .await?;

    channel.exchange_delete("other".into(), ExchangeDeleteOptions::default()).await?;
    channel.bind("other", "#", "all").await?;
    arrive(&mut channel.consume("all").await?, &[event]).await?;
    site.processed().await
}

#[tokio::test]
async fn an_exchange_that_is_missing_closes_the_channel_when_none_is_declared() -> Result<()> {
    let site = Site::shared().await?;
    site.add("mq", r#", 'missing', settings => '{"declare": "none", "base": 0.1}'"#).await?;
    let _relay = site.relay().await?;
    let event = site.publish("1").await?;
    site.down("channel closed by RabbitMQ: 404 NOT_FOUND - no exchange 'missing'").await?;

    let channel = site.broker.channel().await?;
    channel.bind("missing", "#", "all").await?;
    arrive(&mut channel.consume("all").await?, &[event]).await?;
    site.processed().await
}

#[tokio::test]
async fn an_exchange_that_one_tenant_lacks_holds_up_no_other_tenant() -> Result<()> {
    let site = Site::shared().await?;
    let channel = site.broker.channel().await?;
    channel.bind("tenant-b", "#", "b").await?;
    let settings = r#"{"declare": "none", "base": 0.5, "cap": 0.5, "max_attempts": 1000}"#;
    site.add("mq", &format!(", 'tenant-{{tenant_id}}', settings => '{settings}'")).await?;
    site.session
        .batch_execute(
            "SELECT outbox.publish('contact.created', '{}', 'contact', (n % 20)::text, tenant_id => CASE WHEN n % 10 = 0 THEN 'a' ELSE 'b' END)
               FROM generate_series(1, 200) n",
        )
        .await?;
    let _relay = site.relay().await?;
    let mut queue = channel.consume("b").await?;
    site.until("SELECT count(*) = 180 FROM outbox_events WHERE status = 'processed'").await?;
    site.until("SELECT count(*) = 20 AND bool_and(tenant) FROM (SELECT last_error IS NULL OR last_error LIKE 'channel closed by RabbitMQ: 404 NOT_FOUND - no exchange ''tenant-a''%' AS tenant FROM outbox.deliveries) d").await?;
    queue.take(180, LONG).await?;

    let channel = site.broker.channel().await?;
    channel.bind("tenant-a", "#", "a").await?;
    channel.consume("a").await?.take(20, LONG).await?;
    site.processed().await
}

#[tokio::test]
async fn a_user_without_permission_is_told_so() -> Result<()> {
    let site = Site::shared().await?;
    let (user, vhost) = (format!("user-{}", site.broker.vhost), site.broker.vhost.clone());
    site.broker.ctl(&["add_user", &user, "secret"]).await?;
    site.broker.ctl(&["set_permissions", "-p", &vhost, &user, "", "", ""]).await?;
    let channel = site.broker.channel().await?;
    channel.bind("outbox_events", "#", "all").await?;
    site.add("mq", r#", settings => '{"declare": "none"}'"#).await?;
    let _relay = site.relay_at(&site.broker.url_as(&user, "secret")).await?;
    let event = site.publish("1").await?;
    site.down("channel closed by RabbitMQ: 403 ACCESS_REFUSED").await?;

    site.broker.ctl(&["set_permissions", "-p", &vhost, &user, "", ".*", ""]).await?;
    site.session.execute("SELECT outbox.resume('mq')", &[]).await?;
    arrive(&mut channel.consume("all").await?, &[event]).await?;
    site.processed().await?;
    site.broker.ctl(&["delete_user", &user]).await?;
    Ok(())
}

#[tokio::test]
async fn a_routing_key_that_is_not_permitted_holds_up_no_other() -> Result<()> {
    let site = Site::shared().await?;
    let (user, vhost) = (format!("topic-{}", site.broker.vhost), site.broker.vhost.clone());
    site.broker.ctl(&["add_user", &user, "secret"]).await?;
    site.broker.ctl(&["set_permissions", "-p", &vhost, &user, ".*", ".*", ".*"]).await?;
    site.broker.ctl(&["set_topic_permissions", "-p", &vhost, &user, "outbox_events", "^contact", ".*"]).await?;
    let channel = site.broker.channel().await?;
    channel.bind("outbox_events", "#", "all").await?;
    site.add("mq", r#", settings => '{"base": 0.01, "max_attempts": 3}'"#).await?;
    site.session.batch_execute("SELECT outbox.publish('order.created', '{}', 'order', '1')").await?;
    let event = site.publish("1").await?;
    let _relay = site.relay_at(&site.broker.url_as(&user, "secret")).await?;
    arrive(&mut channel.consume("all").await?, &[event]).await?;
    site.until("SELECT status = 'failed' AND retry_count = 3 FROM outbox_events WHERE event_type = 'order.created'")
        .await?;
    site.error("403 ACCESS_REFUSED - access to topic 'order.created' in exchange 'outbox_events'").await?;
    site.broker.ctl(&["delete_user", &user]).await?;
    Ok(())
}

#[tokio::test]
async fn a_refused_login_is_told_without_the_password() -> Result<()> {
    let site = Site::shared().await?;
    site.add("mq", "").await?;
    let relay = site.relay_at(&site.broker.url_as("nobody", "hunter2-password")).await?;
    site.publish("1").await?;
    site.down("ACCESS_REFUSED").await?;
    assert!(!relay.log().contains("hunter2"), "{}", relay.log());
    assert!(!relay.get("/metrics").await?.1.contains("hunter2"));
    site.until("SELECT NOT bool_or(last_error LIKE '%hunter2%') FROM outbox.destinations").await
}

#[tokio::test]
async fn nothing_is_lost_while_the_broker_is_away() -> Result<()> {
    let site = Site::new(Broker::own().await?).await?;
    site.broker.channel().await?.bind("outbox_events", "#", "all").await?;
    site.add("mq", "").await?;
    let _relay = site.relay().await?;
    let mut events = vec![site.publish("1").await?];
    site.processed().await?;

    site.broker.stop(false).await?;
    for _ in 0..20 {
        events.push(site.publish("1").await?);
    }
    site.down("can't connect to RabbitMQ at 127.0.0.1:").await?;

    site.broker.resume().await?;
    arrive(&mut site.broker.channel().await?.consume("all").await?, &events).await?;
    site.processed().await?;
    site.until("SELECT bool_and(retry_count = 0) FROM outbox_events").await
}

#[tokio::test]
async fn connections_that_are_closed_under_load_lose_nothing_and_keep_the_order() -> Result<()> {
    const EVENTS: usize = 400;
    let site = Site::new(Broker::own().await?).await?;
    site.broker.channel().await?.bind("outbox_events", "#", "all").await?;
    site.add("mq", "").await?;
    let _relay = site.relay().await?;
    let mut events = Vec::new();
    let insert = "SELECT outbox.publish('contact.created', '{}', 'contact', ($1::int % 10)::text)";
    for n in 0..EVENTS {
        events.push(site.session.query_one(insert, &[&i32::try_from(n)?]).await?.get::<_, Uuid>(0));
        match n {
            100 | 200 => {
                // What was published before has arrived or not, as it happens.
                site.broker
                    .evaluate(
                        "[rabbit_networking:close_connection(P, \"test\") || P <- rabbit_networking:connections()].",
                    )
                    .await?;
            }
            300 => {
                site.broker.stop_app().await?;
                site.broker.start_app().await?;
            }
            _ => {}
        }
    }
    let mut queue = site.broker.channel().await?.consume("all").await?;
    let mut lines: Vec<Vec<Uuid>> = vec![Vec::new(); 10];
    while lines.iter().map(Vec::len).sum::<usize>() < EVENTS {
        let message = queue.next(LONG).await?;
        let line = &mut lines[message.headers["aggregate_id"].parse::<usize>()?];
        let event = message.event_id()?;
        if !line.contains(&event) {
            line.push(event);
        }
    }
    for (n, line) in lines.iter().enumerate() {
        assert_eq!(line, &events.iter().skip(n).step_by(10).copied().collect::<Vec<_>>(), "aggregate {n}");
    }
    site.processed().await?;
    site.until("SELECT bool_and(retry_count = 0) FROM outbox_events").await
}

#[tokio::test]
async fn a_broker_that_stands_still_holds_up_nothing_for_ever() -> Result<()> {
    let site = Site::new(Broker::own().await?).await?;
    site.broker.channel().await?.bind("outbox_events", "#", "all").await?;
    let url = site.broker.url();

    // Heartbeats find out while publishing waits for its confirm.
    site.add("mq", "").await?;
    let relay = site.relay_at(&format!("{url}?heartbeat=1")).await?;
    let mut events = vec![site.publish("1").await?];
    site.processed().await?;
    site.broker.freeze();
    events.push(site.publish("1").await?);
    site.until("SELECT bool_or(last_error LIKE 'connection to RabbitMQ lost: no heartbeat') FROM outbox.deliveries")
        .await?;
    // Then new connections are opened by the kernel, and nobody speaks.
    site.until(
        "SELECT last_error LIKE 'can''t connect to RabbitMQ at %: no answer within 10 s' FROM outbox.destinations",
    )
    .await?;
    site.until("SELECT bool_and(attempts = 0) FROM outbox.deliveries").await?;
    site.broker.thaw();
    site.processed().await?;
    assert!(relay.terminate(LONG).await?.success());

    // With heartbeats far apart the wait for the confirm has an end of its own.
    site.add("mq", r#", settings => '{"timeout": 1}'"#).await?;
    let relay = site.relay_at(&format!("{url}?heartbeat=600")).await?;
    events.push(site.publish("1").await?);
    site.processed().await?;
    site.broker.freeze();
    events.push(site.publish("1").await?);
    site.until("SELECT bool_or(last_error = 'no confirm from RabbitMQ within 1 s') FROM outbox.deliveries").await?;
    site.until("SELECT bool_and(attempts = 0) FROM outbox.deliveries").await?;
    site.broker.thaw();
    site.processed().await?;

    arrive(&mut site.broker.channel().await?.consume("all").await?, &events).await?;
    assert!(relay.terminate(LONG).await?.success());
    Ok(())
}

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

#[tokio::test]
async fn amqps_trusts_a_private_authority_and_shows_a_client_certificate() -> Result<()> {
    let authority = Authority::new()?;
    let (server, client) = (authority.issue("broker")?, authority.issue("relay")?);
    let port = scratch::free_port()?;
    let broker = Broker::with(&format!(
        "listeners.ssl.1 = 127.0.0.1:{port}\nssl_options.cacertfile = {}\nssl_options.certfile = {}\n\
         ssl_options.keyfile = {}\nssl_options.verify = verify_peer\nssl_options.fail_if_no_peer_cert = true",
        authority.certificate().display(),
        server.certificate.display(),
        server.key.display(),
    ))
    .await?;
    let site = Site::new(broker).await?;
    let channel = site.broker.channel().await?;
    channel.bind("outbox_events", "#", "all").await?;
    let plain = site.broker.port();
    let url = site.broker.url().replace("amqp://", "amqps://").replace(&format!(":{plain}/"), &format!(":{port}/"));
    site.add("mq", "").await?;
    let event = site.publish("1").await?;

    let database = site.cluster.url(&site.database);
    let ca = authority.certificate();
    let ca = ("AMQP_CA_CERT", ca.to_str().unwrap_or_default());
    let relay = Relay::with(&database, Some(&url), &[]).await?;
    site.down("UnknownIssuer").await?;
    assert!(relay.terminate(LONG).await?.success());

    site.session.execute("SELECT outbox.resume('mq')", &[]).await?;
    let relay = Relay::with(&database, Some(&url), &[ca]).await?;
    site.until("SELECT last_error NOT LIKE '%UnknownIssuer%' AND state <> 'active' FROM outbox.destinations").await?;
    site.down("can't connect to RabbitMQ").await?;
    assert!(relay.terminate(LONG).await?.success());

    let certificate = ("AMQP_CLIENT_CERT", client.certificate.to_str().unwrap_or_default());
    let key = ("AMQP_CLIENT_KEY", client.key.to_str().unwrap_or_default());
    for url in [&url, &url.replace("127.0.0.1", "localhost")] {
        let relay = Relay::with(&database, Some(url), &[ca, certificate, key]).await?;
        site.session.execute("SELECT outbox.resume('mq')", &[]).await?;
        site.processed().await?;
        assert!(relay.terminate(LONG).await?.success());
        site.publish("1").await?;
    }
    assert_eq!(channel.consume("all").await?.next(LONG).await?.event_id()?, event);
    Ok(())
}

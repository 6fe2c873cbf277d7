//! RabbitMQ: every way in which it does not take an event has its own error, none counts as success, and the event
//! arrives once the cause is gone.

use std::ops::Deref;

use anyhow::{Context, Result, ensure};
use lapin::ExchangeKind;
use lapin::options::{ExchangeDeclareOptions, ExchangeDeleteOptions};
use lapin::types::FieldTable;
use outbox_tests::broker::Broker;
use outbox_tests::queue::Queue;
use outbox_tests::relay::Relay;
use outbox_tests::scratch;
use outbox_tests::tls::Authority;
use outbox_tests::wait::LONG;
use outbox_tests::world::World;
use uuid::Uuid;

/// A world with a RabbitMQ.
pub struct Site {
    pub world: World<'static>,
    pub broker: Broker,
}

impl Deref for Site {
    type Target = World<'static>;

    fn deref(&self) -> &Self::Target {
        &self.world
    }
}

impl Site {
    pub async fn new(broker: Broker) -> Result<Self> {
        Ok(Site { world: World::new().await?, broker })
    }

    pub async fn shared() -> Result<Self> {
        Self::new(Broker::shared().await?).await
    }

    /// Adds a destination; the arguments are those after its name.
    pub async fn add(&self, name: &str, arguments: &str) -> Result<()> {
        self.execute(&format!("SELECT outbox.add_rabbitmq('{name}'{arguments})")).await
    }

    pub async fn relay(&self) -> Result<Relay> {
        Relay::start(self.cluster, &self.database, Some(&self.broker)).await
    }

    pub async fn relay_at(&self, amqp_url: &str) -> Result<Relay> {
        Relay::with(&self.cluster.url(&self.database), Some(amqp_url), &[]).await
    }

    /// The same for one that says the destination is down: it uses no attempt and opens the circuit.
    pub async fn down(&self, text: &str) -> Result<()> {
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
        self.world.processed().await?;
        self.until("SELECT bool_and(state = 'active') FROM outbox.destinations").await
    }
}

/// The first arrivals of these events are in this order. At-least-once: some may come again.
pub async fn arrive(queue: &mut Queue, events: &[Uuid]) -> Result<()> {
    let mut seen = Vec::new();
    while seen.len() < events.len() {
        let next = queue.next(LONG).await;
        let event = next.with_context(|| format!("of {events:?} came {seen:?}"))?.event_id()?;
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

//! What one event or one destination does wrong, no other notices.

use std::time::Duration;

use anyhow::Result;
use outbox_tests::cluster::Cluster;
use outbox_tests::receiver::{Receiver, Reply};
use outbox_tests::relay::Relay;
use outbox_tests::wait::LONG;

use crate::rabbitmq::Site;

#[tokio::test]
async fn an_exchange_that_a_template_renders_wrongly_costs_others_nothing() -> Result<()> {
    const EVENTS: usize = 2000;
    let site = Site::shared().await?;
    let channel = site.broker.channel().await?;
    channel.bind("tenant-b", "#", "b").await?;
    let settings = r#"{"declare": "none", "base": 0.05, "cap": 0.05, "max_attempts": 20}"#;
    site.add("mq", &format!(", 'tenant-{{tenant_id}}', settings => '{settings}'")).await?;
    let _relay = site.relay().await?;
    site.session
        .batch_execute(&format!(
            "SELECT outbox.publish('contact.created', '{{}}', tenant_id => CASE WHEN n % 25 = 0 THEN 'a' ELSE 'b' END)
               FROM generate_series(1, {EVENTS}) n"
        ))
        .await?;
    let mut queue = channel.consume("b").await?;
    for message in queue.take(EVENTS * 24 / 25, LONG).await? {
        assert_eq!(message.headers["attempt"], "1");
    }
    site.until(
        "SELECT bool_and(status = CASE tenant_id WHEN 'a' THEN 'failed' ELSE 'processed' END) FROM outbox_events",
    )
    .await?;
    assert!(queue.next(Duration::from_millis(500)).await.is_err(), "nothing came twice");
    assert_eq!(site.session.one::<i32>("SELECT max(retry_count) FROM outbox_events WHERE tenant_id = 'b'").await?, 0);
    Ok(())
}

#[tokio::test]
async fn an_exchange_type_that_the_broker_does_not_know_ends_no_connection_of_others() -> Result<()> {
    let site = Site::shared().await?;
    let channel = site.broker.channel().await?;
    channel.bind("outbox_events", "#", "all").await?;
    site.add("mq", "").await?;
    site.add("odd", r#", 'odd', settings => '{"exchange_type": "x-unheard-of"}'"#).await?;
    let relay = site.relay().await?;
    let mut queue = channel.consume("all").await?;
    for n in 0..50 {
        let event = site.publish(&n.to_string()).await?;
        assert_eq!(queue.next(LONG).await?.event_id()?, event);
    }
    site.until(
        "SELECT last_error LIKE '%503%x-unheard-of%' AND state IN ('open', 'half-open') FROM outbox.destinations WHERE name = 'odd'",
    )
    .await?;
    site.until("SELECT bool_and(attempts = 0 AND destination = 'odd') FROM outbox.deliveries").await?;
    let lost = relay.events().iter().filter(|line| line["message"] == "RabbitMQ can't be used").count();
    assert_eq!(lost, 0, "{}", relay.log());
    Ok(())
}

#[tokio::test]
async fn an_idle_webhook_makes_nobody_elses_claims_smaller() -> Result<()> {
    const EVENTS: usize = 4000;
    let site = Site::shared().await?;
    let channel = site.broker.channel().await?;
    channel.bind("outbox_events", "#", "all").await?;
    site.add("mq", "").await?;
    let receiver = Receiver::start()?;
    let idle = "SELECT outbox.add_webhook('idle', $1, '{other.*}', settings => '{\"concurrency\": 1}')";
    site.session.execute(idle, &[&receiver.url("hook")]).await?;
    site.session.batch_execute("SELECT outbox.pause('idle')").await?;
    let relay = site.relay().await?;
    site.session
        .batch_execute(&format!("SELECT outbox.publish('contact.created', '{{}}') FROM generate_series(1, {EVENTS})"))
        .await?;
    channel.consume("all").await?.take(EVENTS, LONG).await?;
    site.until("SELECT bool_and(status = 'processed') FROM outbox_events").await?;
    let claims = relay.metric("outbox_relay_claims_total").await?;
    assert!(claims < 200.0, "{claims} claims for {EVENTS} events");
    Ok(())
}

#[tokio::test]
async fn big_events_under_way_do_not_make_small_ones_go_round_in_circles() -> Result<()> {
    let site = Site::shared().await?;
    let receiver = Receiver::start()?;
    receiver.reply(Reply::After(Duration::from_millis(300), Box::new(Reply::Accept)));
    let add = "SELECT outbox.add_webhook('hook', $1)";
    site.session.execute(add, &[&receiver.url("hook")]).await?;
    let relay =
        Relay::with(&site.cluster.url(&site.database), None, &[("OUTBOX_MAX_BYTES_IN_FLIGHT", "1000000")]).await?;
    site.session
        .batch_execute(
            "SELECT outbox.publish('contact.created', CASE WHEN n % 10 = 0 THEN to_jsonb(repeat('x', 700000)) ELSE '{}' END)
               FROM generate_series(1, 200) n",
        )
        .await?;
    site.until("SELECT bool_and(status = 'processed') FROM outbox_events").await?;
    assert_eq!(receiver.count(), 200);
    let released = relay.metric("outbox_relay_deliveries_released_total").await?;
    assert!(released < 1500.0, "{released} deliveries were claimed and given back");
    Ok(())
}

/// Events that only a destination wants which can't be served stand in front of another's by the ten thousand.
#[tokio::test]
async fn a_backlog_of_one_destination_hides_no_event_of_another() -> Result<()> {
    let cluster = Cluster::shared().await?;
    let session = cluster.connect(&cluster.database().await?).await?;
    session
        .batch_execute(
            "SELECT outbox.add_rabbitmq('slow', event_types => '{slow.*}');
             SELECT outbox.add_rabbitmq('fast', event_types => '{fast.*}');
             INSERT INTO outbox_events (event_type, event_data) SELECT 'slow.event', '{}' FROM generate_series(1, 50000);
             INSERT INTO outbox_events (event_type, event_data) VALUES ('fast.event', '{}')",
        )
        .await?;
    let first: Option<String> = session.one("SELECT max(event_type) FROM outbox.claim(100, '{fast}')").await?;
    assert_eq!(first.as_deref(), Some("fast.event"), "the first claim finds it");
    Ok(())
}

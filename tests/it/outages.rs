//! RabbitMQ refuses the login, is away, loses connections or stands still: nothing is lost, and the order holds.

use anyhow::Result;
use outbox_tests::broker::Broker;
use outbox_tests::wait::LONG;
use uuid::Uuid;

use crate::rabbitmq::{Site, arrive};

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
    // RabbitMQ 3.10 answers a binding before it is on disk.
    site.broker.evaluate("ok = mnesia:sync_log().").await?;

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

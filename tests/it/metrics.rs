//! /metrics: what each destination is owed and in which state it is, for as long as it is there, at any number of them.

use std::time::Duration;

use anyhow::{Result, ensure};
use outbox_tests::receiver::{Receiver, Reply};
use outbox_tests::relay::Relay;
use outbox_tests::scratch;
use outbox_tests::wait::{self, LONG};
use outbox_tests::world::World;

/// Waits until a metric has a value that will do.
async fn becomes(relay: &Relay, name: &str, will_do: impl Fn(f64) -> bool) -> Result<()> {
    let look = async || {
        let value = relay.metric(name).await?;
        ensure!(will_do(value), "{name} is {value}");
        Ok(Some(()))
    };
    wait::until(name, LONG, look).await
}

fn of(name: &str, destination: &str) -> String {
    format!("outbox_destination_{name}{{destination=\"{destination}\"}}")
}

fn state(destination: &str, state: &str) -> String {
    format!("outbox_destination_state{{destination=\"{destination}\",state=\"{state}\"}}")
}

const DELIVERABLE: &str = "outbox_events_oldest_deliverable_seconds";

#[tokio::test]
async fn what_destinations_are_owed_is_shown_until_it_is_delivered_and_they_are_removed() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    receiver.reply(Reply::Status(413));
    let port = scratch::free_port()?;
    world.add_webhook("strict", &receiver.url("strict"), "{}").await?;
    world.add_webhook("down", &format!("http://127.0.0.1:{port}/"), "{}").await?;
    world.add_webhook("still", &receiver.url("still"), "{}").await?;
    world.execute("SELECT outbox.pause('still')").await?;
    let relay = world.relay().await?;
    for aggregate in ["1", "2", "3"] {
        world.publish(aggregate).await?;
    }
    becomes(&relay, &of("dead", "strict"), |n| n == 3.0).await?;
    becomes(&relay, &of("waiting", "down"), |n| n == 3.0).await?;
    becomes(&relay, &of("waiting", "still"), |n| n == 3.0).await?;
    assert_eq!(relay.metric(&of("waiting", "strict")).await?, 0.0);
    assert_eq!(relay.metric(&of("dead", "still")).await?, 0.0);
    assert_eq!(relay.metric(&state("still", "paused")).await?, 1.0);
    assert_eq!(relay.metric(&state("still", "active")).await?, 0.0);
    assert_eq!(relay.metric(&state("strict", "active")).await?, 1.0);
    let down = relay.metric(&state("down", "open")).await? + relay.metric(&state("down", "half-open")).await?;
    ensure!(down <= 1.0 && relay.metric(&state("down", "active")).await? == 0.0);
    becomes(&relay, &of("oldest_seconds", "still"), |seconds| (2.0..60.0).contains(&seconds)).await?;
    becomes(&relay, &of("oldest_seconds", "down"), |seconds| seconds >= 2.0).await?;
    assert_eq!(relay.metric(DELIVERABLE).await?, 0.0, "it is paused, dead, or the circuit is open");
    assert_eq!(relay.metric("outbox_delivery_duration_seconds_count{destination=\"strict\"}").await?, 3.0);
    ensure!(relay.metric("process_resident_memory_bytes").await? > 1e6);
    ensure!(relay.metric("process_open_fds").await? > 3.0);

    let back = Receiver::on(port)?;
    receiver.reply(Reply::Accept);
    world.execute("SELECT outbox.resume('still'), outbox.replay_failed(destination => 'strict')").await?;
    back.wait_for(3, LONG).await?;
    world.processed().await?;
    for name in ["strict", "down", "still"] {
        for what in ["waiting", "dead", "oldest_seconds"] {
            assert_eq!(relay.metric(&of(what, name)).await?, 0.0, "{what} of {name}");
        }
        assert_eq!(relay.metric(&state(name, "active")).await?, 1.0, "{name}");
    }
    world.execute("SELECT outbox.remove_destination('down')").await?;
    relay.logged("no longer served", LONG).await?;
    let page = relay.get("/metrics").await?.1;
    ensure!(!page.contains("destination=\"down\""), "{page}");
    ensure!(page.contains("destination=\"still\""), "{page}");
    Ok(())
}

#[tokio::test]
async fn only_what_nothing_holds_back_counts_as_waiting_too_long() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    world.add_webhook("still", &receiver.url("still"), "{}").await?;
    world.execute("SELECT outbox.pause('still')").await?;
    let relay = world.relay().await?;
    world.execute("SELECT outbox.publish('later', '{}', available_at => now() + interval '1 hour')").await?;
    world.publish("1").await?;
    becomes(&relay, &of("oldest_seconds", "still"), |seconds| seconds >= 2.0).await?;
    assert_eq!(relay.metric("outbox_events_pending").await?, 2.0);
    assert_eq!(relay.metric(DELIVERABLE).await?, 0.0);

    // One that takes one event at a time and does not answer.
    receiver.reply(Reply::Never);
    world.add_webhook("slow", &receiver.url("slow"), r#"{"concurrency": 1, "timeout": "60 s"}"#).await?;
    world.execute("SELECT count(outbox.publish('slow.event', '{}')) FROM generate_series(1, 50)").await?;
    becomes(&relay, DELIVERABLE, |seconds| seconds > 1.5).await?;
    becomes(&relay, &of("waiting", "slow"), |n| (40.0..=51.0).contains(&n)).await?;
    becomes(&relay, &of("oldest_seconds", "slow"), |seconds| seconds > 1.5).await?;
    world.execute("SELECT outbox.pause('slow')").await?;
    becomes(&relay, DELIVERABLE, |seconds| seconds == 0.0).await
}

#[tokio::test]
async fn those_in_trouble_have_names_when_there_are_too_many() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    for n in 1..=5 {
        let sql = "SELECT outbox.add_webhook('w' || $1::int, $2, tenant_id => 'w' || $1)";
        world.session.execute(sql, &[&n, &receiver.url("hook")]).await?;
    }
    world.execute("SELECT outbox.pause('w4')").await?;
    let url = world.cluster.url(&world.database);
    let relay = Relay::with(&url, None, &[("OUTBOX_METRICS_DESTINATIONS", "2")]).await?;
    becomes(&relay, &state("other", "active"), |n| n == 4.0).await?;
    assert_eq!(relay.metric(&state("w4", "paused")).await?, 1.0);
    world.execute("SELECT outbox.publish('a', '{}', tenant_id => 'w3')").await?;
    receiver.wait_for(1, LONG).await?;
    becomes(&relay, &state("w3", "active"), |n| n == 1.0).await?;
    world.execute("SELECT outbox.pause('w5'), outbox.publish('a', '{}', tenant_id => 'w5')").await?;
    becomes(&relay, &of("waiting", "other"), |n| n == 1.0).await?;
    assert_eq!(relay.metric(&state("other", "paused")).await?, 1.0);
    assert_eq!(relay.metric(&state("other", "active")).await?, 2.0);
    Ok(())
}

/// A long backlog, and all of ten thousand destinations in trouble: what a scrape costs.
#[tokio::test]
async fn a_scrape_is_cheap_however_many_destinations_there_are_and_however_much_waits() -> Result<()> {
    const MANY: usize = 10_000;
    let world = World::new().await?;
    world
        .execute(&format!(
            "SELECT count(outbox.add_rabbitmq('t' || n, tenant_id => 't' || n)) FROM generate_series(1, {MANY}) AS n;
             UPDATE outbox.destination SET paused = true;
             SELECT outbox.add_rabbitmq('all');
             INSERT INTO outbox_events (event_type, event_data, tenant_id)
             SELECT 'a', '{{}}', 't' || n FROM generate_series(1, {MANY}) AS n, generate_series(1, 3)"
        ))
        .await?;
    for _ in 0..3 {
        world.execute(&format!("SELECT count(*) FROM outbox.claim({MANY})")).await?;
    }
    world.until(&format!("SELECT sum(waiting) >= 3 * {MANY} FROM outbox.tally")).await?;
    let mut fastest = Duration::MAX;
    for _ in 0..5 {
        let began = std::time::Instant::now();
        let text: String = world.session.one("SELECT outbox.metrics()::text").await?;
        fastest = fastest.min(began.elapsed());
        ensure!(text.len() < 50_000, "{} bytes", text.len());
    }
    // The machine may be busy with other tests.
    ensure!(fastest < Duration::from_millis(1500), "{fastest:?}");
    Ok(())
}

#[tokio::test]
async fn an_event_that_was_scheduled_for_ever_ago_breaks_no_figure() -> Result<()> {
    let world = World::new().await?;
    world.execute("SELECT outbox.publish('a', '{}', available_at => '-infinity')").await?;
    for figures in [
        "SELECT oldest_pending < '1 hour' FROM outbox.stats()",
        "SELECT (outbox.metrics() ->> 'deliverable_s')::float8 < 3600",
    ] {
        ensure!(world.session.one::<bool>(figures).await?, "{figures}");
    }
    Ok(())
}

//! The relay's log: a line for each change of state, and none for an event.

use std::time::Duration;

use anyhow::{Result, ensure};
use outbox_tests::receiver::{Receiver, Reply};
use outbox_tests::relay::Relay;
use outbox_tests::scratch;
use outbox_tests::wait::{self, LONG};
use outbox_tests::world::World;
use serde_json::Value;

/// The lines about one destination, as level and message.
fn about(relay: &Relay, destination: &str) -> Vec<(String, String)> {
    let text = |line: &Value, key: &str| line[key].as_str().unwrap_or_default().to_owned();
    let lines = relay.events();
    let of = lines.iter().filter(|line| line["destination"] == destination);
    of.map(|line| (text(line, "level"), text(line, "message"))).collect()
}

async fn line(relay: &Relay, destination: &str, message: &str) -> Result<Value> {
    let look = async || {
        let lines = relay.events();
        Ok(lines.into_iter().find(|line| line["destination"] == destination && line["message"] == message))
    };
    wait::until(&format!("{message:?} of {destination}"), LONG, look).await
}

#[tokio::test]
async fn a_circuit_is_told_when_it_opens_and_closes_and_nothing_is_told_of_events() -> Result<()> {
    let world = World::new().await?;
    let port = scratch::free_port()?;
    world.add_webhook("crm", &format!("http://127.0.0.1:{port}/"), "{}").await?;
    let relay = world.relay().await?;
    line(&relay, "crm", "served").await?;
    for n in 0..200 {
        world.publish(&n.to_string()).await?;
    }
    let opened = line(&relay, "crm", "circuit opened").await?;
    assert_eq!(opened["level"], "WARN");
    ensure!(opened["reason"].as_str().is_some_and(|reason| reason.contains("can't connect")), "{opened}");
    // Another reason, again and again.
    let receiver = Receiver::on(port)?;
    receiver.reply(Reply::Status(503));
    receiver.wait_for(2, LONG).await?;
    receiver.reply(Reply::Accept);
    world.processed().await?;
    let closed = line(&relay, "crm", "circuit closed: it delivers again").await?;
    assert_eq!(closed["level"], "INFO");
    let told: Vec<String> = about(&relay, "crm").into_iter().map(|(_, message)| message).collect();
    assert_eq!(told, ["served", "circuit opened", "circuit closed: it delivers again"]);
    Ok(())
}

#[tokio::test]
async fn the_first_dead_letter_is_told_at_once_and_the_others_are_counted() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    receiver.reply(Reply::Status(413));
    world.add_webhook("strict", &receiver.url("hook"), r#"{"concurrency": 1}"#).await?;
    world.add_webhook("other", &receiver.url("other"), "{}").await?;
    let relay = world.relay().await?;
    world.execute("SELECT count(outbox.publish('a', '{}')) FROM generate_series(1, 100)").await?;
    world.until("SELECT count(*) = 200 FROM outbox.deliveries WHERE status = 'failed'").await?;
    for name in ["strict", "other"] {
        let first = line(&relay, name, "a dead letter").await?;
        assert_eq!(first["level"], "WARN");
        ensure!(first["error"].as_str().is_some_and(|error| error.contains("413")), "{first}");
        let event_id = first["event_id"].as_str().unwrap_or_default();
        ensure!(
            world
                .session
                .one::<bool>(&format!("SELECT EXISTS (SELECT FROM outbox_events WHERE event_id = '{event_id}')"))
                .await?
        );
    }
    // What was counted by then is told when the session ends.
    relay.terminate(LONG).await?;
    for name in ["strict", "other"] {
        let more = line(&relay, name, "more dead letters in a minute").await?;
        assert_eq!(more["count"], 99, "{more}");
        let told = about(&relay, name).into_iter().filter(|(level, _)| level == "WARN").count();
        assert_eq!(told, 2, "{name}");
    }
    Ok(())
}

#[tokio::test]
async fn the_last_attempt_and_a_disabled_destination_are_told_by_whoever_hears_of_it() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    receiver.reply_with(|_, request| Reply::Status(if request.path.contains("gone") { 410 } else { 500 }));
    world.add_webhook("gone", &receiver.url("gone"), "{}").await?;
    world.add_webhook("weak", &receiver.url("weak"), r#"{"max_attempts": 2, "base": 0.05, "cap": 0.05}"#).await?;
    let relays = [world.relay().await?, world.relay().await?];
    world.publish("1").await?;
    for relay in &relays {
        let told = line(relay, "gone", "destination disabled").await?;
        assert_eq!(told["level"], "WARN");
        ensure!(told["reason"].as_str().is_some_and(|reason| reason.contains("410")), "{told}");
    }
    let told = async || {
        let count = relays
            .iter()
            .filter(|relay| about(relay, "weak").contains(&("WARN".into(), "a dead letter".into())))
            .count();
        Ok((count == 1).then_some(()))
    };
    wait::until("one relay to tell of the dead letter that it settled", LONG, told).await?;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(told().await?.is_some(), "the other did not settle it");
    Ok(())
}

#[tokio::test]
async fn sessions_that_begin_and_are_lost_are_told() -> Result<()> {
    let world = World::new().await?;
    let relay = world.relay().await?;
    relay.logged("\"listening\"", LONG).await?;
    let attached = "SELECT pid FROM pg_stat_activity WHERE datname = current_database()
                    AND backend_type = 'client backend' AND pid <> pg_backend_pid()";
    let pids = world.session.query(attached, &[]).await?;
    ensure!(pids.len() == 2, "{} sessions", pids.len());
    world.session.execute("SELECT pg_terminate_backend($1)", &[&pids[0].get::<_, i32>(0)]).await?;
    let lost = relay.logged("no session with PostgreSQL", LONG).await?;
    ensure!(lost.contains("WARN"), "{lost}");
    let again = async || {
        let count = relay.lines().iter().filter(|line| line.contains("\"listening\"")).count();
        Ok((count == 2).then_some(()))
    };
    wait::until("the relay to listen again", LONG, again).await
}

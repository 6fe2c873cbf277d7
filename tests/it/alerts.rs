//! The alert rules and the dashboard, tried with promtool and with a real Prometheus beside a real relay and real faults.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use outbox_tests::cluster::Cluster;
use outbox_tests::prometheus::{self, Prometheus};
use outbox_tests::receiver::{Receiver, Reply};
use outbox_tests::relay::Relay;
use outbox_tests::scratch;
use outbox_tests::wait::{self, LONG};
use outbox_tests::world::World;
use serde_json::Value;

#[test]
fn promtool_tries_each_rule_where_it_fires_and_where_it_is_silent() -> Result<()> {
    prometheus::promtool(&["check", "rules", "prometheus-alerts.yml"])?;
    prometheus::promtool(&["test", "rules", "prometheus-alerts.test.yml"])
}

/// The rules as they are, but for how long something has to last.
fn hurried_rules() -> Result<String> {
    let rules = fs::read_to_string(prometheus::ops("prometheus-alerts.yml"))?;
    let hurried = [("for: 1m", "for: 2s"), ("for: 30s", "for: 2s"), ("> 60", "> 3"), ("[5m]", "[10s]")];
    Ok(hurried.iter().fold(rules, |rules, (from, to)| {
        assert!(rules.contains(from), "no {from}");
        rules.replace(from, to)
    }))
}

/// The expressions of the rules, as far as a line holds them, and of the dashboard's panels.
fn expressions() -> Result<Vec<String>> {
    let dashboard: Value = serde_json::from_str(&fs::read_to_string(prometheus::ops("grafana-dashboard.json"))?)?;
    let panels = dashboard["panels"].as_array().context("no panels")?;
    let targets = panels.iter().filter_map(|panel| panel["targets"].as_array()).flatten();
    let found: Vec<String> = targets.filter_map(|target| target["expr"].as_str()).map(str::to_owned).collect();
    ensure!(found.len() > 20, "{} expressions", found.len());
    Ok(found)
}

/// The metrics of ours that a text names.
fn metrics(text: &str) -> BTreeSet<&str> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("outbox_") || word.starts_with("process_")).collect()
}

async fn fires(prometheus: &Prometheus, alert: &str, destination: &str) -> Result<()> {
    let look = async || {
        let firing = prometheus.firing().await?;
        ensure!(firing.iter().any(|(name, of)| name == alert && of == destination), "firing: {firing:?}");
        Ok(Some(()))
    };
    wait::until(&format!("{alert} of {destination:?} to fire"), LONG, look).await
}

async fn ends(prometheus: &Prometheus, alert: &str) -> Result<()> {
    let look = async || {
        let firing = prometheus.firing().await?;
        ensure!(firing.iter().all(|(name, _)| name != alert), "firing: {firing:?}");
        Ok(Some(()))
    };
    wait::until(&format!("{alert} to end"), LONG, look).await
}

#[tokio::test]
async fn each_alert_fires_at_its_fault_and_ends_with_it_and_a_busy_system_is_silent() -> Result<()> {
    let cluster = Cluster::with(&[("wal_level", "logical")]).await?;
    let world = World::on(&cluster).await?;
    let receiver = Receiver::start()?;
    world.add_webhook("well", &receiver.url("well"), "{}").await?;
    world.add_webhook("still", &receiver.url("still"), "{}").await?;
    world.execute("SELECT outbox.pause('still')").await?;
    let relay = world.relay().await?;
    let prometheus = Prometheus::start(relay.port(), &hurried_rules()?).await?;

    // Busy, with something scheduled and something paused.
    world.execute("SELECT outbox.publish('later', '{}', available_at => now() + interval '1 day')").await?;
    for n in 0..100 {
        world.publish(&n.to_string()).await?;
        tokio::time::sleep(Duration::from_millis(80)).await;
    }
    ensure!(!prometheus.query("outbox_destination_waiting{destination=\"still\"} > 50").await?.is_empty());
    let firing = prometheus.firing().await?;
    ensure!(firing.is_empty(), "{firing:?}");
    for expression in expressions()? {
        let expression =
            expression.replace("$job", ".*").replace("$destination", ".*").replace("$__rate_interval", "10s");
        let series = prometheus.query(&expression).await?;
        // Nothing was refused or lost so far.
        let may_be_none =
            ["open|half-open|disabled", "outcome!=\"delivered\""].iter().any(|part| expression.contains(part));
        ensure!(may_be_none || !series.is_empty(), "nothing comes of {expression}");
    }

    // Nobody is there; it is too much for another one; a third takes its time; somebody left a slot behind.
    let port = scratch::free_port()?;
    world.add_webhook("down", &format!("http://127.0.0.1:{port}/"), "{}").await?;
    let strict = Receiver::start()?;
    strict.reply(Reply::Status(413));
    world.add_webhook("strict", &strict.url("strict"), "{}").await?;
    let slow = Receiver::start()?;
    slow.reply(Reply::After(Duration::from_millis(1500), Box::new(Reply::Accept)));
    world.add_webhook("slow", &slow.url("slow"), r#"{"concurrency": 1}"#).await?;
    world.execute("SELECT pg_create_logical_replication_slot('forgotten', 'pgoutput')").await?;
    for n in 0..30 {
        world.publish(&n.to_string()).await?;
    }
    fires(&prometheus, "OutboxDestinationDown", "down").await?;
    fires(&prometheus, "OutboxDeadLetters", "strict").await?;
    fires(&prometheus, "OutboxEventsPendingTooLong", "").await?;
    fires(&prometheus, "OutboxVacuumHeldBack", "").await?;
    ensure!(!prometheus.firing().await?.iter().any(|(name, _)| name == "OutboxRelayDown"));

    // All is mended.
    let _back = Receiver::on(port)?;
    slow.reply(Reply::Accept);
    strict.reply(Reply::Accept);
    world
        .execute("SELECT outbox.resume('still'), outbox.replay_failed(), pg_drop_replication_slot('forgotten')")
        .await?;
    fires(&prometheus, "OutboxProcessingLatencyHigh", "").await?;
    for alert in [
        "OutboxDestinationDown",
        "OutboxDeadLetters",
        "OutboxEventsPendingTooLong",
        "OutboxVacuumHeldBack",
        "OutboxProcessingLatencyHigh",
    ] {
        ends(&prometheus, alert).await?;
    }
    relay.kill().await?;
    fires(&prometheus, "OutboxRelayDown", "").await?;
    let _next = restarted(&world, &relay).await?;
    ends(&prometheus, "OutboxRelayDown").await
}

/// A relay on the same port.
async fn restarted(world: &World<'_>, relay: &Relay) -> Result<Relay> {
    let listen = format!("127.0.0.1:{}", relay.port());
    let next = Relay::spawn(&world.cluster.url(&world.database), None, &[("HTTP_LISTEN", listen.as_str())])?;
    Ok(next)
}

#[tokio::test]
async fn what_the_rules_and_the_dashboard_name_is_exported() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    world.add_webhook("crm", &receiver.url("crm"), "{}").await?;
    let relay = world.relay().await?;
    world.publish("1").await?;
    world.processed().await?;
    let page = relay.get("/metrics").await?.1;
    let exported: BTreeSet<&str> =
        page.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split(['{', ' ']).next()).collect();
    let rules = fs::read_to_string(prometheus::ops("prometheus-alerts.yml"))?;
    let text = expressions()?.join("\n") + &rules;
    let named = metrics(&text);
    ensure!(named.len() > 20, "{named:?}");
    for name in named {
        // The description of an alert names a histogram as a whole.
        let whole = format!("{name}_count");
        ensure!(exported.contains(name) || exported.contains(&*whole), "{name} is not exported");
    }
    Ok(())
}

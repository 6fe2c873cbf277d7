//! The highest rate of inserts that one relay keeps up with, found by steps and then held; and who uses the CPU.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};
use outbox_tests::relay::Relay;

use crate::pgbench::Script;
use crate::process::{children, cpu};
use crate::sheet::{Must, Sheet};
use crate::stage::Stage;

const RATES: [usize; 14] = [500, 1000, 1500, 2000, 2500, 3000, 3500, 4000, 5000, 6000, 7000, 8000, 10_000, 12_000];
const CLIENTS: usize = 16;
const STEP: usize = 8;
const HOLD: usize = 60;

/// At the ends of a hold, left out of the CPU's share.
const MARGIN: Duration = Duration::from_secs(1);

/// What is left when the inserts end may be no more than comes in this part of a second.
const BACKLOG: f64 = 0.25;

const LATENCY: &str =
    "SELECT percentile_cont(0.99) WITHIN GROUP (ORDER BY extract(epoch FROM processed_at - created_at)
    ::float8 * 1000) FROM outbox_events";

pub async fn run(sheet: &mut Sheet) -> Result<()> {
    let stage = Stage::set().await?;
    let relay = stage.relay(&[]).await?;
    let mut kept = Vec::new();
    keeps_up(&stage, RATES[0], 2).await?;
    for rate in RATES {
        if !keeps_up(&stage, rate, sheet.turns(STEP)).await? {
            break;
        }
        kept.push(rate);
    }
    sheet.raw("kept for a step, events/s", &kept)?;
    let seconds = sheet.turns(HOLD).max(6);
    while let Some(rate) = kept.pop() {
        let (held, shares) = tokio::try_join!(keeps_up(&stage, rate, seconds), shares(&stage, &relay, seconds))?;
        if held {
            report(sheet, &stage, rate, seconds, &shares).await?;
            return stage.end(relay).await;
        }
    }
    anyhow::bail!("the relay does not keep up with {} events/s", RATES[0])
}

async fn report(
    sheet: &mut Sheet,
    stage: &Stage,
    rate: usize,
    seconds: usize,
    shares: &BTreeMap<&'static str, f64>,
) -> Result<()> {
    sheet.raw("CPU, % of one core", shares)?;
    sheet.figure(format!("events/s held for {seconds} s, {CLIENTS} clients"), rate as f64, "/s", Must::Nothing);
    sheet.figure("insert to processed, p99", stage.session.one(LATENCY).await?, "ms", Must::Nothing);
    for (name, share) in shares {
        sheet.figure(format!("CPU of {name}, of one core"), *share, "%", Must::Nothing);
    }
    Ok(())
}

/// Inserts at that rate into an empty outbox; whether the relay has all but a moment's worth settled when they end.
async fn keeps_up(stage: &Stage, rate: usize, seconds: usize) -> Result<bool> {
    stage.empty("outbox_events").await?;
    stage.new_queue().await?;
    let script = Script::insert(&stage.cluster, "outbox_events")?;
    let outcome = script.run(&stage.cluster, &stage.database, CLIENTS, seconds, Some(rate)).await?;
    let left: i64 = stage.session.one("SELECT pending + processing FROM outbox._counters()").await?;
    stage.settled().await?;
    stage.arrived(outcome.transactions as usize).await?;
    Ok(outcome.rate > 0.95 * rate as f64 && left as f64 <= BACKLOG * rate as f64)
}

/// Percent of one core, of processes that live from the beginning to the end.
async fn shares(stage: &Stage, relay: &Relay, seconds: usize) -> Result<BTreeMap<&'static str, f64>> {
    let worker: i32 = stage.session.one("SELECT worker_pid FROM outbox._counters()").await?;
    let broker: i32 =
        stage.broker.evaluate("os:getpid().").await?.trim_matches('"').parse().context("not a process")?;
    tokio::time::sleep(MARGIN).await;
    let postgres = children(stage.cluster.postmaster()?)?.into_iter().filter(|pid| *pid != worker);
    let named = [("worker", worker), ("relay", relay.pid()), ("RabbitMQ", broker)];
    let all: Vec<(&str, i32)> = postgres.map(|pid| ("PostgreSQL", pid)).chain(named).collect();
    let before: Vec<Option<Duration>> = all.iter().map(|(_, pid)| cpu(*pid).ok()).collect();
    let time = Duration::from_secs(seconds as u64).saturating_sub(MARGIN * 4);
    tokio::time::sleep(time).await;
    let mut shares = BTreeMap::new();
    for ((name, pid), before) in all.into_iter().zip(before) {
        let used = cpu(pid).ok().zip(before).map_or(0.0, |(after, before)| after.saturating_sub(before).as_secs_f64());
        *shares.entry(name).or_insert(0.0) += used / time.as_secs_f64() * 100.0;
    }
    Ok(shares)
}

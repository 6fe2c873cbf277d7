//! One destination of three is dead: the other two must not notice, neither when it dies nor when a million events wait
//! for it. Two outboxes side by side, alike but for the dead one.

use std::time::Duration;

use anyhow::{Context, Result};
use outbox_tests::relay::Relay;
use outbox_tests::scratch;
use outbox_tests::trace::Trace;
use outbox_tests::wait::{self, LONG};
use serde_json::json;

use crate::load::{Sent, paced, producers};
use crate::sample::{Spread, percentile, sorted};
use crate::sheet::{Must, Sheet};
use crate::stage::{Outbox, Stage};

const EVENTS: usize = 60_000;
const TURNS: usize = 3;
const WAITING: usize = 1_000_000;
const SESSIONS: usize = 16;
const RATE: usize = 500;
const SECONDS: f64 = 8.0;

pub async fn run(sheet: &mut Sheet) -> Result<()> {
    let (well, ill) = (Stage::set().await?, Stage::set().await?);
    for stage in [&well, &ill] {
        // Two destinations for what is measured, on one queue.
        for name in ["rabbitmq", "second"] {
            let add = "SELECT outbox.add_rabbitmq($1, event_types => '{bench.*}')";
            stage.session.execute(add, &[&name]).await?;
        }
    }
    let refused = format!("http://127.0.0.1:{}/", scratch::free_port()?);
    ill.session.execute("SELECT outbox.add_webhook('dead', $1)", &[&refused]).await?;
    compare(sheet, &well, &ill, "one dead").await?;
    wait_for_the_dead(&ill, sheet.count(WAITING)).await?;
    compare(sheet, &well, &ill, "a million waiting").await
}

async fn compare(sheet: &mut Sheet, well: &Stage, ill: &Stage, when: &str) -> Result<()> {
    let events = sheet.count(EVENTS);
    let (mut rates, mut latencies) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    for turn in 0..=TURNS {
        for (number, stage) in [well, ill].into_iter().enumerate() {
            let rate = rate(stage, events).await?;
            let latency = latency(stage, SECONDS * sheet.scale.min(1.0)).await?;
            if turn > 0 {
                rates[number].push(rate);
                latencies[number].push(latency);
            }
        }
    }
    sheet.raw(when, json!({ "events/s without and with": rates, "p50 and p99, ms, without and with": latencies }))?;
    let ratio = Spread::of_ratios(&rates[1], &rates[0]);
    sheet.spread(format!("{when}: events/s of the others, of none dead"), ratio, "", Must::AtLeast(0.9))?;
    for (place, name) in [(0, "p50"), (1, "p99")] {
        let [without, with] = latencies.each_ref().map(|all| all.iter().map(|both| both[place]).collect::<Vec<_>>());
        let must = if place == 0 { Must::AtMost(1.1) } else { Must::Nothing };
        let ratio = Spread::of_ratios(&with, &without);
        sheet.spread(format!("{when}: {name} of the others, of none dead"), ratio, "x", must)?;
    }
    Ok(())
}

/// Events a second until the queue has each of them twice.
async fn rate(stage: &Stage, events: usize) -> Result<f64> {
    stage.new_queue().await?;
    stage.fill(events, 200, "NULL").await?;
    stage.session.batch_execute("CHECKPOINT").await?;
    let started = std::time::Instant::now();
    let relay = stage.relay(&[]).await?;
    stage.arrived(2 * events).await?;
    let took = started.elapsed();
    stage.end(relay).await?;
    Ok(events as f64 / took.as_secs_f64())
}

/// p50 and p99 from the insert to the first confirm, in milliseconds, at a steady rate.
async fn latency(stage: &Stage, seconds: f64) -> Result<[f64; 2]> {
    stage.new_queue().await?;
    let relay = stage.relay(&[("OUTBOX_LOG_LEVEL", "info,outbox_relay::trace=debug")]).await?;
    let time = Duration::from_secs_f64(seconds.max(2.0));
    let producers = producers(stage, "outbox_events", SESSIONS).await?;
    let sent = paced(producers, &["bench.one".into()], RATE, time).await?.at_least(RATE)?.sent;
    let all = wait::until("the relay to log all confirms", LONG, async || Ok(confirmed(&relay, &sent))).await?;
    stage.end(relay).await?;
    let all = sorted(&all[all.len() / 5..]);
    let at = |percent| percentile(&all, percent).context("no event was measured");
    Ok([at(50.0)?, at(99.0)?])
}

/// The latencies, when all are known.
fn confirmed(relay: &Relay, sent: &[Sent]) -> Option<Vec<f64>> {
    let trace = Trace::of(relay).step("confirmed");
    let of = |sent: &Sent| Some((trace.get(&sent.event_id)? - sent.at) as f64 / 1000.0);
    sent.iter().map(of).collect()
}

/// Events that the dead destination alone wants, until all are where they wait.
async fn wait_for_the_dead(outbox: &Outbox, count: usize) -> Result<()> {
    let insert = format!(
        "INSERT INTO outbox_events (event_type, event_data) SELECT 'other.waits', '{{}}' FROM generate_series(1, {count})"
    );
    outbox.session.batch_execute(&insert).await?;
    loop {
        // A consumer that serves another destination parks them.
        let claim = "SELECT count(*) FROM outbox.claim(10000, '{second}')";
        outbox.session.query_one(claim, &[]).await?;
        let all = "SELECT outbox._low_water(false) > (SELECT max(id) FROM outbox_events)";
        if outbox.session.one::<bool>(all).await? {
            break;
        }
    }
    for statement in ["VACUUM ANALYZE", "CHECKPOINT"] {
        outbox.session.batch_execute(statement).await?;
    }
    Ok(())
}

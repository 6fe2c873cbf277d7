//! From sending the INSERT, which commits by itself, to RabbitMQ's confirm: single events on an idle system, and 1,000
//! events a second. The relay's own trace says when a confirm came.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use outbox_tests::relay::Relay;
use outbox_tests::trace::{Micros, Trace, now_us};
use outbox_tests::wait::{self, LONG};
use uuid::Uuid;

use crate::bare::Publisher;
use crate::load::{Producer, Run, Sent, paced, producers};
use crate::naive::{self, Naive};
use crate::sample::{Spread, percentile, percentiles, sorted};
use crate::sheet::{Must, Sheet};
use crate::stage::{Stage, payload};

const SINGLES: usize = 500;
const TURNS: usize = 3;
const SESSIONS: usize = 16;
const RATE: usize = 1000;

/// Of each turn at a rate; what was sent in the first fifth warms up.
const TURN: f64 = 10.0;

/// Of an event, as the relay logs them. Not every event is named in a notification.
const STEPS: [&str; 4] = ["notified", "claimed", "confirmed", "settled"];

/// Between single events, so that everything that follows the confirm is over.
const PAUSE: Duration = Duration::from_millis(20);

pub async fn run(sheet: &mut Sheet) -> Result<()> {
    let stage = Stage::set().await?;
    stage.create_like("bench_bare").await?;
    let naive = Naive::start(&stage).await?;
    let relay = stage.relay(&[("OUTBOX_LOG_LEVEL", "info,outbox_relay::trace=debug")]).await?;
    idle(sheet, &stage, &relay, &naive).await?;
    loaded(sheet, &stage, &relay, &naive).await?;
    naive.end().await?;
    stage.end(relay).await
}

async fn idle(sheet: &mut Sheet, stage: &Stage, relay: &Relay, naive: &Naive) -> Result<()> {
    let ours = Producer::new(stage, "outbox_events").await?;
    let theirs = Producer::new(stage, naive::TABLE).await?;
    let plain = Producer::new(stage, "bench_bare").await?;
    let publisher = Publisher::open(&stage.broker).await?;
    let body = payload(200);
    let (mut sent_ours, mut sent_theirs, mut bare) = (Vec::new(), Vec::new(), Vec::new());
    let warm_up = 20;
    for turn in 0..sheet.count(SINGLES) + warm_up {
        let event = ours.insert("bench.single").await?;
        tokio::time::sleep(PAUSE).await;
        let sent = plain.insert("bench.single").await?;
        publisher.one(&sent.event_id, body.as_bytes()).await?;
        let took = milliseconds(sent.at, now_us());
        tokio::time::sleep(PAUSE).await;
        let their_event = theirs.insert("bench.single").await?;
        tokio::time::sleep(PAUSE).await;
        if turn >= warm_up {
            sent_ours.push(event);
            bare.push(took);
            sent_theirs.push(their_event);
        }
    }
    let ours = confirmed(sheet, "idle", stage, relay, &sent_ours).await?;
    let theirs = latencies(&sent_theirs, &naive.confirmed(&ids(&sent_theirs)).await?)?;
    for (name, values) in [("idle, bare", &bare), ("idle, naive", &theirs)] {
        sheet.raw(name, percentiles(values))?;
    }
    let p50 = |values: &[f64]| percentile(&sorted(values), 50.0).context("no event was measured");
    sheet.figure("idle: commit to confirm, p50", p50(&ours)?, "ms", Must::AtMost(3.0));
    sheet.figure("idle: of bare commit and publish", p50(&ours)? / p50(&bare)?, "x", Must::AtMost(3.0));
    sheet.figure("idle: bare commit and publish, p50", p50(&bare)?, "ms", Must::Nothing);
    sheet.figure("idle: one-at-a-time outbox, of ours", p50(&theirs)? / p50(&ours)?, "x", Must::Nothing);
    Ok(())
}

async fn loaded(sheet: &mut Sheet, stage: &Stage, relay: &Relay, naive: &Naive) -> Result<()> {
    let (mut ours, mut theirs, mut ratios, mut rates) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let time = Duration::from_secs_f64((TURN * sheet.scale).max(2.0));
    let mut all = Vec::new();
    for turn in 1..=TURNS {
        let sent = at_rate(stage, "outbox_events", time).await?.at_least(RATE)?.sent;
        let sent = &sent[sent.len() / 5..];
        let mine = confirmed(sheet, &format!("1,000/s, turn {turn}"), stage, relay, sent).await?;
        let run = at_rate(stage, naive::TABLE, time).await?;
        let other = latencies(&run.sent, &naive.confirmed(&ids(&run.sent)).await?)?;
        let p99 = |values: &[f64]| percentile(&sorted(values), 99.0).context("no event was measured");
        ours.push(p99(&mine)?);
        theirs.push(p99(&other)?);
        ratios.push(p99(&other)? / p99(&mine)?);
        rates.push(run.rate);
        all.extend(mine);
    }
    sheet.raw("1,000/s", percentiles(&all))?;
    sheet.raw("1,000/s, p99 a turn", &ours)?;
    sheet.raw("1,000/s, naive, p99 a turn", &theirs)?;
    sheet.spread("1,000/s: commit to confirm, p99", Spread::of(&ours), "ms", Must::AtMost(15.0))?;
    sheet.spread("1,000/s: one-at-a-time outbox, p99 of ours", Spread::of(&ratios), "x", Must::Nothing)?;
    sheet.spread("1,000/s: inserts it lets through", Spread::of(&rates), "/s", Must::Nothing)
}

async fn at_rate(stage: &Stage, table: &str, time: Duration) -> Result<Run> {
    paced(producers(stage, table, SESSIONS).await?, &["bench.many".into()], RATE, time).await
}

/// When the relay logged each step of each event; waits until it has logged the confirms of all that were sent.
async fn trace(stage: &Stage, relay: &Relay, sent: &[Sent]) -> Result<HashMap<&'static str, HashMap<Uuid, Micros>>> {
    stage.settled().await?;
    let look = async || {
        let trace = read(relay);
        let all = sent.iter().all(|sent| trace["settled"].contains_key(&sent.event_id));
        Ok(all.then_some(trace))
    };
    wait::until("the relay to log all events", LONG, look).await
}

fn read(relay: &Relay) -> HashMap<&'static str, HashMap<Uuid, Micros>> {
    let trace = Trace::of(relay);
    STEPS.iter().map(|step| (*step, trace.step(step))).collect()
}

/// The latencies to the confirm; those of all steps go to the file.
async fn confirmed(sheet: &mut Sheet, name: &str, stage: &Stage, relay: &Relay, sent: &[Sent]) -> Result<Vec<f64>> {
    let trace = trace(stage, relay, sent).await?;
    let committed: Vec<f64> = sent.iter().map(|sent| milliseconds(sent.at, sent.committed)).collect();
    sheet.raw(format!("{name}: committed"), percentiles(&committed))?;
    for step in STEPS {
        sheet.raw(format!("{name}: {step}"), percentiles(&known_latencies(sent, &trace[step])))?;
    }
    latencies(sent, &trace["confirmed"])
}

fn ids(sent: &[Sent]) -> Vec<Uuid> {
    sent.iter().map(|sent| sent.event_id).collect()
}

/// An error unless each event is there.
fn latencies(sent: &[Sent], at: &HashMap<Uuid, Micros>) -> Result<Vec<f64>> {
    let known = known_latencies(sent, at);
    ensure!(known.len() == sent.len(), "{} of {} events were not confirmed", sent.len() - known.len(), sent.len());
    Ok(known)
}

fn known_latencies(sent: &[Sent], at: &HashMap<Uuid, Micros>) -> Vec<f64> {
    sent.iter().filter_map(|sent| Some(milliseconds(sent.at, *at.get(&sent.event_id)?))).collect()
}

fn milliseconds(from: Micros, to: Micros) -> f64 {
    (to - from) as f64 / 1000.0
}

//! A backlog is drained to a quorum queue, beside a publisher of this program that has its messages at hand.

use anyhow::Result;

use crate::bare::Publisher;
use crate::sample::Spread;
use crate::sheet::{Must, Sheet};
use crate::stage::{Stage, payload};

const EVENTS: usize = 500_000;
const TURNS: usize = 3;
const BYTES: usize = 200;
pub const IN_FLIGHT: usize = 1000;

pub async fn run(sheet: &mut Sheet) -> Result<()> {
    let stage = Stage::set().await?;
    let events = sheet.count(EVENTS);
    let (mut ours, mut bare) = (Vec::new(), Vec::new());
    warm_up(&stage).await?;
    for _ in 0..TURNS {
        ours.push(events as f64 / drain(&stage, events, "NULL").await?);
        bare.push(events as f64 / publish(&stage, events).await?);
    }
    sheet.raw("drain, events/s", &ours)?;
    sheet.raw("bare publisher, messages/s", &bare)?;
    sheet.spread("events/s, of a bare publisher", Spread::of_ratios(&ours, &bare), "", Must::AtLeast(0.6))?;
    sheet.spread("events/s", Spread::of(&ours), "", Must::Nothing)?;
    sheet.spread("bare publisher, messages/s", Spread::of(&bare), "", Must::Nothing)
}

async fn warm_up(stage: &Stage) -> Result<()> {
    drain(stage, 10_000, "NULL").await?;
    publish(stage, 10_000).await.map(drop)
}

/// Seconds from the start of a relay until that many events, which are there, are confirmed and settled.
pub async fn drain(stage: &Stage, events: usize, aggregate: &str) -> Result<f64> {
    stage.empty("outbox_events").await?;
    stage.new_queue().await?;
    stage.fill(events, BYTES, aggregate).await?;
    for statement in ["VACUUM ANALYZE outbox_events", "CHECKPOINT"] {
        stage.session.batch_execute(statement).await?;
    }
    let (took, relay) = stage.drain(events).await?;
    stage.end(relay).await?;
    Ok(took.as_secs_f64())
}

/// The same number of messages of the same size.
async fn publish(stage: &Stage, messages: usize) -> Result<f64> {
    stage.new_queue().await?;
    let publisher = Publisher::open(&stage.broker).await?;
    let took = publisher.many(messages, IN_FLIGHT, payload(BYTES).as_bytes()).await?;
    stage.arrived(messages).await?;
    Ok(took.as_secs_f64())
}

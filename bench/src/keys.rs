//! Order has a price: events of one aggregate wait for each other's confirm. With many aggregates it must not show;
//! with a single one it is one round trip to RabbitMQ an event.

use anyhow::Result;
use uuid::Uuid;

use crate::bare::Publisher;
use crate::drain::drain;
use crate::sample::{Spread, percentile, sorted};
use crate::sheet::{Must, Sheet};
use crate::stage::{Stage, payload};

const EVENTS: usize = 200_000;
const AGGREGATES: usize = 100_000;
const EVENTS_OF_ONE: usize = 10_000;
const TURNS: usize = 3;

pub async fn many(sheet: &mut Sheet) -> Result<()> {
    let stage = Stage::set().await?;
    let (events, aggregates) = (sheet.count(EVENTS), sheet.count(AGGREGATES));
    let (mut keyed, mut unordered) = (Vec::new(), Vec::new());
    drain(&stage, 10_000, "NULL").await?;
    for _ in 0..TURNS {
        keyed.push(events as f64 / drain(&stage, events, &format!("(n % {aggregates})::text")).await?);
        unordered.push(events as f64 / drain(&stage, events, "NULL").await?);
    }
    sheet.raw("events/s, with aggregates", &keyed)?;
    sheet.raw("events/s, without", &unordered)?;
    let ratio = Spread::of_ratios(&keyed, &unordered);
    sheet.spread(format!("events/s with {aggregates} aggregates, of none"), ratio, "", Must::AtLeast(0.8))
}

pub async fn one(sheet: &mut Sheet) -> Result<()> {
    let stage = Stage::set().await?;
    let events = sheet.count(EVENTS_OF_ONE);
    let publisher = Publisher::open(&stage.broker).await?;
    let (mut ours, mut bare) = (Vec::new(), Vec::new());
    for turn in 0..=TURNS {
        let each = drain(&stage, events, "'the one'").await? * 1000.0 / events as f64;
        let round_trip = round_trip(&publisher, events).await?;
        if turn > 0 {
            ours.push(each);
            bare.push(round_trip);
        }
    }
    sheet.raw("ms an event", &ours)?;
    sheet.raw("ms a round trip", &bare)?;
    sheet.spread("ms an event, of a confirm's round trip", Spread::of_ratios(&ours, &bare), "x", Must::AtMost(2.0))?;
    sheet.spread("a confirm's round trip", Spread::of(&bare), "ms", Must::Nothing)
}

/// Median milliseconds of a publish and its confirm, one after the other.
async fn round_trip(publisher: &Publisher, messages: usize) -> Result<f64> {
    let body = payload(200);
    let mut all = Vec::with_capacity(messages);
    for number in 0..messages {
        all.push(publisher.one(&Uuid::from_u128(number as u128), body.as_bytes()).await?.as_secs_f64() * 1000.0);
    }
    Ok(percentile(&sorted(&all), 50.0).unwrap_or(f64::NAN))
}

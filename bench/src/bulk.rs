//! Many events in one statement.

use std::time::Instant;

use anyhow::Result;

use crate::sample::Spread;
use crate::sheet::{Must, Sheet};
use crate::stage::{Outbox, payload_sql};

const EVENTS: usize = 1_000_000;
const TURNS: usize = 3;

pub async fn run(sheet: &mut Sheet) -> Result<()> {
    let outbox = Outbox::start(&[]).await?;
    outbox.create_like("bench_bare").await?;
    let events = sheet.count(EVENTS);
    insert(&outbox, "outbox_events", events / 20).await?;
    insert(&outbox, "bench_bare", events / 20).await?;
    let (mut ours, mut bare) = (Vec::new(), Vec::new());
    for _ in 0..TURNS {
        ours.push(insert(&outbox, "outbox_events", events).await?);
        bare.push(insert(&outbox, "bench_bare", events).await?);
    }
    sheet.raw("seconds", &ours)?;
    sheet.raw("seconds, no trigger", &bare)?;
    let ratio = Spread::of_ratios(&ours, &bare);
    sheet.spread("time of one INSERT, of no trigger", ratio, "x", Must::AtMost(1.3))?;
    sheet.spread("the same without a trigger", Spread::of(&bare), "s", Must::Nothing)
}

async fn insert(outbox: &Outbox, table: &str, count: usize) -> Result<f64> {
    outbox.empty("outbox_events, bench_bare").await?;
    let statement = format!(
        "INSERT INTO {table} (event_type, aggregate_type, aggregate_id, event_data)
         SELECT 'bench.bulk', 'bench', n::text, {} FROM generate_series(1, {count}) AS n",
        payload_sql(100)
    );
    let started = Instant::now();
    outbox.session.batch_execute(&statement).await?;
    Ok(started.elapsed().as_secs_f64())
}

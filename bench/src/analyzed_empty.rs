//! The planner has been told that the table is empty, and then events come: it must be as fast as on a table that nobody
//! analyzed.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::load::{paced, producers};
use crate::sample::Spread;
use crate::sheet::{Must, Sheet};
use crate::stage::Stage;

const TURNS: usize = 3;
const SESSIONS: usize = 16;
const RATE: usize = 1000;
const SECONDS: f64 = 10.0;

const LATENCY: &str =
    "SELECT percentile_cont(0.99) WITHIN GROUP (ORDER BY extract(epoch FROM processed_at - created_at)
    ::float8 * 1000) FROM outbox_events WHERE event_type = 'bench.many'";

pub async fn run(sheet: &mut Sheet) -> Result<()> {
    let (fresh, analyzed) = (Stage::set().await?, Stage::set().await?);
    let time = Duration::from_secs_f64((SECONDS * sheet.scale).max(2.0));
    let (mut before, mut after) = (Vec::new(), Vec::new());
    for turn in 0..=TURNS {
        let one = p99(&fresh, "TRUNCATE outbox_events, outbox.delivery", time).await?;
        let empty = "TRUNCATE outbox_events, outbox.delivery; ANALYZE";
        let other = p99(&analyzed, empty, time).await?;
        // The first turn fills caches.
        if turn > 0 {
            before.push(one);
            after.push(other);
        }
    }
    sheet.raw("p99, ms, fresh", &before)?;
    sheet.raw("p99, ms, analyzed while empty", &after)?;
    let ratio = Spread::of_ratios(&after, &before);
    sheet.spread("insert to processed at 1,000/s, p99, of a fresh table", ratio, "x", Must::AtMost(1.5))
}

/// Of the events of a run that begins with this statement and a relay.
async fn p99(stage: &Stage, prepare: &str, time: Duration) -> Result<f64> {
    stage.session.batch_execute(prepare).await?;
    stage.new_queue().await?;
    let relay = stage.relay(&[]).await?;
    paced(producers(stage, "outbox_events", SESSIONS).await?, &["bench.many".into()], RATE, time).await?;
    stage.settled().await?;
    let p99 = stage.session.one::<Option<f64>>(LATENCY).await?.context("no event was measured")?;
    stage.end(relay).await?;
    Ok(p99)
}

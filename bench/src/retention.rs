//! Events come as fast as they can and go as soon as they are processed, beside an outbox that keeps them; the table must not
//! grow.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use outbox_tests::wait::LONG;
use serde_json::json;

use crate::pgbench::Script;
use crate::sample::Spread;
use crate::sheet::{Must, Sheet};
use crate::stage::Stage;

const CLIENTS: usize = 16;
const SECONDS: usize = 20;
const TURNS: usize = 4;
/// How long a processed event stays. Retention removes as many a second as come, so long after they came.
const KEPT: &str = "2s";

pub async fn run(sheet: &mut Sheet) -> Result<()> {
    let keeps = Stage::with(&[("outbox.retention", "-1")]).await?;
    let removes = Stage::with(&[("outbox.retention", KEPT)]).await?;
    let seconds = sheet.turns(SECONDS).max(4);
    let (mut kept, mut removed, mut sizes) = (Vec::new(), Vec::new(), Vec::new());
    for turn in 0..=TURNS {
        keeps.empty("outbox_events").await?;
        let of_one = rate(&keeps, seconds).await?;
        let of_other = rate(&removes, seconds).await?;
        let size = "SELECT pg_total_relation_size('outbox_events')::float8 / 1024 ^ 2";
        let size: f64 = removes.session.one(size).await?;
        // The first turn fills caches, and brings the table to its size.
        if turn > 0 {
            kept.push(of_one);
            removed.push(of_other);
            sizes.push(size);
        }
        removes.session.until("SELECT count(*) = 0 FROM outbox_events", LONG).await?;
    }
    sheet.raw("events/s", json!({ "kept": kept, "removed": removed }))?;
    sheet.raw("MiB after each turn", &sizes)?;
    let ratio = Spread::of_ratios(&removed, &kept);
    sheet.spread("events/s with retention, of those kept", ratio, "", Must::AtLeast(0.9))?;
    let (first, last) = (sizes.first().context("no turn")?, sizes.last().context("no turn")?);
    sheet.figure("the table after the last turn, of the first", last / first, "x", Must::AtMost(1.2));
    sheet.figure("the table after the last turn", *last, "MiB", Must::Nothing);
    Ok(())
}

/// Events a second, inserted as fast as they can be, until all of them are processed.
async fn rate(stage: &Stage, seconds: usize) -> Result<f64> {
    stage.new_queue().await?;
    let relay = stage.relay(&[]).await?;
    let script = Script::insert(&stage.cluster, "outbox_events")?;
    let started = Instant::now();
    let outcome = script.run(&stage.cluster, &stage.database, CLIENTS, seconds, None).await?;
    stage.settled().await?;
    let took = started.elapsed();
    ensure!(took > Duration::from_secs(1) && outcome.transactions > 0, "nothing was inserted");
    stage.arrived(outcome.transactions as usize).await?;
    stage.end(relay).await?;
    Ok(outcome.transactions as f64 / took.as_secs_f64())
}

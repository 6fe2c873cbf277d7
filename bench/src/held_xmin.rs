//! A session holds a snapshot open while events come and go, so that nothing can be vacuumed: a claim and an event must
//! take as long at the end as at the start.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use outbox_tests::session::Session;
use serde_json::json;

use crate::pgbench::Script;
use crate::sheet::{Must, Sheet};
use crate::stage::Stage;

const RATE: usize = 2000;
const CLIENTS: usize = 16;
const SECONDS: usize = 300;

/// The start and the end are this part of the whole; as much before the start warms up.
const PART: f64 = 0.1;

const CLAIMS: &str = "SELECT sum(s.calls)::float8, sum(s.total_exec_time)::float8, sum(s.rows)::float8
    FROM pg_stat_statements s JOIN pg_database d ON d.oid = s.dbid
    WHERE d.datname = $1 AND s.query LIKE '%outbox.claim_for(%'";
const LATENCY: &str =
    "SELECT percentile_cont(0.99) WITHIN GROUP (ORDER BY extract(epoch FROM processed_at - created_at)
    ::float8 * 1000) FROM outbox_events
    WHERE created_at BETWEEN to_timestamp($1::float8) AND to_timestamp($2::float8)";

/// What the relay's claims were in a part of the run, and when that was, in seconds since 1970.
struct Part {
    from: f64,
    to: f64,
    claim_ms: f64,
    events_a_claim: f64,
}

pub async fn run(sheet: &mut Sheet) -> Result<()> {
    let stage = Stage::set().await?;
    let relay = stage.relay(&[]).await?;
    let watcher = stage.cluster.connect("postgres").await?;
    watcher.batch_execute("CREATE EXTENSION IF NOT EXISTS pg_stat_statements").await?;
    let seconds = sheet.count(SECONDS).max(10);
    let script = Script::insert(&stage.cluster, "outbox_events")?;
    let inserts = script.run(&stage.cluster, &stage.database, CLIENTS, seconds, Some(RATE));
    let (outcome, (start, end)) = tokio::try_join!(inserts, watch(&stage, &watcher, seconds))?;
    ensure!(outcome.rate > 0.9 * RATE as f64, "{:.0} inserts/s instead of {RATE}", outcome.rate);
    stage.settled().await?;
    let p99 = async |part: &Part| -> Result<f64> {
        let row = stage.session.query_one(LATENCY, &[&part.from, &part.to]).await?;
        row.try_get::<_, Option<f64>>(0)?.context("no event in this part of the run")
    };
    let (first, last) = (p99(&start).await?, p99(&end).await?);
    for (name, part, p99) in [("start", &start, first), ("end", &end, last)] {
        let raw = json!({ "claim_ms": part.claim_ms, "events_a_claim": part.events_a_claim, "p99_ms": p99 });
        sheet.raw(name, raw)?;
    }
    let what = format!("claim after {seconds} s, of the start");
    sheet.figure(what, end.claim_ms / start.claim_ms, "x", Must::AtMost(1.2));
    sheet.figure("insert to processed, p99, of the start", last / first, "x", Must::AtMost(1.2));
    sheet.figure("insert to processed, p99, at the start", first, "ms", Must::Nothing);
    stage.end(relay).await
}

/// Warms up, opens a snapshot, and looks at the claims for a while then and at the end.
async fn watch(stage: &Stage, watcher: &Session, seconds: usize) -> Result<(Part, Part)> {
    let part = Duration::from_secs_f64(seconds as f64 * PART);
    tokio::time::sleep(part).await;
    let holder = stage.cluster.connect(&stage.database).await?;
    holder.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT FROM outbox_events LIMIT 1").await?;
    let start = measure(stage, watcher, part).await?;
    // Nothing but time makes it old.
    tokio::time::sleep(Duration::from_secs_f64(seconds as f64 * (1.0 - 3.5 * PART))).await;
    let end = measure(stage, watcher, part).await?;
    holder.batch_execute("COMMIT").await?;
    Ok((start, end))
}

async fn measure(stage: &Stage, watcher: &Session, time: Duration) -> Result<Part> {
    let before = claims(stage, watcher).await?;
    tokio::time::sleep(time).await;
    let after = claims(stage, watcher).await?;
    let [calls, milliseconds, events] = [0, 1, 2].map(|i| after.1[i] - before.1[i]);
    ensure!(calls > 0.0, "no claim in {time:?}");
    Ok(Part { from: before.0, to: after.0, claim_ms: milliseconds / calls, events_a_claim: events / calls })
}

/// The time, and of all claims so far: calls, milliseconds, events.
async fn claims(stage: &Stage, watcher: &Session) -> Result<(f64, [f64; 3])> {
    let now: f64 = watcher.one("SELECT extract(epoch FROM clock_timestamp())::float8").await?;
    let row = watcher.query_one(CLAIMS, &[&stage.database]).await?;
    let value = |i: usize| row.try_get::<_, Option<f64>>(i).map(Option::unwrap_or_default);
    Ok((now, [value(0)?, value(1)?, value(2)?]))
}

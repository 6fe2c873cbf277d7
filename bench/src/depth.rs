//! The number of rows must not matter: claim, ack and stats() on small and large outboxes side by side, of pending and of
//! processed events.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use outbox_tests::cluster::Cluster;
use outbox_tests::session::Session;
use serde_json::json;

use crate::sample::{percentile, percentiles, sorted};
use crate::sheet::{Must, Sheet};

const TURNS: usize = 60;
const WARM_UP: usize = 5;
const BATCH: i32 = 100;
const FEW: usize = 10_000;
const OUTBOXES: [(&str, usize, usize); 5] = [
    ("10 thousand pending", FEW, 0),
    ("1 million pending", 1_000_000, 0),
    ("10 million pending", 10_000_000, 0),
    ("1 million processed", FEW, 1_000_000),
    ("10 million processed", FEW, 10_000_000),
];

const PROCESSED: &str = "INSERT INTO outbox_events (event_type, event_data, status, processed_at)
    SELECT 'bench.deep', '{\"n\": 1}', 'processed', now() FROM generate_series(1, ";
const PENDING: &str = "INSERT INTO outbox_events (event_type, event_data)
    SELECT 'bench.deep', '{\"n\": 1}' FROM generate_series(1, ";

/// An outbox of some depth, and how long each call took there, in milliseconds.
struct Deep {
    name: &'static str,
    session: Session,
    calls: [Vec<f64>; 3],
}

const CALLS: [&str; 3] = ["claim", "ack", "stats()"];

pub async fn run(sheet: &mut Sheet) -> Result<()> {
    let cluster = Cluster::with(&[("fsync", "on"), ("max_wal_size", "8GB")]).await?;
    let mut all = Vec::new();
    for (name, pending, processed) in OUTBOXES {
        let large = |count: usize| if count > FEW { sheet.count(count).max(FEW) } else { count };
        let started = Instant::now();
        let session = fill(&cluster, large(pending), large(processed)).await?;
        sheet.say(format!("{name}: filled in {:.0} s", started.elapsed().as_secs_f64()));
        all.push(Deep { name, session, calls: Default::default() });
    }
    cluster.connect("postgres").await?.batch_execute("CHECKPOINT").await?;
    for turn in 0..TURNS + WARM_UP {
        for deep in &mut all {
            let times = measure(&deep.session).await?;
            if turn >= WARM_UP {
                deep.calls.iter_mut().zip(times).for_each(|(call, time)| call.push(time.as_secs_f64() * 1000.0));
            }
        }
    }
    report(sheet, &all)
}

async fn fill(cluster: &Cluster, pending: usize, processed: usize) -> Result<Session> {
    let database = cluster.database().await?;
    let session = cluster.connect(&database).await?;
    // The comparison is of depth alone.
    session.batch_execute("ALTER TABLE outbox_events SET (autovacuum_enabled = off)").await?;
    for (insert, count) in [(PROCESSED, processed), (PENDING, pending)] {
        session.batch_execute(&format!("{insert}{count})")).await?;
    }
    session.batch_execute("VACUUM ANALYZE outbox_events").await?;
    Ok(session)
}

/// One of each call, without the commit.
async fn measure(session: &Session) -> Result<[Duration; 3]> {
    session.batch_execute("BEGIN").await?;
    let started = Instant::now();
    let row = session.query_one("SELECT count(*), max(claim_token) FROM outbox.claim($1)", &[&BATCH]).await?;
    let claim = started.elapsed();
    session.batch_execute("COMMIT; BEGIN").await?;
    let (count, token): (i64, Option<i64>) = (row.try_get(0)?, row.try_get(1)?);
    ensure!(count == i64::from(BATCH), "claimed {count} events instead of {BATCH}");
    let started = Instant::now();
    session.query_one("SELECT outbox.ack($1)", &[&token]).await?;
    let ack = started.elapsed();
    session.batch_execute("COMMIT").await?;
    let started = Instant::now();
    session.query_one("SELECT pending, oldest_pending::text FROM outbox.stats()", &[]).await?;
    Ok([claim, ack, started.elapsed()])
}

fn report(sheet: &mut Sheet, all: &[Deep]) -> Result<()> {
    let median = |values: &[f64]| percentile(&sorted(values), 50.0).unwrap_or(f64::NAN);
    for deep in all {
        let calls: Vec<_> =
            CALLS.iter().zip(&deep.calls).map(|(call, times)| json!([call, percentiles(times)])).collect();
        sheet.raw(deep.name, calls)?;
    }
    for (number, call) in CALLS.iter().enumerate() {
        let of = |deep: &Deep| median(&deep.calls[number]);
        sheet.figure(format!("{call}: {}", all[0].name), of(&all[0]), "ms", Must::Nothing);
        for deep in &all[1..] {
            let ratio = of(deep) / of(&all[0]);
            sheet.figure(format!("{call}: {}, of that", deep.name), ratio, "x", Must::AtMost(1.2));
        }
        if *call == "stats()" {
            let slowest = all.iter().map(of).fold(0.0, f64::max);
            sheet.figure("stats(): the slowest median", slowest, "ms", Must::AtMost(1.0));
        }
    }
    Ok(())
}

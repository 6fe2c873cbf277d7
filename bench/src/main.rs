//! The benchmark: what an outbox costs, each figure beside a baseline that is measured in the same run, turn by turn.
//!
//! A row is a file below. `sheet` collects figures and prints the table; `stage` holds the servers, `pgbench` and `load`
//! make the inserts, `bare` publishes without an outbox, `naive` is the outbox that most people write first.

mod analyzed_empty;
mod bare;
mod build;
mod bulk;
mod commit_tax;
mod depth;
mod destinations;
mod drain;
mod held_xmin;
mod idle;
mod isolation;
mod keys;
mod latency;
mod load;
mod memory;
mod naive;
mod pgbench;
mod process;
mod retention;
mod sample;
mod sheet;
mod stage;
mod steady;
mod takeover;
mod webhooks;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use crate::sheet::Sheet;

/// In the order in which they run.
const ROWS: [(&str, &str); 17] = [
    ("commit-tax", "commits/s of the application, of those without a trigger"),
    ("latency", "commit to confirm, idle and at 1,000 events/s"),
    ("drain", "a backlog of 500,000 to a quorum queue, of a bare publisher"),
    ("many-keys", "the same with 100,000 aggregates, of drain"),
    ("one-key", "a single aggregate, of one confirm's round trip an event"),
    ("memory", "the relay's memory while it drains a million events of 1 kB"),
    ("bulk", "a million events in one INSERT, of the same without a trigger"),
    ("takeover", "a relay that holds 1,000 events is killed"),
    ("isolation", "two destinations beside a dead one, for which a million events wait"),
    ("idle", "60 s of nothing: queries, transactions, CPU"),
    ("webhooks", "50 webhooks that take 20 ms each, 500 events/s"),
    ("destinations", "10,000 webhooks, each of a tenant of its own, of 10"),
    ("steady", "the highest rate that one relay keeps up with, and its CPU"),
    ("retention", "events removed as fast as they come, of events that are kept"),
    ("analyzed-empty", "1,000 events/s after ANALYZE of the empty table"),
    ("held-xmin", "2,000 events/s while a snapshot is held open"),
    ("depth", "claim, ack and stats() with 10 thousand to 10 million rows"),
];

const HELP: &str = "\
Usage: bench [ROW ...]          make bench [ONLY=\"ROW ...\"]

Without a row, all of them run, in 50 minutes. Ratios are medians of turns (A B A B ...),
with the least and the greatest in brackets. Raw figures go to target/bench/<row>.json.
A row fails if another build is installed meanwhile; its file says which one it was.
The exit code is 1 if a row could not be measured; a target that is missed is only shown.

BENCH_SCALE=0.1   a factor on times and counts, for a quick look; targets hold at 1

Rows:";

#[tokio::main]
async fn main() -> ExitCode {
    match bench(std::env::args().skip(1).collect()).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// False if a row failed.
async fn bench(arguments: Vec<String>) -> Result<bool> {
    if arguments.iter().any(|argument| argument == "--help" || argument == "-h") {
        println!("{HELP}");
        ROWS.iter().for_each(|(name, what)| println!("  {name:<13} {what}"));
        return Ok(true);
    }
    for argument in &arguments {
        ensure!(ROWS.iter().any(|(name, _)| name == argument), "no row {argument:?}; --help lists them");
    }
    let mut sheet = Sheet::new(scale()?)?;
    for (name, what) in ROWS.iter().filter(|(name, _)| arguments.is_empty() || arguments.iter().any(|a| a == name)) {
        sheet.open(name, what)?;
        let started = Instant::now();
        let outcome = run(name, &mut sheet).await;
        sheet.close(outcome, started.elapsed())?;
    }
    sheet.print();
    Ok(sheet.complete())
}

async fn run(name: &str, sheet: &mut Sheet) -> Result<()> {
    match name {
        "commit-tax" => commit_tax::run(sheet).await,
        "latency" => latency::run(sheet).await,
        "drain" => drain::run(sheet).await,
        "many-keys" => keys::many(sheet).await,
        "one-key" => keys::one(sheet).await,
        "memory" => memory::run(sheet).await,
        "bulk" => bulk::run(sheet).await,
        "takeover" => takeover::run(sheet).await,
        "isolation" => isolation::run(sheet).await,
        "idle" => idle::run(sheet).await,
        "webhooks" => webhooks::run(sheet).await,
        "destinations" => destinations::run(sheet).await,
        "steady" => steady::run(sheet).await,
        "retention" => retention::run(sheet).await,
        "analyzed-empty" => analyzed_empty::run(sheet).await,
        "held-xmin" => held_xmin::run(sheet).await,
        "depth" => depth::run(sheet).await,
        _ => bail!("no row {name:?}"),
    }
}

fn scale() -> Result<f64> {
    let scale = match std::env::var("BENCH_SCALE") {
        Ok(text) => text.parse().with_context(|| format!("BENCH_SCALE is a number, not {text:?}"))?,
        Err(_) => 1.0,
    };
    ensure!(scale > 0.0 && scale <= 10.0, "BENCH_SCALE is from 0 to 10");
    Ok(scale)
}

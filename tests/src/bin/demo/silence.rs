//! An idle system: PostgreSQL's own count of what its worker and the relay ask of it.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use outbox_tests::postgres::Installation;
use outbox_tests::session::Session;
use outbox_tests::wait;

use crate::show::{heading, say};
use crate::stage::Stage;

const IDLE: Duration = Duration::from_secs(5);

/// Sessions report their transactions up to 10 s late.
const SETTLED: Duration = Duration::from_secs(11);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Count {
    transactions: i64,
    queries: Option<i64>,
}

pub async fn play(stage: &Stage) -> Result<()> {
    heading("6. Silence");
    // From another database, so that this program's own queries don't count.
    let session = stage.cluster.connect("postgres").await?;
    if Installation::get()?.has_library("pg_stat_statements") {
        session.batch_execute("CREATE EXTENSION IF NOT EXISTS pg_stat_statements").await?;
    }
    say("waiting for PostgreSQL's statistics, which come up to 10 s late ...");
    unchanged_for(&session, &stage.database, SETTLED).await?;
    let before = count(&session, &stage.database).await?;
    // Nothing to wait for: the point is that nothing happens.
    tokio::time::sleep(IDLE).await;
    let after = count(&session, &stage.database).await?;
    let queries = match (before.queries, after.queries) {
        (Some(before), Some(after)) => format!("{} queries (pg_stat_statements), ", after - before),
        _ => String::new(),
    };
    let transactions = after.transactions - before.transactions;
    say(&format!("{} s with worker and relay attached: {queries}{transactions} transactions.", IDLE.as_secs()));
    ensure!(before == after, "an idle system asked something of PostgreSQL");
    Ok(())
}

async fn count(session: &Session, database: &str) -> Result<Count> {
    let transactions = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = $1";
    let queries = "SELECT coalesce(sum(calls), 0)::bigint FROM pg_stat_statements s
        JOIN pg_database d ON d.oid = s.dbid WHERE d.datname = $1";
    Ok(Count {
        transactions: session.query_one(transactions, &[&database]).await?.try_get(0)?,
        queries: match Installation::get()?.has_library("pg_stat_statements") {
            true => Some(session.query_one(queries, &[&database]).await?.try_get(0)?),
            false => None,
        },
    })
}

/// Waits until the count has stood still for that long.
async fn unchanged_for(session: &Session, database: &str, time: Duration) -> Result<()> {
    let last = std::sync::Mutex::new((count(session, database).await?, Instant::now()));
    let look = async || {
        let now = count(session, database).await?;
        let mut last = last.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if last.0 != now {
            *last = (now, Instant::now());
        }
        Ok((last.1.elapsed() >= time).then_some(()))
    };
    wait::until("the statistics to settle", time * 6, look).await
}

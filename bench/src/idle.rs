//! Nothing happens: what PostgreSQL and the kernel count meanwhile of worker, launcher, relay and its sessions.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};
use outbox_tests::session::Session;
use outbox_tests::wait;

use crate::process::cpu;
use crate::sheet::{Must, Sheet};
use crate::stage::Stage;

const SECONDS: usize = 60;

/// Sessions report their transactions up to 10 s late.
const SETTLED: Duration = Duration::from_secs(11);

const COUNT: &str = "SELECT d.xact_commit + d.xact_rollback,
        coalesce((SELECT sum(s.calls) FROM pg_stat_statements s WHERE s.dbid = d.datid), 0)::bigint
    FROM pg_stat_database d WHERE d.datname = $1";
const PROCESSES: &str =
    "SELECT pid, CASE WHEN backend_type = 'client backend' THEN 'session ' || pid ELSE backend_type END
    FROM pg_stat_activity WHERE backend_type ILIKE '%outbox%' OR (datname = $1 AND application_name ILIKE '%outbox%')";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Count {
    transactions: i64,
    queries: i64,
}

pub async fn run(sheet: &mut Sheet) -> Result<()> {
    // Autovacuum looks into every database once a minute, with transactions that are counted there.
    let stage = Stage::with(&[("autovacuum", "off")]).await?;
    let relay = stage.relay(&[]).await?;
    stage.fill(1000, 200, "NULL").await?;
    stage.settled().await?;
    // From another database, so that this program's own queries don't count.
    let session = stage.cluster.connect("postgres").await?;
    session.batch_execute("CREATE EXTENSION IF NOT EXISTS pg_stat_statements").await?;
    let mut processes = processes(&session, &stage.database).await?;
    processes.insert("relay".into(), relay.pid());
    quiet(&session, &stage.database).await?;
    let (count_before, cpu_before) = (count(&session, &stage.database).await?, times(&processes)?);
    let seconds = sheet.turns(SECONDS);
    // Nothing to wait for: the point is that nothing happens.
    tokio::time::sleep(Duration::from_secs(seconds as u64)).await;
    let cpu_after = times(&processes)?;
    // What happened at the end may be reported only now.
    tokio::time::sleep(SETTLED).await;
    let count_after = count(&session, &stage.database).await?;
    let shares: BTreeMap<&String, f64> = cpu_after
        .iter()
        .map(|(name, time)| (name, (*time - cpu_before[name]).as_secs_f64() / seconds as f64 * 100.0))
        .collect();
    sheet.raw("CPU, %", &shares)?;
    let queries = count_after.queries - count_before.queries;
    let transactions = count_after.transactions - count_before.transactions;
    sheet.figure(format!("{seconds} s: queries"), queries as f64, "", Must::AtMost(0.0));
    sheet.figure(format!("{seconds} s: transactions"), transactions as f64, "", Must::AtMost(0.0));
    let what = format!("{seconds} s: CPU of {} processes", processes.len());
    sheet.figure(what, shares.values().sum(), "%", Must::AtMost(0.05));
    stage.end(relay).await
}

async fn count(session: &Session, database: &str) -> Result<Count> {
    let row = session.query_one(COUNT, &[&database]).await?;
    Ok(Count { transactions: row.try_get(0)?, queries: row.try_get(1)? })
}

/// Worker, launcher and the relay's sessions.
async fn processes(session: &Session, database: &str) -> Result<BTreeMap<String, i32>> {
    let rows = session.query(PROCESSES, &[&database]).await?;
    rows.iter().map(|row| Ok((row.try_get(1)?, row.try_get(0)?))).collect()
}

fn times(processes: &BTreeMap<String, i32>) -> Result<BTreeMap<String, Duration>> {
    processes.iter().map(|(name, pid)| Ok((name.clone(), cpu(*pid).with_context(|| name.clone())?))).collect()
}

/// Waits until what came before has been reported.
async fn quiet(session: &Session, database: &str) -> Result<()> {
    let look = async || {
        let before = count(session, database).await?;
        tokio::time::sleep(SETTLED).await;
        Ok((before == count(session, database).await?).then_some(()))
    };
    wait::until("the statistics to settle", SETTLED * 6, look).await
}

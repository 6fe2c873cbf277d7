//! After the storm: everything settles within a minute, and the server's own figures are right.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use outbox_tests::session::Session;
use outbox_tests::wait;
use uuid::Uuid;

use crate::judge::{Rule, judge};
use crate::record::Fate;
use crate::stage::Stage;

/// How long all that is owed may take after the last fault.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Resident memory that is a process's own, in KiB.
const WORKER_MEMORY: u64 = 64 * 1024;
const RELAY_MEMORY: u64 = 256 * 1024;

/// Waits until nothing is outstanding, then until the record says so as well. Returns how long that took.
pub async fn settled(stage: &Stage, limit: Duration) -> Result<Duration> {
    let begin = Instant::now();
    let session = stage.session().await?;
    let settled = "SELECT pending + processing = 0 AND worker_state = 'idle' FROM outbox.stats()";
    if let Err(error) = session.until(settled, limit).await {
        bail!("{error:#}\n{}", outstanding(&session).await?);
    }
    let took = begin.elapsed();
    fates(stage, &session).await?;
    dead_letters(stage, &session).await?;
    // What the broker has taken may still be on its way to the consumer.
    let arrived = async || {
        let record = stage.record.lock().clone();
        let lost =
            judge(&record).iter().filter(|violation| matches!(violation.rule, Rule::Lost | Rule::Untold)).count();
        Ok((lost == 0).then_some(()))
    };
    if wait::until("all arrivals", Duration::from_secs(10), arrived).await.is_err() {
        crate::show::say("not all has arrived");
    }
    Ok(took)
}

/// What is left, for somebody who has to find out why.
async fn outstanding(session: &Session) -> Result<String> {
    let query = "SELECT concat_ws(' ', 'stats', s) FROM outbox.stats() s
        UNION ALL SELECT concat_ws(' ', 'events', status, listed, routed, available_at, claim_token, min(id), max(id), count(*)) FROM outbox_events WHERE status IN ('pending', 'processing') GROUP BY status, listed, routed, available_at, claim_token
        UNION ALL SELECT concat_ws(' ', 'deliveries', destination, status, min(next_attempt_at), count(*), count(*) FILTER (WHERE next_attempt_at IS NULL), min(last_error)) FROM outbox.delivery WHERE status <> 'failed' GROUP BY destination, status
        UNION ALL SELECT concat_ws(' ', 'claim', c) FROM outbox.claims c
        UNION ALL SELECT concat_ws(' ', 'destination', name, state, circuit_failures, circuit_open_until, last_error) FROM outbox.destinations
        UNION ALL SELECT concat_ws(' ', 'ready', name, next_due, ready_at) FROM outbox.destination
        UNION ALL SELECT concat_ws(' ', 'touched', t) FROM outbox.touched t UNION ALL SELECT concat_ws(' ', 'postponed', p) FROM outbox.postponed p
        UNION ALL SELECT concat_ws(' ', 'health', check_name, detail) FROM outbox.health() WHERE NOT ok
        UNION ALL SELECT concat_ws(' ', 'session', pid, application_name, state, wait_event_type, wait_event, left(query, 80)) FROM pg_stat_activity WHERE datname = current_database()";
    let rows = session.query(query, &[]).await?;
    Ok(rows.iter().take(80).map(|row| row.get::<_, String>(0)).collect::<Vec<_>>().join("\n"))
}

/// The application's own table knows what became of a transaction whose session never heard it, and must agree with those
/// that did.
async fn fates(stage: &Stage, session: &Session) -> Result<()> {
    let rows = session.query("SELECT transaction FROM ledger", &[]).await?;
    let committed: std::collections::HashSet<i64> = rows.iter().map(|row| row.get(0)).collect();
    let mut record = stage.record.lock();
    let mut wrong = Vec::new();
    for (number, transaction) in &mut record.transactions {
        let there = committed.contains(&(*number as i64));
        match transaction.fate {
            Fate::Committed if there => {}
            Fate::RolledBack if !there => {}
            Fate::Unknown if there => transaction.fate = Fate::Committed,
            Fate::Unknown => transaction.fate = Fate::RolledBack,
            fate => wrong.push(format!("transaction {number} was {fate:?}, and in the ledger: {there}")),
        }
    }
    record.complaints.extend(wrong);
    Ok(())
}

async fn dead_letters(stage: &Stage, session: &Session) -> Result<()> {
    let rows =
        session.query("SELECT destination, event_id FROM outbox.deliveries WHERE status = 'failed'", &[]).await?;
    let mut record = stage.record.lock();
    for row in rows {
        let (name, event): (String, Uuid) = (row.get(0), row.get(1));
        let life = record
            .destinations
            .iter()
            .find(|(life, wanted)| **life == name || !wanted.removed && life.split('/').next() == Some(name.as_str()));
        let name = life.map_or(name.clone(), |(life, _)| life.clone());
        record.dead.insert((name, event));
    }
    Ok(())
}

/// What the server says of itself, and what there is.
pub async fn figures(stage: &Stage) -> Result<()> {
    let session = stage.session().await?;
    // Retention would change them under way.
    session.batch_execute("ALTER SYSTEM SET outbox.retention = -1").await?;
    session.batch_execute("SELECT pg_reload_conf()").await?;
    let counted = "SELECT s.pending = count(*) FILTER (WHERE status = 'pending') AND s.processing = count(*) FILTER (WHERE status = 'processing')
           AND s.processed = count(*) FILTER (WHERE status = 'processed') AND s.failed = count(*) FILTER (WHERE status = 'failed')
      FROM outbox.stats() s LEFT JOIN outbox_events ON true GROUP BY s.pending, s.processing, s.processed, s.failed";
    if session.until(counted, Duration::from_secs(5)).await.is_err() {
        let found = "SELECT (SELECT concat_ws(' ', pending, processing, processed, failed) FROM outbox.stats()) || ', in the table '
            || (SELECT string_agg(status || ' ' || n, ', ') FROM (SELECT status, count(*) AS n FROM outbox_events GROUP BY status) x)";
        bail!("stats() is wrong: {}", session.one::<String>(found).await?);
    }
    for left in [
        "outbox.claims",
        "outbox.touched",
        "outbox.postponed",
        "outbox.contradiction",
        "outbox.delivery WHERE status <> 'failed'",
    ] {
        let none = format!("SELECT count(*) = 0 FROM {left}");
        session.until(&none, Duration::from_secs(10)).await.with_context(|| format!("something is left in {left}"))?;
    }
    let late = "SELECT count(*) FROM outbox.delivery d JOIN outbox.destination t ON t.name = d.destination
        WHERE d.status = 'pending' AND d.next_attempt_at IS NOT NULL AND (t.next_due IS NULL OR t.next_due > d.next_attempt_at)";
    ensure!(session.one::<i64>(late).await? == 0, "deliveries are due before their destination's next_due");
    let unwell = "SELECT string_agg(concat_ws(': ', check_name, detail), '; ') FROM outbox.health()
        WHERE NOT ok AND check_name NOT IN ('dead_letters', 'destinations')";
    let unwell: Option<String> = session.one(unwell).await?;
    ensure!(unwell.is_none(), "health() finds something wrong: {unwell:?}");
    memory(stage, &session).await
}

async fn memory(stage: &Stage, session: &Session) -> Result<()> {
    let worker: i32 = session.one("SELECT worker_pid FROM outbox.stats()").await?;
    let used = own_memory(worker)?;
    ensure!(used < WORKER_MEMORY, "the worker has {used} KiB of its own");
    let mut all = vec![format!("worker {used}")];
    for (number, relay) in stage.relays.iter().enumerate() {
        let relay = relay.lock().await;
        let pid = relay.as_ref().context("no relay")?.pid();
        let used = own_memory(pid)?;
        ensure!(used < RELAY_MEMORY, "relay {number} has {used} KiB of its own");
        all.push(format!("relay {number} {used}"));
    }
    crate::show::say(&format!("memory of their own in KiB: {}", all.join(", ")));
    Ok(())
}

fn own_memory(pid: i32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).with_context(|| format!("process {pid}"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("no RssAnon")?;
    Ok(line.trim().trim_end_matches(" kB").trim().parse()?)
}

/// Processed events go with their retention and dead letters are purged; then the tables are small again.
pub async fn emptied(stage: &Stage) -> Result<()> {
    let session = stage.session().await?;
    session.batch_execute("SELECT outbox.purge_failed()").await?;
    session.batch_execute("ALTER SYSTEM SET outbox.retention = 0").await?;
    session.batch_execute("SELECT pg_reload_conf()").await?;
    session.until("SELECT NOT EXISTS (SELECT FROM outbox_events)", LIMIT).await.context("retention")?;
    session.until("SELECT pending + processing + processed + failed = 0 FROM outbox.stats()", LIMIT).await?;
    let mut sizes = Vec::new();
    for table in [
        "outbox_events",
        "outbox.delivery",
        "outbox.claims",
        "outbox.touched",
        "outbox.postponed",
        "outbox.destination",
    ] {
        session.batch_execute(&format!("VACUUM {table}")).await?;
        let size: i64 = session.one(&format!("SELECT pg_relation_size('{table}')")).await?;
        // An empty table's pages go, except where a session looked at just that moment.
        ensure!(size <= 4 << 20, "{table} has {size} bytes when it is empty");
        sizes.push(format!("{table} {size}"));
    }
    crate::show::say(&format!("sizes in bytes: {}", sizes.join(", ")));
    session.batch_execute("ALTER SYSTEM RESET outbox.retention").await?;
    session.batch_execute("SELECT pg_reload_conf(); TRUNCATE ledger").await?;
    Ok(())
}

//! The functions that `sql/15_library.sql` declares. They note, or they read shared memory.

use crate::backend;
use crate::commit::note;
use crate::counters::middle;
use crate::marks::BEFORE_ALL;
use crate::note::Found;
use crate::recount::{Seen, with_epoch};
use crate::session;
use crate::shmem::{self, NEVER, State};
use crate::status::ByStatus;
use crate::status::Status::*;
use ed25519_compact::{KeyPair, Seed};
use pgrx::datum::TimestampWithTimeZone;
use pgrx::prelude::*;
use std::sync::atomic::Ordering::*;

fn micros(at: TimestampWithTimeZone) -> i64 {
    at.into_inner()
}

fn timestamp(micros: i64) -> Option<TimestampWithTimeZone> {
    TimestampWithTimeZone::try_from(micros).ok()
}

#[pg_extern]
fn preloaded() -> bool {
    shmem::try_get().is_some()
}

#[pg_extern]
fn library_version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

#[pg_extern]
fn boot() -> i64 {
    shmem::get().boot.load(Relaxed)
}

/// The low-water mark, with what commits have lowered it to. A claim takes that over (under the lock that all claims take):
/// lowering the mark needs no commit, it only makes the next walk longer.
#[pg_extern]
fn low_water(take_over: bool) -> i64 {
    let Some(database) = shmem::current() else { return BEFORE_ALL };
    if !take_over {
        return database.marks.lowest();
    }
    let (low_water, lowered) = database.marks.take_over();
    note(|n| n.claims.taken_lowered = n.claims.taken_lowered.min(lowered));
    low_water
}

#[pg_extern]
fn is_recovered() -> bool {
    shmem::current().is_some_and(|d| d.recovered.load(SeqCst))
}

#[pg_extern]
fn high_water() -> Option<i64> {
    shmem::current().filter(|d| d.recovered.load(SeqCst)).map(|d| d.marks.high_water())
}

/// A snapshot taken before a lowered mark was taken over may miss the rows that lowered it: then the mark stays.
#[pg_extern]
fn set_water(low_water: i64, high_water: i64) {
    let kept = if backend::has_one_snapshot() {
        shmem::current().map_or(BEFORE_ALL, |d| d.marks.low_water())
    } else {
        low_water
    };
    note(|n| n.claims.water = Some((kept, high_water)));
}

#[pg_extern]
fn last_token() -> i64 {
    shmem::current().map_or(0, |d| d.last_token.load(SeqCst))
}

#[pg_extern]
fn note_token(token: i64) {
    if let Some(database) = shmem::current() {
        database.last_token.fetch_max(token, SeqCst);
    }
}

#[pg_extern]
fn wake_at(at: Option<TimestampWithTimeZone>) {
    if let Some(at) = at {
        note(|n| n.rows.due_at(micros(at)));
    }
}

#[pg_extern]
fn open_claims(delta: i32, lease_until: Option<TimestampWithTimeZone>) {
    note(|n| {
        n.claims.open += i64::from(delta);
        n.claims.lease_end = n.claims.lease_end.min(lease_until.map_or(NEVER, micros));
    });
}

#[pg_extern]
fn wake(reason: &str) {
    note(|n| match reason {
        "released" => n.rows.wake_released = true,
        _ => n.rows.wake_due = true,
    });
}

#[pg_extern]
fn waiting(waiting: bool) {
    note(|n| n.claims.waiting = Some(waiting));
}

#[pg_extern]
fn is_waiting() -> bool {
    shmem::current().is_some_and(|d| d.waiting.load(SeqCst))
}

#[pg_extern]
fn commit_to_disk() {
    // SAFETY: sets a variable that lasts to the end of the transaction.
    unsafe { pg_sys::ForceSyncCommit() }
}

#[pg_extern]
fn count_unrouted(n: i64) {
    note(|note| note.rows.unrouted += n);
}

#[pg_extern]
fn recovered(
    low_water: i64,
    high_water: i64,
    pending: i64,
    processing: i64,
    processed: i64,
    failed: i64,
    open_claims: i64,
) {
    let by_status = ByStatus::of(|status| match status {
        Pending => pending,
        Processing => processing,
        Processed => processed,
        Failed => failed,
    });
    note(|n| n.control.found = Some(Found { low_water, high_water, by_status, open_claims }));
}

/// From now on, until the query with `_count_from_here()`, a snapshot is being chosen.
#[pg_extern]
fn count_begin() {
    if let Some(database) = shmem::current() {
        database.recount.begin();
    }
}

/// A condition of the query that counts. False: a transaction committed while its snapshot was chosen, count again.
#[pg_extern]
fn count_from_here(in_any_case: bool) -> bool {
    shmem::current().is_none_or(|database| {
        database.recount.chosen(&database.counters.by_status, seen);
        in_any_case || !database.recount.is_spoiled()
    })
}

/// Which transactions the running query sees.
fn seen() -> Seen {
    // SAFETY: a query that runs has a snapshot, which lists `xcnt` transactions.
    unsafe {
        let snapshot = &*pg_sys::GetActiveSnapshot();
        let next = pg_sys::ReadNextFullTransactionId().value;
        let running = match snapshot.xcnt {
            0 => &[],
            n => std::slice::from_raw_parts(snapshot.xip, n as usize),
        };
        Seen {
            first_running: with_epoch(snapshot.xmin.into_inner(), next),
            next: with_epoch(snapshot.xmax.into_inner(), next),
            running: running.iter().map(|xid| xid.into_inner()).collect(),
        }
    }
}

/// Seconds from when each event that this transaction settled could be delivered to when it was, to within a fifth.
#[pg_extern]
fn latencies() -> Vec<f64> {
    let mut seconds = Vec::new();
    note(|n| seconds = n.rows.latencies.iter().map(|bucket| middle(usize::from(*bucket))).collect());
    seconds
}

#[pg_extern]
fn launch() {
    note(|n| n.control.launch = true);
}

#[pg_extern]
fn attach(consumer: Option<&str>) {
    session::attach(consumer.unwrap_or(""));
}

#[pg_extern]
fn detach() -> bool {
    session::detach()
}

#[pg_extern]
fn attachment() -> Option<i64> {
    session::mine()
}

#[pg_extern]
fn attachments() -> TableIterator<
    'static,
    (
        name!(attachment, i64),
        name!(pid, i32),
        name!(consumer, String),
        name!(attached_at, Option<TimestampWithTimeZone>),
    ),
> {
    TableIterator::new(session::attached().into_iter().map(|a| (a.id, a.pid, a.name, timestamp(a.at))))
}

#[pg_extern]
#[allow(clippy::type_complexity, reason = "one column a counter")]
fn counters() -> TableIterator<
    'static,
    (
        name!(pending, i64),
        name!(processing, i64),
        name!(processed, i64),
        name!(failed, i64),
        name!(total_published, i64),
        name!(total_processed, i64),
        name!(total_failed, i64),
        name!(total_unrouted, i64),
        name!(total_notifications, i64),
        name!(latency_p50_s, Option<f64>),
        name!(latency_p95_s, Option<f64>),
        name!(latency_p99_s, Option<f64>),
        name!(worker_pid, Option<i32>),
        name!(worker_state, String),
        name!(recovered, bool),
        name!(since, Option<TimestampWithTimeZone>),
        name!(waiting_ids, i32),
    ),
> {
    let row = shmem::current().map(|d| {
        let c = &d.counters;
        let count = |status| c.by_status[status].load(Relaxed).max(0);
        (
            count(Pending),
            count(Processing),
            count(Processed),
            count(Failed),
            c.published.load(Relaxed),
            c.processed.load(Relaxed),
            c.failed.load(Relaxed),
            c.unrouted.load(Relaxed),
            c.notifications.load(Relaxed),
            c.latency_percentile(0.5),
            c.latency_percentile(0.95),
            c.latency_percentile(0.99),
            Some(d.worker_pid.load(Relaxed)).filter(|pid| *pid != 0),
            worker_state(d).to_owned(),
            d.recovered.load(Relaxed),
            timestamp(d.since.load(Relaxed)),
            d.news.waiting() as i32,
        )
    });
    TableIterator::new(row)
}

fn worker_state(database: &shmem::Database) -> &'static str {
    match database.state() {
        State::Idle => "stopped",
        State::Starting => "starting",
        State::Running if !database.recovered.load(Relaxed) => "recovering",
        State::Running if database.timers.alarm.is_set() => "idle",
        State::Running => "active",
    }
}

/// The public key of an Ed25519 key pair (RFC 8032), from the 32 bytes of its private key; none from anything else.
#[pg_extern]
fn ed25519_public_key(private_key: &[u8]) -> Option<Vec<u8>> {
    let seed = <[u8; 32]>::try_from(private_key).ok().filter(|seed| *seed != [0; 32])?;
    Some(KeyPair::from_seed(Seed::new(seed)).pk.to_vec())
}

/// Tells PostgreSQL how [`outbox_raw_size`] is called.
#[unsafe(no_mangle)]
pub extern "C" fn pg_finfo_outbox_raw_size() -> &'static pg_sys::Pg_finfo_record {
    static V1: pg_sys::Pg_finfo_record = pg_sys::Pg_finfo_record { api_version: 1 };
    &V1
}

/// The bytes of a value of varying length when nothing is compressed; the value itself is not fetched.
///
/// # Safety
/// Called by PostgreSQL, strict, with one argument of such a type.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn outbox_raw_size(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    // SAFETY: a strict function of one argument always has it, as PostgreSQL stores it: in the row, compressed or outside.
    let size = unsafe { pg_sys::toast_raw_datum_size((*fcinfo).args.as_slice(1)[0].value) };
    pg_sys::Datum::from(size as i64)
}

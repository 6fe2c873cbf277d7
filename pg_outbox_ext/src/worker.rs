//! The worker of a database: the one process that notifies.
//!
//! It sleeps until its latch is set or the next thing is due. An ERROR in anything it calls ends it; the launcher starts
//! it again, and what it had not announced is announced by its recovery.
//!
//! ```text
//!   start ──> extension here? ──no──> end (absent)
//!               │ yes
//!            recover, announce "startup"
//!               │
//!     ┌──> ended sessions, due things, new events ──> notify ──┐
//!     └───────────────── armed, asleep <───────────────────────┘
//! ```

use crate::pack::{self, Described};
use crate::shmem::{self, Database, NEVER, State};
use crate::{guc, roles, session, wake};
use pgrx::bgworkers::{BackgroundWorker, SignalWakeFlags};
use pgrx::datum::{DatumWithOid, TimestampWithTimeZone};
use pgrx::prelude::*;
use pgrx::spi::OwnedPreparedStatement;
use std::ffi::CString;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, Ordering::*};

/// Under load at most one transaction of notifications in this time (microseconds): longer with more events in the last,
/// which then share its price. The first after a pause goes at once.
fn gather(events: usize) -> i64 {
    match events {
        0..8 => 2000,
        8..32 => 4000,
        _ => 8000,
    }
}

/// Ids described in one transaction.
const BATCH: usize = 2048;

unsafe extern "C-unwind" {
    /// PostgreSQL's handler of SIGTERM (tcop/tcopprot.h), without pgrx's wrapper.
    fn die(signal: i32);
    /// Queues a notification for the commit of this transaction (commands/async.h).
    fn Async_Notify(channel: *const std::ffi::c_char, payload: *const std::ffi::c_char);
}

/// Entry point. The argument is the database's oid.
#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn pg_outbox_worker_main(argument: pg_sys::Datum) {
    let oid = pg_sys::Oid::from(argument.value() as u32);
    let Some(database) = shmem::find(oid) else { return };
    handle_signals();
    if !take_place(database) {
        return;
    }
    if database.stop.load(SeqCst) {
        return;
    }
    BackgroundWorker::connect_worker_to_spi_by_oid(Some(oid), None);
    if !extension_is_here() {
        database.absent.store(true, SeqCst);
        return;
    }
    Worker { database, gather_until: 0, unreported: false, describe: None }.run();
}

/// SIGTERM was sent.
static TERMINATED: AtomicBool = AtomicBool::new(false);
/// A transaction is running.
static BUSY: AtomicBool = AtomicBool::new(false);

fn handle_signals() {
    // SAFETY: the handler does what PostgreSQL's own handlers do.
    unsafe {
        #[cfg(not(feature = "pg18"))]
        pg_sys::pqsignal(pg_sys::SIGTERM as i32, Some(terminated));
        #[cfg(feature = "pg18")]
        pg_sys::pqsignal_be(pg_sys::SIGTERM as i32, Some(terminated));
    }
    BackgroundWorker::attach_signal_handlers(SignalWakeFlags::SIGHUP);
}

/// Ends the worker in peace when it has nothing to do, else as PostgreSQL ends a session: in the middle of a query, or of
/// waiting for a lock.
unsafe extern "C-unwind" fn terminated(signal: i32) {
    TERMINATED.store(true, SeqCst);
    // SAFETY: both may be called by a signal handler.
    unsafe {
        if BUSY.load(SeqCst) {
            die(signal);
        } else {
            pg_sys::SetLatch(pg_sys::MyLatch);
        }
    }
}

/// From here on others can wake this worker, and see that it ended. False: the place is another's.
fn take_place(database: &'static Database) -> bool {
    // SAFETY: a plain read; the callback lives in this library, which is never unloaded.
    unsafe {
        if database.worker_pid.compare_exchange(0, pg_sys::MyProcPid, SeqCst, SeqCst).is_err() {
            return false;
        }
        pg_sys::on_shmem_exit(Some(leave_place), pg_sys::Datum::from(std::ptr::from_ref(database) as usize));
    }
    database.worker_latch.store(wake::own(), SeqCst);
    true
}

unsafe extern "C-unwind" fn leave_place(_code: i32, database: pg_sys::Datum) {
    // SAFETY: the address of a place in shared memory, given by `take_place`.
    let database = unsafe { &*(database.value() as *const Database) };
    database.armed.store(false, SeqCst);
    database.worker_latch.store(std::ptr::null_mut(), SeqCst);
    if TERMINATED.load(SeqCst) {
        // Somebody ended it: that is no failure, after which the launcher would wait longer each time.
        database.stop.store(true, SeqCst);
    }
    database.worker_pid.store(0, SeqCst);
    database.set_state(State::Idle);
    if let Some(shared) = shmem::try_get() {
        wake::launcher(shared);
    }
}

/// Work as outbox_owner, to the end of the commit: triggers on the application's table may be anybody's.
fn transaction<R>(what: &std::ffi::CStr, body: impl FnOnce() -> R) -> R {
    let result = transaction_of_superuser(what, || {
        roles::be_owner();
        body()
    });
    roles::be_oneself();
    result
}

/// A transaction of its own that is visible in pg_stat_activity.
fn transaction_of_superuser<R>(what: &std::ffi::CStr, body: impl FnOnce() -> R) -> R {
    BUSY.store(true, SeqCst);
    // SAFETY: plain calls of PostgreSQL's statistics functions, and of what a SIGTERM that came earlier would have called.
    unsafe {
        pg_sys::pgstat_report_activity(pg_sys::BackendState::STATE_RUNNING, what.as_ptr());
        if TERMINATED.load(SeqCst) {
            die(pg_sys::SIGTERM as i32);
        }
    }
    // An ERROR ends the worker: nobody sees state that it left half changed.
    let result = BackgroundWorker::transaction(AssertUnwindSafe(body));
    // SAFETY: as above.
    unsafe { pg_sys::pgstat_report_activity(pg_sys::BackendState::STATE_IDLE, std::ptr::null()) };
    BUSY.store(false, SeqCst);
    result
}

fn extension_is_here() -> bool {
    // SAFETY: a catalog look-up inside a transaction.
    transaction_of_superuser(c"looking for the extension", || unsafe {
        pg_sys::get_extension_oid(c"pg_outbox".as_ptr(), true) != pg_sys::InvalidOid
    })
}

/// Runs a statement that returns a moment; null and infinity are never.
fn call(statement: &str, arguments: &[DatumWithOid<'_>]) -> i64 {
    match Spi::get_one_with_args::<TimestampWithTimeZone>(statement, arguments) {
        Ok(moment) => moment.map_or(NEVER, TimestampWithTimeZone::into_inner),
        Err(e) => error!("{statement}: {e}"),
    }
}

/// What this worker depends on, whatever the administrator set for all sessions.
fn settings() {
    let set = [
        // Nothing it writes must outlive a crash: recovery does it again.
        ("synchronous_commit", "off"),
        ("search_path", "pg_catalog, pg_temp"),
        ("default_transaction_isolation", "read committed"),
        ("default_transaction_read_only", "off"),
        ("lock_timeout", "0"),
        // It works beside the application, in one process.
        ("max_parallel_workers_per_gather", "0"),
        // Its statements are few and always the same.
        ("plan_cache_mode", "force_generic_plan"),
        ("enable_seqscan", "off"),
        ("enable_hashjoin", "off"),
        ("enable_mergejoin", "off"),
        ("jit", "off"),
        #[cfg(any(feature = "pg17", feature = "pg18"))]
        ("transaction_timeout", "0"),
    ];
    for (name, value) in set {
        if let Err(e) = Spi::run_with_args("SELECT pg_catalog.set_config($1, $2, false)", &[name.into(), value.into()])
        {
            error!("set {name}: {e}");
        }
    }
}

struct Worker {
    database: &'static Database,
    /// Before that moment what is new is gathered.
    gather_until: i64,
    /// Statistics that wait for a quiet moment.
    unreported: bool,
    /// The statement that describes events, prepared when the first are announced.
    describe: Option<OwnedPreparedStatement>,
}

impl Worker {
    fn run(mut self) {
        let database = self.database;
        transaction(c"starting", settings);
        database.set_state(State::Running);
        wake::launcher(shmem::get());
        self.recover();
        // A worker that was cut off may have left these behind.
        database.lease_due.store(wake::now(), SeqCst);
        database.ended_attachments.fetch_add(1, SeqCst);
        self.notify(vec![pack::wake_up("startup")]);
        while !database.stop.load(SeqCst) && !TERMINATED.load(SeqCst) {
            reload_configuration(database);
            if self.work() {
                // SAFETY: outside a transaction, as it wants; at most once a second it does anything.
                let _again_in = unsafe { pg_sys::pgstat_report_stat(false) };
            } else {
                self.rest();
            }
        }
    }

    /// Everything there is to do now; false: nothing.
    fn work(&mut self) -> bool {
        let mut did = false;
        if self.database.recover.swap(false, SeqCst) || self.database.recount.is_spoiled() {
            self.database.recovered.store(false, SeqCst);
            self.recover();
            self.database.overflow.store(true, SeqCst);
            did = true;
        }
        did |= self.release_ended();
        did |= self.do_what_is_due();
        did | self.announce()
    }

    fn recover(&mut self) {
        let count = !self.database.recovered.load(SeqCst);
        self.database.next_due.store(NEVER, SeqCst);
        let next = transaction(c"recovering", || call("SELECT outbox._recover($1)", &[count.into()]));
        self.database.next_due.fetch_min(next, SeqCst);
        self.unreported = true;
    }

    fn release_ended(&mut self) -> bool {
        let ended = session::take_ended(self.database);
        if ended.is_empty() {
            return false;
        }
        // All in one turn: where many sessions come and go, many others wait for theirs.
        transaction(c"releasing the claims of sessions that ended", || {
            let release = "SELECT outbox._release_attachments($1)";
            if let Err(e) = Spi::get_one_with_args::<i64>(release, &[ended.clone().into()]) {
                error!("{release}: {e}");
            }
        });
        ended.iter().for_each(|attachment| session::free(self.database, *attachment));
        self.unreported = true;
        true
    }

    fn do_what_is_due(&mut self) -> bool {
        let (now, database) = (wake::now(), self.database);
        if database.scheduled_due.load(SeqCst) <= now {
            database.scheduled_due.store(NEVER, SeqCst);
            database.wake_due.store(true, SeqCst);
        }
        let lease_over = database.lease_due.load(SeqCst) <= now;
        if lease_over && database.open_claims.load(SeqCst) <= 0 {
            database.lease_due.store(NEVER, SeqCst);
        } else if lease_over || database.next_due.load(SeqCst) <= now {
            database.next_due.store(NEVER, SeqCst);
            database.lease_due.store(NEVER, SeqCst);
            let due = transaction(c"doing what is due", || call("SELECT outbox._due()", &[]));
            let retain = transaction(c"removing processed events", || call("SELECT outbox._retain()", &[]));
            database.next_due.fetch_min(due.min(retain), SeqCst);
            self.unreported = true;
            return true;
        }
        false
    }

    /// New events and wake-ups; false: there were none.
    fn announce(&mut self) -> bool {
        let database = self.database;
        let due = database.wake_due.load(SeqCst);
        let released = database.wake_released.load(SeqCst);
        if database.ring.len() == 0 && !due && !released && !database.overflow.load(SeqCst) {
            return false;
        }
        let wait = self.gather_until - wake::now();
        if wait > 0 {
            wake::sleep(Some((wait + 999) / 1000));
        }
        let mut payloads = Vec::new();
        for (flag, reason) in
            [(&database.overflow, "overflow"), (&database.wake_due, "due"), (&database.wake_released, "released")]
        {
            if flag.swap(false, SeqCst) {
                payloads.push(pack::wake_up(reason));
            }
        }
        let ids: Vec<i64> = std::iter::from_fn(|| database.ring.pop()).take(BATCH).collect();
        self.notify_of(payloads, ids);
        true
    }

    fn notify_of(&mut self, mut payloads: Vec<Vec<u8>>, ids: Vec<i64>) {
        let mode = guc::NOTIFY_PAYLOAD.get();
        let (statement, events) = (&mut self.describe, ids.len());
        let count = transaction(c"notifying", || {
            if !ids.is_empty() {
                match describe(statement, ids, mode.name()) {
                    Ok(events) => payloads.extend(pack::pack(&events)),
                    Err(e) => error!("describing events: {e}"),
                }
            }
            send(&payloads)
        });
        self.database.counters.notifications.fetch_add(count as i64, Relaxed);
        self.gather_until = wake::now() + gather(events);
        self.unreported = true;
    }

    fn notify(&mut self, payloads: Vec<Vec<u8>>) {
        self.notify_of(payloads, Vec::new());
    }

    /// Sleeps until woken or until the next thing is due.
    fn rest(&mut self) {
        let database = self.database;
        if std::mem::take(&mut self.unreported) {
            // SAFETY: outside a transaction, as it wants.
            let _again_in = unsafe { pg_sys::pgstat_report_stat(true) };
        }
        database.armed.store(true, SeqCst);
        let news = database.ring.len() > 0
            || database.ended_attachments.load(SeqCst) > 0
            || database.recount.is_spoiled()
            || [&database.overflow, &database.wake_due, &database.wake_released, &database.recover, &database.stop]
                .iter()
                .any(|flag| flag.load(SeqCst));
        if !news {
            wake::sleep(self.until_due());
        }
        database.armed.store(false, SeqCst);
    }

    fn until_due(&self) -> Option<i64> {
        let database = self.database;
        let lease = if database.open_claims.load(SeqCst) > 0 { database.lease_due.load(SeqCst) } else { NEVER };
        let due = database.next_due.load(SeqCst).min(database.scheduled_due.load(SeqCst)).min(lease);
        // A day at most: WaitLatch counts milliseconds in 32 bits.
        (due != NEVER).then(|| ((due - wake::now()).max(0) / 1000 + 1).min(86_400_000))
    }
}

/// Settings changed: what is due when may have changed with them.
fn reload_configuration(database: &Database) {
    if BackgroundWorker::sighup_received() {
        // SAFETY: in the main loop of a background worker, outside a transaction.
        unsafe { pg_sys::ProcessConfigFile(pg_sys::GucContext::PGC_SIGHUP) };
        database.next_due.store(wake::now(), SeqCst);
    }
}

fn describe(kept: &mut Option<OwnedPreparedStatement>, ids: Vec<i64>, mode: &str) -> spi::Result<Vec<Described>> {
    Spi::connect(|client| {
        let statement = match kept {
            Some(statement) => statement,
            None => {
                // As arrays: each value that is read by itself has its type looked up.
                let text = "SELECT array_agg(body), array_agg(cut), array_agg(short) FROM outbox._describe($1, $2)";
                let types = [PgBuiltInOids::INT8ARRAYOID.into(), PgBuiltInOids::TEXTOID.into()];
                kept.insert(client.prepare(text, &types)?.keep())
            }
        };
        let row = client.select(&*statement, None, &[ids.into(), mode.into()])?.first();
        let texts = |column| -> spi::Result<Vec<Option<Vec<u8>>>> {
            let all = row.get::<pgrx::Array<&[u8]>>(column)?;
            Ok(all.map(|all| all.iter().map(|text| text.map(<[u8]>::to_vec)).collect()).unwrap_or_default())
        };
        let all = texts(1)?.into_iter().zip(texts(2)?).zip(texts(3)?);
        Ok(all
            .map(|((body, cut), short)| Described {
                body: body.unwrap_or_default(),
                cut,
                short: short.unwrap_or_default(),
            })
            .collect())
    })
}

fn send(payloads: &[Vec<u8>]) -> usize {
    for payload in payloads {
        match CString::new(payload.as_slice()) {
            // SAFETY: two strings that end in NUL; the function copies them.
            Ok(text) => unsafe { Async_Notify(c"outbox_events".as_ptr(), text.as_ptr()) },
            Err(e) => error!("a payload with a zero byte: {e}"),
        }
    }
    payloads.len()
}

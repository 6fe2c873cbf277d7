//! The worker of a database: the one process that notifies.
//!
//! It sleeps until its latch is set or the next thing is due. What it announces waits for nothing else: see [`chores`]
//! for the rest of its work. An ERROR undoes a transaction and is tried again; it ends nothing.
//!
//! ```text
//!   start ──> extension here? ──no──> end (absent)
//!               │ yes
//!            announce "startup"
//!               │
//!     ┌──> what is new ──> notify ──> one chore ──┐
//!     └───── alarm set, asleep <── nothing to do ─┘
//! ```

use crate::announce::{Describer, send};
use crate::attempt::{Failure, Patience, attempt, attempt_as_superuser};
use crate::backoff::{Backoff, Pause};
use crate::chores::Chores;
use crate::shmem::{self, Database, State};
use crate::sleep::{self, Bed};
use crate::timers::NEVER;
use crate::{backend, clock, guc, pack, settings, wake};
use pgrx::bgworkers::{BackgroundWorker, SignalWakeFlags};
use pgrx::prelude::*;
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
}

/// Entry point. The argument is the database's oid.
#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn pg_outbox_worker_main(argument: pg_sys::Datum) {
    let oid = pg_sys::Oid::from(argument.value() as u32);
    let Some(database) = shmem::find(oid) else { return };
    handle_signals();
    if !take_slot(database) {
        return;
    }
    if database.stop.load(SeqCst) {
        return;
    }
    BackgroundWorker::connect_worker_to_spi_by_oid(Some(oid), None);
    if let Err(failure) = settings::pin() {
        return failure.log(c"starting");
    }
    match extension_is_here() {
        Ok(true) => Worker::new(database).run(),
        Ok(false) => database.absent.store(true, SeqCst),
        Err(failure) => failure.log(c"looking for the extension"),
    }
}

/// SIGTERM was sent.
static TERMINATED: AtomicBool = AtomicBool::new(false);
/// A transaction is running.
pub static BUSY: AtomicBool = AtomicBool::new(false);

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

/// Idle: the worker exits cleanly. Busy: it ends as PostgreSQL ends a session, in the middle of a query or of a wait for a
/// lock.
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

/// Before a transaction: a SIGTERM that came when none was running is not to be missed by this one.
pub fn serve_termination() {
    if TERMINATED.load(SeqCst) {
        // SAFETY: what the handler would have called.
        unsafe { die(pg_sys::SIGTERM as i32) };
    }
}

/// From here on others can wake this worker, and see that it ended. False: the slot is another's.
fn take_slot(database: &'static Database) -> bool {
    if database.worker_pid.compare_exchange(0, backend::pid(), SeqCst, SeqCst).is_err() {
        return false;
    }
    let argument = pg_sys::Datum::from(std::ptr::from_ref(database) as usize);
    // SAFETY: the callback lives in this library, which is never unloaded.
    unsafe { pg_sys::on_shmem_exit(Some(leave_slot), argument) };
    database.worker_latch.store(backend::latch(), SeqCst);
    true
}

unsafe extern "C-unwind" fn leave_slot(_code: i32, database: pg_sys::Datum) {
    // SAFETY: the address of a slot in shared memory, given by `take_slot`.
    let database = unsafe { &*(database.value() as *const Database) };
    database.timers.alarm.clear();
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

pub fn extension_is_here() -> Result<bool, Failure> {
    // SAFETY: a catalog look-up inside a transaction.
    attempt_as_superuser(c"looking for the extension", Patience::ENDLESS, || unsafe {
        pg_sys::get_extension_oid(c"pg_outbox".as_ptr(), true) != pg_sys::InvalidOid
    })
}

struct Worker {
    database: &'static Database,
    bed: Bed,
    chores: Chores,
    describer: Describer,
    /// What is new meanwhile is gathered.
    gathering: Pause,
    /// A notification that could not be sent.
    unsent: Backoff,
    /// Statistics that wait for a quiet moment.
    unreported: bool,
}

impl Worker {
    fn new(database: &'static Database) -> Self {
        Worker {
            database,
            bed: Bed::new(),
            chores: Chores::new(database),
            describer: Describer::default(),
            gathering: Pause::default(),
            unsent: Backoff::default(),
            unreported: false,
        }
    }

    fn run(mut self) {
        let database = self.database;
        database.set_state(State::Running);
        wake::launcher(shmem::get());
        // First recovery, if it comes through at once. Whatever there is to tell, this tells consumers to look at all.
        self.chores.one();
        database.news.all_is_told();
        self.notify(vec![pack::wake_up("startup")], Vec::new());
        while !database.stop.load(SeqCst) && !TERMINATED.load(SeqCst) {
            if settings::reload() {
                self.chores.look_at_all();
            }
            let announced = self.announce();
            let worked = self.chores.one();
            self.unreported |= announced || worked;
            if announced || worked {
                // SAFETY: outside a transaction, as it wants; at most once a second it does anything.
                let _again_in = unsafe { pg_sys::pgstat_report_stat(false) };
            } else {
                self.rest();
            }
        }
    }

    /// Something is to be announced, and no failure is to be waited out.
    fn has_news(&self) -> bool {
        let database = self.database;
        self.unsent.left(clock::monotonic()) == 0 && database.news.is_any()
    }

    /// New events and wake-ups; false: there were none.
    fn announce(&mut self) -> bool {
        if !self.has_news() {
            return false;
        }
        let wait = self.gathering.left(clock::monotonic());
        if wait > 0 {
            sleep::for_latch(Some((wait + 999) / 1000));
        }
        let database = self.database;
        let (reasons, ids) = database.news.take(BATCH);
        self.notify(reasons.map(pack::wake_up).collect(), ids);
        true
    }

    /// Sends payloads, and those that describe these events. Events that can't be described now are announced all the same.
    fn notify(&mut self, payloads: Vec<Vec<u8>>, ids: Vec<i64>) {
        let (describer, mode, events) = (&mut self.describer, guc::NOTIFY_PAYLOAD.get(), ids.len());
        let sent = attempt(c"notifying", Patience::ENDLESS, || {
            let all = [&payloads[..], &describer.payloads(&ids, mode)].concat();
            send(&all);
            all.len()
        });
        let sent = match sent {
            Err(failure) if !ids.is_empty() => {
                // A lock on the table is nobody's fault.
                if !failure.is_lock() {
                    failure.log(c"describing events");
                }
                let all = [&payloads[..], &[pack::wake_up("overflow")]].concat();
                attempt(c"notifying", Patience::ENDLESS, || send(&all)).map(|()| all.len())
            }
            sent => sent,
        };
        self.gathering = Pause::new(clock::monotonic(), gather(events));
        match sent {
            Ok(count) => {
                self.database.counters.notifications.fetch_add(count as i64, Relaxed);
                self.unsent.succeeded();
            }
            Err(failure) => self.not_sent(&failure),
        }
    }

    fn not_sent(&mut self, failure: &Failure) {
        // Which it were, nobody has to know: consumers look at the tables.
        self.database.news.look_at_all();
        self.unsent.failed(clock::monotonic());
        if self.unsent.is_worth_a_line() {
            failure.log(c"notifying");
        }
    }

    /// Sleeps until woken or until the next thing is due.
    fn rest(&mut self) {
        if std::mem::take(&mut self.unreported) {
            // SAFETY: outside a transaction, as it wants.
            let _again_in = unsafe { pg_sys::pgstat_report_stat(true) };
        }
        let database = self.database;
        let asked = || {
            database.stop.load(SeqCst)
                || database.recover.load(SeqCst)
                || database.ended_attachments.load(SeqCst) > 0
                || database.recount.is_spoiled()
                || self.has_news()
        };
        if let Some(until) = database.timers.arm(asked) {
            if self.bed.sleep(self.sleep_ms(until)) {
                self.chores.look_at_all();
            }
            database.timers.alarm.clear();
        }
    }

    /// How long to sleep, in milliseconds; none: until woken.
    fn sleep_ms(&self, until: i64) -> Option<i64> {
        let due = (until != NEVER).then(|| until.saturating_sub(clock::now()));
        let unsent = Some(self.unsent.left(clock::monotonic())).filter(|left| *left > 0);
        let micros = [due, self.chores.left(), unsent].into_iter().flatten().min()?;
        // A day at most: WaitLatch counts milliseconds in 32 bits.
        Some((micros.max(0) / 1000 + 1).min(86_400_000))
    }
}

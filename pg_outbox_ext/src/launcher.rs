//! The launcher: one process for the server. It sees to it that each database with the extension has a worker.
//!
//! It connects to no database, reads the list of them, and looks into each once by starting a worker there, which ends at
//! once if it finds no extension. It wakes only when asked to or when a worker ended.
//!
//! ```text
//!              asked, or not looked into yet
//!   (no slot) ────────────────────────────> Idle ──start──> Starting ──> Running
//!       ^                                     │ ^                             │
//!       └── absent, or the database is gone ──┘ └──────── the worker ended ───┘
//!                            not while the database is suspended
//! ```

use crate::backoff::Pause;
use crate::shmem::{self, Database, Shared, State};
use crate::{backend, clock, session, settings, sleep};
use pgrx::bgworkers::{BackgroundWorker, BackgroundWorkerBuilder, BgWorkerStartTime, SignalWakeFlags};
use pgrx::prelude::*;
use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering::*;
use std::time::Duration;

/// A worker that lived this long (microseconds) did not fail at its start.
const SETTLED: i64 = 10_000_000;

/// Workers that may be starting at a time: they share PostgreSQL's max_worker_processes with others.
const AT_ONCE: usize = 3;

/// In `_PG_init`.
pub fn register() {
    BackgroundWorkerBuilder::new("pg_outbox launcher")
        .set_type("pg_outbox launcher")
        .set_library("pg_outbox")
        .set_function("pg_outbox_launcher_main")
        .set_start_time(BgWorkerStartTime::RecoveryFinished)
        .set_restart_time(Some(Duration::from_secs(1)))
        .enable_spi_access()
        .load();
}

/// Entry point.
#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn pg_outbox_launcher_main(_argument: pg_sys::Datum) {
    BackgroundWorker::attach_signal_handlers(SignalWakeFlags::SIGHUP | SignalWakeFlags::SIGTERM);
    BackgroundWorker::connect_worker_to_spi(None, None);
    let shared = shmem::get();
    shared.launcher_latch.store(backend::latch(), SeqCst);
    forget_unborn();
    let mut launcher = Launcher {
        shared,
        looked_into: HashSet::new(),
        asked: HashSet::new(),
        started: HashMap::new(),
        lacking_since: None,
        warned: false,
    };
    while !BackgroundWorker::sigterm_received() {
        settings::reload();
        let again_in_ms = launcher.reconcile();
        sleep::for_latch(again_in_ms);
    }
    shared.launcher_latch.store(std::ptr::null_mut(), SeqCst);
    // As PostgreSQL's logical replication launcher: 1 has the postmaster start it again, unless the server is shutting down.
    // SAFETY: the regular end of a process, at which no value is in use.
    unsafe { pg_sys::proc_exit(1) }
}

/// Workers that the launcher before this one meant to start, and did not.
fn forget_unborn() {
    for slot in shmem::databases() {
        if slot.state() == State::Starting && slot.worker_pid.load(SeqCst) == 0 {
            slot.set_state(State::Idle);
        }
    }
}

/// When a worker was started last, and how often in a row it ended soon after.
#[derive(Clone, Copy)]
struct Start {
    at: i64,
    failures: u32,
}

impl Default for Start {
    fn default() -> Self {
        Start { at: -2 * SETTLED, failures: 0 }
    }
}

impl Start {
    /// Not to be started again before: 1 s after the second failure, twice as long each time, at most a minute.
    fn pause(self) -> Pause {
        match self.failures {
            0 | 1 => Pause::default(),
            n => Pause::new(self.at, (1_000_000 << (n - 2).min(6)).min(60_000_000)),
        }
    }
}

struct Launcher {
    shared: &'static Shared,
    /// Databases without the extension.
    looked_into: HashSet<u32>,
    /// Databases in which the extension was installed since they were looked into.
    asked: HashSet<u32>,
    started: HashMap<u32, Start>,
    /// Since when no worker could be started.
    lacking_since: Option<i64>,
    warned: bool,
}

impl Launcher {
    /// Brings workers and databases together. Returns after how many milliseconds to try again what could not be done.
    fn reconcile(&mut self) -> Option<i64> {
        for request in &self.shared.requests {
            let oid = request.swap(0, SeqCst);
            if oid != 0 {
                self.looked_into.remove(&oid);
                self.asked.insert(oid);
            }
        }
        let databases = databases();
        self.asked.retain(|oid| databases.iter().any(|d| d.to_u32() == *oid));
        self.forget_gone(&databases);
        databases.into_iter().filter_map(|oid| self.see_to(oid)).min()
    }

    fn forget_gone(&mut self, databases: &[pg_sys::Oid]) {
        for slot in shmem::databases() {
            let oid = slot.oid.load(SeqCst);
            if oid != 0 && slot.state() == State::Idle && !databases.iter().any(|d| d.to_u32() == oid) {
                self.give_back(slot, oid);
            }
        }
        self.looked_into.retain(|oid| databases.iter().any(|d| d.to_u32() == *oid));
    }

    fn see_to(&mut self, oid: pg_sys::Oid) -> Option<i64> {
        let key = oid.to_u32();
        let slot = match shmem::find(oid) {
            Some(slot) => slot,
            // The next of those that start to run or to end wakes this process.
            None if self.looked_into.contains(&key) || self.starting() >= AT_ONCE => return None,
            None => match shmem::allocate(oid) {
                Some(slot) => slot,
                None => return self.no_worker_left(),
            },
        };
        if slot.state() != State::Idle {
            return None;
        }
        if slot.absent.load(SeqCst) {
            // Installed after the worker had looked?
            if !self.asked.remove(&key) {
                self.give_back(slot, key);
                self.looked_into.insert(key);
                return None;
            }
            slot.absent.store(false, SeqCst);
        }
        if self.starting() >= AT_ONCE {
            return None;
        }
        self.start(slot, oid)
    }

    fn starting(&self) -> usize {
        let is_starting = |d: &&Database| d.oid.load(SeqCst) != 0 && d.state() == State::Starting;
        shmem::databases().iter().filter(is_starting).count()
    }

    fn give_back(&mut self, slot: &Database, oid: u32) {
        slot.oid.store(0, SeqCst);
        self.started.remove(&oid);
        session::forget_ended(oid);
    }

    fn start(&mut self, slot: &Database, oid: pg_sys::Oid) -> Option<i64> {
        let now = clock::monotonic();
        let mut start = self.started.get(&oid.to_u32()).copied().unwrap_or_default();
        let asked = slot.stop.swap(false, SeqCst);
        let left = start.pause().left(now);
        if left > 0 && !asked {
            return Some(left / 1000 + 1);
        }
        // First announce, then look whether a command has suspended the database: it does so the other way round.
        slot.set_state(State::Starting);
        if self.shared.suspended.iter().any(|p| p.load(SeqCst) == oid.to_u32()) {
            slot.set_state(State::Idle);
            return None;
        }
        start.failures = if asked || now - start.at > SETTLED { 0 } else { start.failures + 1 };
        start.at = now;
        self.started.insert(oid.to_u32(), start);
        self.asked.remove(&oid.to_u32());
        match self.spawn(oid) {
            true => {
                self.lacking_since = None;
                None
            }
            false => {
                slot.set_state(State::Idle);
                self.no_worker_left()
            }
        }
    }

    fn spawn(&self, oid: pg_sys::Oid) -> bool {
        let worker = BackgroundWorkerBuilder::new(&format!("pg_outbox worker for database {}", oid.to_u32()))
            .set_type("pg_outbox worker")
            .set_library("pg_outbox")
            .set_function("pg_outbox_worker_main")
            .set_argument(Some(pg_sys::Datum::from(oid.to_u32() as usize)))
            .set_start_time(BgWorkerStartTime::RecoveryFinished)
            .set_restart_time(None)
            .set_notify_pid(backend::pid())
            .enable_spi_access()
            .load_dynamic();
        match worker {
            Ok(worker) => worker.wait_for_startup().is_ok(),
            Err(_) => false,
        }
    }

    /// Returns when to try again, in milliseconds: nobody says when a background worker of another kind has ended. Warns when
    /// the second try fails too: a server that shuts down starts none either.
    fn no_worker_left(&mut self) -> Option<i64> {
        let now = clock::monotonic();
        if now - *self.lacking_since.get_or_insert(now) < 1_000_000 {
            return Some(1_000);
        }
        if !std::mem::replace(&mut self.warned, true) {
            ereport!(
                WARNING,
                PgSqlErrorCode::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED,
                "no background worker could be started for a database with pg_outbox",
                "Raise max_worker_processes: pg_outbox needs one for its launcher and one for each database."
            );
        }
        Some(5_000)
    }
}

/// The databases that can be connected to. Source: get_database_list() of PostgreSQL's autovacuum.c.
fn databases() -> Vec<pg_sys::Oid> {
    BackgroundWorker::transaction(|| {
        let mut found = Vec::new();
        // SAFETY: a scan of a shared catalog in a transaction; rows have the fixed part that FormData_pg_database describes.
        unsafe {
            let relation = pg_sys::table_open(pg_sys::DatabaseRelationId, pg_sys::AccessShareLock as i32);
            let scan = pg_sys::table_beginscan_catalog(relation, 0, std::ptr::null_mut());
            loop {
                let tuple = pg_sys::heap_getnext(scan, pg_sys::ScanDirection::ForwardScanDirection);
                if tuple.is_null() {
                    break;
                }
                let data = (*tuple).t_data;
                let row = &*data.cast::<u8>().add((*data).t_hoff as usize).cast::<pg_sys::FormData_pg_database>();
                if row.datallowconn && row.datconnlimit != INVALID_DATABASE {
                    found.push(row.oid);
                }
            }
            let end = (*(*(*scan).rs_rd).rd_tableam).scan_end;
            if let Some(end) = end {
                end(scan);
            }
            pg_sys::table_close(relation, pg_sys::AccessShareLock as i32);
        }
        found
    })
}

/// DATCONNLIMIT_INVALID_DB of pg_database.h: left behind by a DROP DATABASE that was cut off.
const INVALID_DATABASE: i32 = -2;

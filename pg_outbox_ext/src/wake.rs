//! Latches: how the worker and the launcher are woken.

use crate::backend;
use crate::shmem::{Database, Shared};
use pgrx::pg_sys;
use std::sync::atomic::{AtomicPtr, Ordering::*};

/// After something was made due at that moment: wakes the worker if it sleeps for longer.
pub fn worker(database: &Database, at: i64) {
    if database.timers.alarm.ring(at) {
        set(&database.worker_latch);
    }
}

/// Wakes the worker in any case: it is to end.
pub fn worker_now(database: &Database) {
    set(&database.worker_latch);
}

/// Cuts the worker off in whatever it does.
pub fn terminate(database: &Database) {
    let pid = database.worker_pid.load(SeqCst);
    if pid != 0 {
        // SAFETY: a system call. The worker takes its pid out of shared memory before it ends.
        let _sent = unsafe { kill(pid, pg_sys::SIGTERM as i32) };
    }
}

unsafe extern "C" {
    /// POSIX kill(2).
    fn kill(pid: i32, signal: i32) -> i32;
}

pub fn launcher(shared: &Shared) {
    set(&shared.launcher_latch);
}

/// Asks the launcher to look into this backend's database.
pub fn launcher_for_this_database(shared: &Shared) {
    let _listed = Shared::list(&shared.requests, backend::database());
    launcher(shared);
}

fn set(latch: &AtomicPtr<pg_sys::Latch>) {
    let latch = latch.load(SeqCst);
    if !latch.is_null() {
        // SAFETY: latches of PostgreSQL's process array stay valid as memory for the life of the server. When the process
        // is gone, whoever has its place wakes for nothing, which every user of a latch copes with.
        unsafe { pg_sys::SetLatch(latch) };
    }
}

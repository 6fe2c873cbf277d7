//! Latches and clocks: how the worker is woken and how it sleeps.

use crate::shmem::{Database, Shared};
use pgrx::pg_sys;
use std::sync::atomic::{AtomicPtr, Ordering::*};

/// Now, in microseconds of PostgreSQL's epoch.
pub fn now() -> i64 {
    // SAFETY: reads the clock.
    unsafe { pg_sys::GetCurrentTimestamp() }
}

/// Wakes the worker if it sleeps; costs one atomic read if it does not.
pub fn worker(database: &Database) {
    if database.armed.load(SeqCst) && database.armed.swap(false, SeqCst) {
        set(&database.worker_latch);
    }
}

/// Wakes the worker in any case: it is to end, or something is not among what it looks at before it sleeps.
pub fn worker_now(database: &Database) {
    database.armed.store(false, SeqCst);
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

fn set(latch: &AtomicPtr<pg_sys::Latch>) {
    let latch = latch.load(SeqCst);
    if !latch.is_null() {
        // SAFETY: latches of PostgreSQL's process array stay valid as memory for the life of the server. When the process
        // is gone, whoever has its place wakes for nothing, which every user of a latch copes with.
        unsafe { pg_sys::SetLatch(latch) };
    }
}

/// This process's own latch, for others to set.
pub fn own() -> *mut pg_sys::Latch {
    // SAFETY: set when the process started.
    unsafe { pg_sys::MyLatch }
}

/// Sleeps until the latch is set or so many milliseconds have gone (none: for ever), then serves PostgreSQL's interrupts.
pub fn sleep(timeout_ms: Option<i64>) {
    let events =
        pg_sys::WL_LATCH_SET | pg_sys::WL_EXIT_ON_PM_DEATH | if timeout_ms.is_some() { pg_sys::WL_TIMEOUT } else { 0 };
    // SAFETY: plain calls of PostgreSQL's latch functions on this process's own latch.
    unsafe {
        pg_sys::WaitLatch(pg_sys::MyLatch, events as i32, timeout_ms.unwrap_or(-1) as _, pg_sys::PG_WAIT_EXTENSION);
        pg_sys::ResetLatch(pg_sys::MyLatch);
    }
    pgrx::check_for_interrupts!();
}

//! Latches and clocks: how the worker and the launcher are woken, and what time it is.

use crate::shmem::{Database, Shared};
use pgrx::pg_sys;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering::*};
use std::time::Instant;

/// Now, in microseconds of PostgreSQL's epoch. The clock on the wall: it may be set, so it is for moments alone.
pub fn now() -> i64 {
    // SAFETY: reads the clock.
    unsafe { pg_sys::GetCurrentTimestamp() }
}

/// Microseconds since this process first asked: for how long something takes, whatever becomes of the clock on the wall.
pub fn monotonic() -> i64 {
    static FIRST: OnceLock<Instant> = OnceLock::new();
    i64::try_from(FIRST.get_or_init(Instant::now).elapsed().as_micros()).unwrap_or(i64::MAX)
}

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

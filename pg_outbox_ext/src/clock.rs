//! What time it is, and how long something takes: two clocks.

use pgrx::pg_sys;
use std::sync::OnceLock;
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

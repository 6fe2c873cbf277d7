//! Sleeping until the latch is set, the time is up, or the clock on the wall has been set.

use crate::backend;
use pgrx::pg_sys;
use std::ffi::c_int;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd};

/// Sleeps until the latch is set or so many milliseconds have gone (none: for ever), then serves PostgreSQL's interrupts.
pub fn for_latch(timeout_ms: Option<i64>) {
    let events =
        pg_sys::WL_LATCH_SET | pg_sys::WL_EXIT_ON_PM_DEATH | if timeout_ms.is_some() { pg_sys::WL_TIMEOUT } else { 0 };
    // SAFETY: plain calls of PostgreSQL's latch functions on this process's own latch.
    unsafe {
        pg_sys::WaitLatch(backend::latch(), events as i32, timeout_ms.unwrap_or(-1) as _, pg_sys::PG_WAIT_EXTENSION);
        pg_sys::ResetLatch(backend::latch());
    }
    serve_interrupts();
}

/// A request to cancel is for a statement; between statements it is for nothing.
fn serve_interrupts() {
    // SAFETY: a flag of this process that its own signal handler sets.
    unsafe { pg_sys::QueryCancelPending = 0 };
    pgrx::check_for_interrupts!();
}

/// What the worker sleeps in: its latch and, where the system can tell of it, the clock on the wall being set.
pub struct Bed {
    set: *mut pg_sys::WaitEventSet,
    clock: Option<ClockWatch>,
}

impl Bed {
    pub fn new() -> Self {
        let clock = ClockWatch::new();
        // SAFETY: plain calls of PostgreSQL's functions; the set, like the bed, lasts as long as this process, whose own
        // latch is in it. The descriptor is open as long as `clock` lives, which the bed keeps.
        unsafe {
            #[cfg(any(feature = "pg14", feature = "pg15", feature = "pg16"))]
            let set = pg_sys::CreateWaitEventSet(pg_sys::TopMemoryContext, 3);
            #[cfg(any(feature = "pg17", feature = "pg18"))]
            let set = pg_sys::CreateWaitEventSet(std::ptr::null_mut(), 3);
            let add = |events, socket, latch| {
                pg_sys::AddWaitEventToSet(set, events, socket, latch, std::ptr::null_mut());
            };
            add(pg_sys::WL_LATCH_SET, NO_SOCKET, backend::latch());
            add(pg_sys::WL_EXIT_ON_PM_DEATH, NO_SOCKET, std::ptr::null_mut());
            if let Some(clock) = &clock {
                add(pg_sys::WL_SOCKET_READABLE, clock.timer.as_raw_fd(), std::ptr::null_mut());
            }
            Bed { set, clock }
        }
    }

    /// Sleeps until the latch is set, so many milliseconds have gone (none: for ever), or the clock was set: then true.
    pub fn sleep(&mut self, timeout_ms: Option<i64>) -> bool {
        let mut event = pg_sys::WaitEvent::default();
        // SAFETY: the set was made by `new`; there is room for one event.
        let happened = unsafe {
            let happened = pg_sys::WaitEventSetWait(
                self.set,
                timeout_ms.unwrap_or(-1) as _,
                &mut event,
                1,
                pg_sys::PG_WAIT_EXTENSION,
            );
            pg_sys::ResetLatch(backend::latch());
            happened
        };
        serve_interrupts();
        happened > 0
            && event.events & pg_sys::WL_SOCKET_READABLE != 0
            && self.clock.as_mut().is_some_and(ClockWatch::was_set)
    }
}

/// PGINVALID_SOCKET of port.h.
const NO_SOCKET: pg_sys::pgsocket = -1;

/// A timer at the end of time that Linux cancels, and so makes readable, whenever the clock is set or the machine was
/// asleep. Source: systemd's event loop (TFD_TIMER_CANCEL_ON_SET, timerfd_create(2)).
struct ClockWatch {
    timer: File,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Time {
    seconds: std::ffi::c_long,
    nanoseconds: std::ffi::c_long,
}

/// `struct itimerspec`.
#[repr(C)]
struct TimerSpec {
    interval: Time,
    value: Time,
}

#[cfg(target_os = "linux")]
unsafe extern "C" {
    /// Linux's timerfd_create(2) and timerfd_settime(2).
    fn timerfd_create(clock: c_int, flags: c_int) -> c_int;
    fn timerfd_settime(timer: c_int, flags: c_int, new: *const TimerSpec, old: *mut TimerSpec) -> c_int;
}

const CLOCK_REALTIME: c_int = 0;
/// O_NONBLOCK | O_CLOEXEC, from the very headers of this machine's architecture family (asm-generic/fcntl.h).
const TFD_NONBLOCK_CLOEXEC: c_int = 0o4000 | 0o2_000_000;
const TFD_TIMER_ABSTIME: c_int = 1;
const TFD_TIMER_CANCEL_ON_SET: c_int = 2;

impl ClockWatch {
    /// None: this system can't tell, and what is due after the clock was set forward waits for the next wake-up.
    #[cfg(target_os = "linux")]
    fn new() -> Option<Self> {
        // SAFETY: a system call that takes numbers; a descriptor that it returns is nobody else's.
        let timer = unsafe {
            let descriptor = timerfd_create(CLOCK_REALTIME, TFD_NONBLOCK_CLOEXEC);
            if descriptor < 0 {
                return None;
            }
            File::from_raw_fd(descriptor)
        };
        let mut watch = ClockWatch { timer };
        watch.arm().then_some(watch)
    }

    #[cfg(not(target_os = "linux"))]
    fn new() -> Option<Self> {
        None
    }

    /// Again until the clock was not set meanwhile.
    #[cfg(target_os = "linux")]
    fn arm(&mut self) -> bool {
        let zero = Time { seconds: 0, nanoseconds: 0 };
        let end_of_time = TimerSpec { interval: zero, value: Time { seconds: std::ffi::c_long::MAX, nanoseconds: 0 } };
        let flags = TFD_TIMER_ABSTIME | TFD_TIMER_CANCEL_ON_SET;
        // SAFETY: a system call on this object's own descriptor, which reads the structure and writes none.
        (0..3)
            .any(|_| unsafe { timerfd_settime(self.timer.as_raw_fd(), flags, &end_of_time, std::ptr::null_mut()) } == 0)
    }

    #[cfg(not(target_os = "linux"))]
    fn arm(&mut self) -> bool {
        false
    }

    /// It became readable: whether because the clock was set. From now on it watches for the next time.
    fn was_set(&mut self) -> bool {
        // The read fails with ECANCELED, or succeeds at the end of time.
        let canceled = self.timer.read(&mut [0; 8]).is_err_and(|e| e.kind() != std::io::ErrorKind::WouldBlock);
        self.arm();
        canceled
    }
}

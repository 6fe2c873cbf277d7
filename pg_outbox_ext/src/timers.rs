//! When the worker has to wake, and who wakes it.
//!
//! Holds true: the moment that a commit compares with is the moment that the worker sleeps until, because both are the one
//! number in [`Alarm`]. A moment that a commit handed over is in a [`Timer`], is what the worker sleeps for, or was taken
//! by the worker, which then reads from the tables, with a later snapshot, what is due next.
//!
//! Pure code over atomics: `models/` runs this very file under loom, which tries every interleaving and every value that
//! weak memory allows. All-zero bytes are valid; what they mean is said by `reset`.

use crate::atomic::{AtomicI64, Ordering::*, fence};

/// "Never", for moments and for ids alike. Moments are microseconds of PostgreSQL's epoch.
pub const NEVER: i64 = i64::MAX;

/// Earlier than any moment: at once.
pub const AT_ONCE: i64 = i64::MIN;

/// What [`Alarm`] holds while the worker does not sleep. No moment is earlier.
const AWAKE: i64 = i64::MIN;

/// The moment until which the worker sleeps.
#[derive(Default)]
#[repr(C)]
pub struct Alarm(AtomicI64);

impl Alarm {
    /// For the worker, before it looks around for the last time and then sleeps until that moment at the latest. Whoever
    /// does not see this has done its work where the worker sees it, and the other way round: hence the fences.
    pub fn set(&self, until: i64) {
        self.0.store(until.max(AWAKE + 1), Relaxed);
        fence(SeqCst);
    }

    /// For the worker: it is awake, and looks at everything before it sleeps again.
    pub fn clear(&self) {
        self.0.store(AWAKE, Relaxed);
    }

    pub fn is_set(&self) -> bool {
        self.0.load(Relaxed) != AWAKE
    }

    /// After something was made due at that moment: whether its maker has to wake the worker. Of several, one has to.
    pub fn ring(&self, at: i64) -> bool {
        fence(SeqCst);
        self.0.fetch_update(Relaxed, Relaxed, |until| (at < until).then_some(AWAKE)).is_ok()
    }
}

/// The earliest of the moments that were handed over since the worker took the last.
#[derive(Default)]
#[repr(C)]
pub struct Timer(AtomicI64);

impl Timer {
    fn reset(&self) {
        self.0.store(NEVER, Relaxed);
    }

    pub fn set(&self, at: i64) {
        if at != NEVER {
            self.0.fetch_min(at, AcqRel);
        }
    }

    pub fn moment(&self) -> i64 {
        self.0.load(Acquire)
    }

    /// For the worker: whether it is time. Later moments are gone with the earliest. What they stood for is in the tables,
    /// where each commit wrote it before it came here, so a snapshot taken from now on shows it.
    pub fn take(&self, now: i64) -> bool {
        self.moment() <= now && self.0.swap(NEVER, AcqRel) <= now
    }
}

/// When the first lease ends. Counts only while claims are open: what is settled in time wakes nobody.
#[derive(Default)]
#[repr(C)]
pub struct Leases {
    open: AtomicI64,
    end: Timer,
}

impl Leases {
    fn reset(&self) {
        self.open.store(0, Relaxed);
        self.end.reset();
    }

    /// At commit: so many more claims are open, of which the first ends then. The count comes first, for `moment`.
    pub fn note(&self, more: i64, end: i64) {
        if more != 0 {
            self.open.fetch_add(more, AcqRel);
        }
        self.end.set(end);
    }

    /// Recovery counted the open claims.
    pub fn recount(&self, open: i64) {
        self.open.store(open, Release);
    }

    /// For the worker: what closed claims left behind is dropped; if a claim was opened meanwhile, its end is put back.
    pub fn moment(&self) -> i64 {
        if self.open.load(Acquire) == 0 && self.end.moment() != NEVER {
            let left = self.end.0.swap(NEVER, AcqRel);
            if self.open.load(Acquire) != 0 {
                self.end.set(left);
            }
        }
        self.end.moment()
    }

    /// For the worker: whether it is time, see [`Timer::take`].
    pub fn take(&self, now: i64) -> bool {
        self.moment() <= now && self.end.take(now)
    }

    /// Has the worker look at all leases at that moment.
    pub fn look(&self, at: i64) {
        self.end.set(at);
    }
}

/// All that the worker of a database wakes for by itself.
#[derive(Default)]
#[repr(C)]
pub struct Timers {
    pub alarm: Alarm,
    /// A retry, a circuit's end, a scheduled event.
    pub due: Timer,
    /// A processed event is old enough to be removed.
    pub retention: Timer,
    pub leases: Leases,
}

/// What a transaction adds to them.
#[derive(Debug, Clone, Copy)]
pub struct Moments {
    pub due: i64,
    pub retention: i64,
    pub claims: i64,
    pub lease_end: i64,
}

impl Timers {
    pub fn reset(&self) {
        self.alarm.clear();
        for timer in [&self.due, &self.retention] {
            timer.reset();
        }
        self.leases.reset();
    }

    /// At commit. Returns the earliest moment that was handed over, for [`Alarm::ring`].
    pub fn note(&self, new: &Moments) -> i64 {
        self.due.set(new.due);
        self.retention.set(new.retention);
        self.leases.note(new.claims, new.lease_end);
        new.due.min(new.retention).min(new.lease_end)
    }

    /// For the worker: the next moment to wake at.
    pub fn moment(&self) -> i64 {
        self.due.moment().min(self.retention.moment()).min(self.leases.moment())
    }

    /// For the worker, before it sleeps: until when it may. None: there is something to do. Whoever did not see the alarm
    /// set has done its work before `asked` looks.
    pub fn arm(&self, asked: impl FnOnce() -> bool) -> Option<i64> {
        let until = self.moment();
        self.alarm.set(until);
        if asked() || self.moment() < until {
            self.alarm.clear();
            return None;
        }
        Some(until)
    }

    /// For the worker: everything is to be looked at anew at that moment, because the clock or a setting has changed.
    pub fn look_at_all(&self, at: i64) {
        self.due.set(at);
        self.retention.set(at);
        self.leases.look(at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timers() -> Timers {
        let timers = Timers::default();
        timers.reset();
        timers
    }

    const NOTHING: Moments = Moments { due: NEVER, retention: NEVER, claims: 0, lease_end: NEVER };

    fn claim(end: i64) -> Moments {
        Moments { claims: 1, lease_end: end, ..NOTHING }
    }

    const ACK: Moments = Moments { claims: -1, ..NOTHING };

    /// The worker goes to sleep, if nothing keeps it from it. Returns until when it sleeps.
    fn sleep(timers: &Timers) -> Option<i64> {
        timers.arm(|| false)
    }

    #[test]
    fn a_lease_is_kept_though_a_settled_claim_would_have_ended_earlier() {
        let timers = timers();
        assert_eq!(sleep(&timers), Some(NEVER));
        assert!(timers.alarm.ring(timers.note(&claim(4))));
        timers.alarm.ring(timers.note(&ACK));
        assert_eq!(sleep(&timers), Some(NEVER));
        assert!(timers.alarm.ring(timers.note(&claim(6))), "nobody would wake the worker");
        assert_eq!(sleep(&timers), Some(6));
        assert!(timers.leases.take(6));
    }

    #[test]
    fn what_is_due_later_than_the_worker_wakes_anyway_wakes_nobody() {
        let timers = timers();
        timers.note(&Moments { due: 5, ..NOTHING });
        assert_eq!(sleep(&timers), Some(5));
        assert!(!timers.alarm.ring(timers.note(&Moments { due: 7, ..NOTHING })));
        assert!(timers.alarm.ring(AT_ONCE));
        assert!(!timers.alarm.ring(AT_ONCE), "woken twice");
    }

    #[test]
    fn a_moment_before_all_others_still_counts_as_sleep() {
        let timers = timers();
        timers.alarm.set(AT_ONCE);
        assert!(timers.alarm.is_set() && timers.alarm.ring(AT_ONCE));
        assert!(!timers.alarm.is_set());
    }
}

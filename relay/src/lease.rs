//! Until when a claim holds, by clocks that go on while the process stands still or the machine sleeps: what is not ours
//! any more must not be delivered.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant, SystemTime};

/// Of one claim, shared by all that it handed out.
#[derive(Debug)]
pub struct Lease(Mutex<Term>);

#[derive(Debug)]
struct Term {
    began: Instant,
    /// The monotonic clock may stop while the machine sleeps; this one doesn't.
    began_by_calendar: SystemTime,
    length: Duration,
}

impl Lease {
    /// Asked for at that moment, so that it ends here before it does at the server.
    pub fn new(asked: Asked, length: Duration) -> Self {
        Lease(Mutex::new(asked.term(length)))
    }

    pub fn renew(&self, asked: Asked, length: Duration) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = asked.term(length);
    }

    /// Whether it has ended, by either clock.
    pub fn is_over(&self) -> bool {
        let term = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let slept = term.began_by_calendar.elapsed().unwrap_or_default();
        term.began.elapsed().max(slept) >= term.length
    }
}

/// The moment a claim or a renewal was asked for.
#[derive(Debug, Clone, Copy)]
pub struct Asked(Instant, SystemTime);

impl Asked {
    pub fn now() -> Self {
        Asked(Instant::now(), SystemTime::now())
    }

    fn term(self, length: Duration) -> Term {
        Term { began: self.0, began_by_calendar: self.1, length }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_ends_by_whichever_clock_went_further() {
        let (now, wall) = (Instant::now(), SystemTime::now());
        let minute = Duration::from_secs(60);
        let lease = Lease::new(Asked(now, wall), minute);
        assert!(!lease.is_over());
        lease.renew(Asked(now, wall - minute), minute);
        assert!(lease.is_over(), "the machine slept");
        lease.renew(Asked(now, wall + minute), minute);
        assert!(!lease.is_over(), "the calendar was set back");
        lease.renew(Asked(now, wall), Duration::ZERO);
        assert!(lease.is_over());
    }
}

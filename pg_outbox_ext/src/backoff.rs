//! Trying again: when, and when to say so. Pure; the clock is the caller's, microseconds of a monotonic one.

const FIRST: i64 = 100_000;
const MOST: i64 = 5_000_000;

/// After each failure in a row twice as long, from 100 ms to 5 s.
#[derive(Debug, Default, Clone, Copy)]
pub struct Backoff {
    failures: u32,
    pause: Pause,
}

impl Backoff {
    pub fn failed(&mut self, now: i64) {
        self.failures = self.failures.saturating_add(1);
        self.pause = Pause::new(now, (FIRST << (self.failures - 1).min(10)).min(MOST));
    }

    pub fn succeeded(&mut self) {
        *self = Backoff::default();
    }

    /// What was in the way may be gone: the next try is not to wait.
    pub fn cut_short(&mut self) {
        self.pause = Pause::default();
    }

    /// How often in a row it failed.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// Time until the next try; 0: now.
    pub fn left(&self, now: i64) -> i64 {
        self.pause.left(now)
    }

    /// Whether this failure is to be logged: the first, and each that makes them twice as many.
    pub fn is_worth_a_line(&self) -> bool {
        self.failures.is_power_of_two()
    }
}

/// A time to wait. Where even a monotonic clock is turned back (a debugger, a simulated clock) it is over.
#[derive(Debug, Default, Clone, Copy)]
pub struct Pause {
    since: i64,
    length: i64,
}

impl Pause {
    pub fn new(since: i64, length: i64) -> Self {
        Pause { since, length }
    }

    /// 0: over.
    pub fn left(&self, now: i64) -> i64 {
        match now.saturating_sub(self.since) {
            gone if gone < 0 => 0,
            gone => (self.length - gone).max(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_tried_again_ever_later_and_not_later_than_that() {
        let mut backoff = Backoff::default();
        assert_eq!(backoff.left(7), 0);
        let waits: Vec<i64> = (0..40)
            .map(|_| {
                backoff.failed(1000);
                backoff.left(1000)
            })
            .collect();
        assert_eq!(waits[..4], [100_000, 200_000, 400_000, 800_000]);
        assert!(waits[6..].iter().all(|wait| *wait == MOST));
        backoff.cut_short();
        assert_eq!((backoff.left(1000), backoff.failures()), (0, 40));
        backoff.succeeded();
        assert_eq!((backoff.left(1000), backoff.failures()), (0, 0));
    }

    #[test]
    fn a_hundred_failures_are_seven_lines() {
        let mut backoff = Backoff::default();
        let lines = (0..100).filter(|now| {
            backoff.failed(*now);
            backoff.is_worth_a_line()
        });
        assert_eq!(lines.count(), 7);
    }

    #[test]
    fn a_pause_ends_when_its_clock_is_turned_back() {
        let pause = Pause::new(20_000_000, 2000);
        assert_eq!((pause.left(20_000_500), pause.left(20_002_000), pause.left(1)), (1500, 0, 0));
    }
}

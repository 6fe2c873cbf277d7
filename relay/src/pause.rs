//! A destination that is left alone: when it is to be tried again. Pure: the caller brings the clock.

use std::time::{Duration, Instant};

use crate::backoff::Backoff;

const SHORTEST: Duration = Duration::from_millis(250);
const LONGEST: Duration = Duration::from_secs(30);

/// A try that finds nothing to do is not repeated for this long, and for twice as long each time, however many events
/// others get.
const REST: Duration = Duration::from_millis(100);
const LONGEST_REST: Duration = Duration::from_secs(10);

/// The database's own moment, which is set later, should have come.
const SLACK: Duration = Duration::from_millis(20);

pub struct Pause {
    until: Instant,
    backoff: Option<Backoff>,
    /// Something may be owed to it: only then it is tried.
    owed: bool,
    rest: Duration,
    /// What was told of it last.
    told: Option<String>,
}

impl Pause {
    /// May be tried once at once: for what is owed to it says why it is not delivered.
    pub fn new(now: Instant) -> Self {
        Pause { until: now, backoff: Backoff::new(SHORTEST, LONGEST), owed: true, rest: REST, told: None }
    }

    pub fn something_is_owed(&mut self) {
        self.owed = true;
    }

    /// When it is to be tried; none if nothing is known to be owed to it.
    pub fn due(&self) -> Option<Instant> {
        self.owed.then_some(self.until)
    }

    /// One event is asked for. Should there be none, the next try waits for news.
    pub fn tried(&mut self, now: Instant) {
        self.owed = false;
        self.until = now + self.rest;
        self.rest = (self.rest * 2).min(LONGEST_REST);
    }

    /// It failed again: the next try is later, and after `at_least`. Whether that is news to an operator.
    pub fn failed(&mut self, now: Instant, at_least: Duration, what: &str) -> bool {
        let wait = self.backoff.as_mut().map_or(LONGEST, |backoff| backoff.next().max(SHORTEST / 2));
        let at_least = if at_least.is_zero() { at_least } else { at_least + SLACK };
        self.until = now + wait.max(at_least);
        (self.owed, self.rest) = (true, REST);
        let news = self.told.as_deref() != Some(what);
        self.told = Some(what.to_owned());
        news
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Pause {
        fn is_due(&self, now: Instant) -> bool {
            self.due().is_some_and(|at| at <= now)
        }
    }

    #[test]
    fn it_is_tried_at_once_and_then_only_when_something_is_owed() {
        let now = Instant::now();
        let mut pause = Pause::new(now);
        assert!(pause.is_due(now));
        pause.tried(now);
        assert_eq!(pause.due(), None, "nothing came");
        pause.something_is_owed();
        assert!(!pause.is_due(now) && pause.is_due(now + REST));
        pause.tried(now);
        pause.something_is_owed();
        assert!(!pause.is_due(now + REST) && pause.is_due(now + REST * 2), "nothing came again");
        assert!(pause.failed(now, Duration::ZERO, "no files"));
        assert!(!pause.failed(now, Duration::ZERO, "no files"), "told already");
        assert!(pause.due().is_some_and(|at| at > now && at <= now + LONGEST));
    }

    #[test]
    fn a_wait_that_was_asked_for_is_kept() {
        let now = Instant::now();
        let mut pause = Pause::new(now);
        pause.failed(now, Duration::from_secs(7200), "429");
        assert!(!pause.is_due(now + Duration::from_secs(7200)) && pause.is_due(now + Duration::from_secs(7201)));
    }
}

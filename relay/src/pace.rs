//! How fast a receiver that throttles may be called. After a throttle one request at a time, at the rate that it had just
//! borne; both grow with its successes, slowly, until it throttles again. Pure: the caller brings the clock.
//!
//! A receiver that never throttles is not slowed down.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// The time over which successes are counted when a receiver throttles.
const SECOND: Duration = Duration::from_secs(1);

/// A receiver that bears more a second is not paced by time.
const MAX_COUNTED: usize = 500;

const LONGEST: Duration = Duration::from_secs(10);
const SHORTEST: Duration = Duration::from_millis(2);

/// After an outage, which tells of no rate.
const AFTER_OUTAGE: Duration = Duration::from_millis(20);

/// Each success shortens the interval by this share.
const BY_SUCCESS: f64 = 0.005;

/// Without a throttle the interval shortens by this time constant too, in seconds.
const BY_TIME: f64 = 120.0;

/// After a throttle at a rate that it had borne before, the interval is longer by this share.
const BACK_OFF: f64 = 1.1;

pub struct Pace {
    ceiling: usize,
    allowed: f64,
    interval: Duration,
    next: Option<Instant>,
    recent: VecDeque<Instant>,
    changed: Option<Instant>,
}

impl Pace {
    /// `ceiling`: requests under way at once, at most.
    pub fn new(ceiling: usize) -> Self {
        Pace {
            ceiling,
            allowed: ceiling as f64,
            interval: Duration::ZERO,
            next: None,
            recent: VecDeque::new(),
            changed: None,
        }
    }

    pub fn set_ceiling(&mut self, ceiling: usize) {
        if self.allowed >= self.ceiling as f64 {
            self.allowed = ceiling as f64;
        }
        self.ceiling = ceiling;
        self.allowed = self.allowed.min(ceiling as f64);
    }

    /// It slows nobody down: a new one would do as well.
    pub fn is_at_rest(&self) -> bool {
        self.interval.is_zero() && self.allowed >= self.ceiling as f64
    }

    /// Nothing is to be sent for a while. What was counted has no meaning then.
    pub fn rest(&mut self) {
        self.recent = VecDeque::new();
    }

    /// Whether one more may begin while so many are under way.
    pub fn has_room(&self, under_way: usize) -> bool {
        (under_way as f64) < self.allowed.floor().max(1.0)
    }

    /// When the next may begin, if that is not now.
    pub fn not_before(&self, now: Instant) -> Option<Instant> {
        self.next.filter(|next| *next > now)
    }

    pub fn began(&mut self, now: Instant) {
        if !self.interval.is_zero() {
            self.next = Some(now + self.interval);
        }
    }

    pub fn succeeded(&mut self, now: Instant) {
        self.allowed = (self.allowed + 1.0 / self.allowed.max(1.0)).min(self.ceiling as f64);
        if self.recent.len() >= MAX_COUNTED {
            self.recent.pop_front();
        }
        self.recent.push_back(now);
        self.quicken(now);
    }

    fn quicken(&mut self, now: Instant) {
        if self.interval.is_zero() {
            return;
        }
        let passed = self.changed.map_or(0.0, |at| now.saturating_duration_since(at).as_secs_f64());
        self.changed = Some(now);
        self.interval = self.interval.mul_f64((1.0 - BY_SUCCESS) * (-passed / BY_TIME).exp());
        if self.interval < SHORTEST {
            (self.interval, self.next) = (Duration::ZERO, None);
        }
    }

    pub fn throttled(&mut self, now: Instant) {
        self.allowed = 1.0;
        self.changed = Some(now);
        let borne = self.recent.iter().filter(|at| now.saturating_duration_since(**at) < SECOND).count();
        let measured = match borne {
            0 | MAX_COUNTED.. => Duration::ZERO,
            n => SECOND / u32::try_from(n).unwrap_or(u32::MAX),
        };
        self.interval = match borne {
            0 => self.interval.max(AFTER_OUTAGE),
            _ => measured.max(self.interval.mul_f64(BACK_OFF)).min(LONGEST),
        };
        self.recent.clear();
        self.next = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A receiver that takes so many a second, and the requests that it gets for so many events.
    fn requests(events: usize, allowed: usize, retry_after: Duration) -> (usize, Duration) {
        let (mut pace, start) = (Pace::new(10), Instant::now());
        let (mut now, mut taken, mut requests) = (start, VecDeque::<Instant>::new(), 0);
        let mut left = events;
        while left > 0 {
            now = pace.not_before(now).unwrap_or(now);
            pace.began(now);
            requests += 1;
            now += Duration::from_millis(2);
            while taken.front().is_some_and(|at| now - *at >= SECOND) {
                taken.pop_front();
            }
            if taken.len() < allowed {
                taken.push_back(now);
                pace.succeeded(now);
                left -= 1;
            } else {
                pace.throttled(now);
                now += retry_after;
            }
        }
        (requests, now - start)
    }

    #[test]
    fn few_requests_are_wasted_on_a_receiver_that_throttles() {
        let (sent, took) = requests(600, 5, Duration::from_secs(2));
        assert!(sent < 660, "{sent} requests for 600 events");
        assert!(took < Duration::from_secs(240), "{took:?} where 120 s are the least");
    }

    #[test]
    fn after_a_throttle_one_is_under_way_and_successes_bring_more() {
        let (mut pace, mut now) = (Pace::new(4), Instant::now());
        assert!(pace.has_room(3) && !pace.has_room(4) && pace.not_before(now).is_none());
        pace.throttled(now);
        assert!(pace.has_room(0) && !pace.has_room(1) && !pace.is_at_rest());
        for _ in 0..2000 {
            now = pace.not_before(now).unwrap_or(now);
            pace.began(now);
            pace.succeeded(now);
        }
        assert!(pace.has_room(3) && !pace.has_room(4));
        assert_eq!(pace.not_before(now), None, "as if it had never throttled");
        assert!(pace.is_at_rest());
    }

    #[test]
    fn an_outage_does_not_leave_a_pace_that_nobody_asked_for() {
        let (mut pace, mut now) = (Pace::new(4), Instant::now());
        for _ in 0..20 {
            pace.throttled(now);
        }
        let start = now;
        for _ in 0..300 {
            now = pace.not_before(now).unwrap_or(now);
            pace.began(now);
            pace.succeeded(now);
        }
        assert!(now - start < Duration::from_secs(5), "{:?}", now - start);
    }
}

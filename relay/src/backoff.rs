//! How long to wait before the next try: exponential with full jitter, so that many relays don't come back at once.
//! Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

/// A uniform draw from 0 to `min(cap, base * 2^tries)`; `reset` starts anew.
#[derive(Debug, Clone)]
pub struct Backoff {
    base: Duration,
    cap: Duration,
    tries: u32,
}

impl Backoff {
    /// `None` unless `0 < base <= cap`.
    pub fn new(base: Duration, cap: Duration) -> Option<Self> {
        (!base.is_zero() && base <= cap).then_some(Backoff { base, cap, tries: 0 })
    }

    /// The wait before the next try.
    pub fn next(&mut self) -> Duration {
        let wait = self.ceiling().mul_f64(draw());
        self.tries = self.tries.saturating_add(1);
        wait
    }

    pub fn reset(&mut self) {
        self.tries = 0;
    }

    fn ceiling(&self) -> Duration {
        let factor = 1u32.checked_shl(self.tries.min(31)).unwrap_or(u32::MAX);
        self.base.checked_mul(factor).map_or(self.cap, |wait| wait.min(self.cap))
    }
}

/// A number from 0 to 1, from the random keys that the standard library gives each hasher.
fn draw() -> f64 {
    let bits = RandomState::new().build_hasher().finish() >> 11;
    bits as f64 / (1u64 << 53) as f64
}

/// Any order, each as likely as the others.
pub fn shuffle<T>(items: &mut [T]) {
    for i in (1..items.len()).rev() {
        items.swap(i, ((i + 1) as f64 * draw()) as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: Duration = Duration::from_millis(100);
    const CAP: Duration = Duration::from_secs(10);

    #[test]
    fn refuses_what_makes_no_schedule() {
        assert!(Backoff::new(Duration::ZERO, CAP).is_none());
        assert!(Backoff::new(CAP, BASE).is_none());
        assert!(Backoff::new(CAP, CAP).is_some());
    }

    #[test]
    fn the_ceiling_doubles_up_to_the_cap_and_never_overflows() {
        let mut backoff = Backoff::new(BASE, CAP).unwrap();
        for expected in [100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000] {
            assert_eq!(backoff.ceiling(), Duration::from_millis(expected));
            assert!(backoff.next() <= Duration::from_millis(expected));
        }
        backoff.tries = u32::MAX;
        assert_eq!(backoff.ceiling(), CAP);
        backoff.next();
        backoff.reset();
        assert_eq!(backoff.ceiling(), BASE);
    }

    #[test]
    fn the_jitter_is_spread_over_the_whole_range() {
        let draws: Vec<f64> = (0..1000).map(|_| draw()).collect();
        assert!(draws.iter().all(|d| (0.0..1.0).contains(d)));
        assert!(draws.iter().any(|d| *d < 0.1) && draws.iter().any(|d| *d > 0.9));
    }
}

//! The last attempts of this relay, and that something has happened: what lanes and the dispatcher tell the page. Without a
//! page nothing is kept, and a call costs one relaxed load.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use tokio::sync::Notify;
use uuid::Uuid;

use crate::destination::{Event, Outcome};

/// Attempts that are kept.
const KEPT: usize = 1000;

/// Characters of an error that are kept.
const ERROR: usize = 500;

static HEARD: OnceLock<Heard> = OnceLock::new();

#[derive(Default)]
pub struct Heard {
    /// Holds a permit when something has happened since somebody looked.
    pub happened: Notify,
    ring: Mutex<Ring>,
}

#[derive(Default)]
struct Ring {
    attempts: VecDeque<Attempt>,
    /// The number of the newest.
    last: u64,
}

/// One attempt, as the page shows it.
#[derive(Clone, Serialize)]
pub struct Attempt {
    pub number: u64,
    at_ms: u64,
    event_id: Uuid,
    event_type: String,
    destination: Arc<str>,
    attempt: u32,
    outcome: &'static str,
    error: Option<String>,
    took_ms: f64,
}

/// Begins to keep what happens.
pub fn begin() -> &'static Heard {
    HEARD.get_or_init(Heard::default)
}

/// Something may look different now.
pub fn happened() {
    if let Some(heard) = HEARD.get() {
        heard.happened.notify_one();
    }
}

/// An attempt has ended.
pub fn attempted(event: &Event, destination: &Arc<str>, attempt: u32, outcome: &Outcome, took: Duration) {
    if let Some(heard) = HEARD.get() {
        heard.attempted(event, destination, attempt, outcome, took);
        heard.happened.notify_one();
    }
}

fn word(outcome: &Outcome) -> &'static str {
    match outcome {
        Outcome::Delivered => "delivered",
        Outcome::Failed { .. } => "failed",
        Outcome::Rejected { .. } => "rejected",
        Outcome::Unavailable { .. } => "unavailable",
        Outcome::Throttled { .. } => "throttled",
        Outcome::Gone { .. } => "gone",
        Outcome::Unable { .. } => "unable",
    }
}

impl Heard {
    fn attempted(&self, event: &Event, destination: &Arc<str>, attempt: u32, outcome: &Outcome, took: Duration) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let error = outcome.error().map(|error| error.chars().take(ERROR).collect());
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        if ring.attempts.len() == KEPT {
            ring.attempts.pop_front();
        }
        ring.last += 1;
        let number = ring.last;
        ring.attempts.push_back(Attempt {
            number,
            at_ms: u64::try_from(now.as_millis()).unwrap_or(u64::MAX),
            event_id: event.event_id,
            event_type: event.event_type.clone(),
            destination: destination.clone(),
            attempt,
            outcome: word(outcome),
            error,
            took_ms: took.as_secs_f64() * 1000.0,
        });
    }

    /// Those after a number, oldest first.
    pub fn after(&self, number: u64) -> Vec<Attempt> {
        let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let known = ring.attempts.partition_point(|attempt| attempt.number <= number);
        ring.attempts.range(known..).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::destination::sample_event;

    #[test]
    fn the_last_attempts_are_kept_in_order() {
        let heard = Heard::default();
        let outcome = Outcome::Rejected { error: "x".repeat(10_000) };
        for n in 0..KEPT + 10 {
            let attempt = u32::try_from(n).unwrap();
            heard.attempted(&sample_event(), &"hook".into(), attempt, &outcome, Duration::from_millis(2));
        }
        let all = heard.after(0);
        assert_eq!(all.len(), KEPT);
        assert!(all.windows(2).all(|pair| pair[0].number + 1 == pair[1].number));
        let last = &all[KEPT - 1];
        assert_eq!(heard.after(last.number - 1).len(), 1);
        assert_eq!(last.error.as_ref().map(String::len), Some(ERROR));
        assert_eq!(last.outcome, "rejected");
    }
}

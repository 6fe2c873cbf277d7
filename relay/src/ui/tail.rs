//! The last attempts of this relay, those under way, and that something has happened: what lanes and the dispatcher tell the
//! page. Without a page nothing is kept, and a call costs one relaxed load.

use std::collections::{BTreeMap, VecDeque};
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
    /// By destination, how many attempts are under way.
    under_way: Mutex<BTreeMap<Arc<str>, usize>>,
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

/// An attempt is under way until this is dropped.
pub struct UnderWay(Option<(&'static Heard, Arc<str>)>);

pub fn begun(destination: &Arc<str>) -> UnderWay {
    UnderWay(HEARD.get().map(|heard| {
        heard.begun(destination);
        (heard, destination.clone())
    }))
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        if let Some((heard, destination)) = &self.0 {
            heard.ended(destination);
        }
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

    fn begun(&self, destination: &Arc<str>) {
        let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        *under_way.entry(destination.clone()).or_default() += 1;
    }

    fn ended(&self, destination: &Arc<str>) {
        let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        match under_way.get_mut(destination) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(under_way.remove(destination)),
        }
    }

    /// How many attempts are under way, for each destination with any.
    pub fn under_way(&self) -> BTreeMap<Arc<str>, usize> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner).clone()
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
    fn attempts_under_way_are_counted_by_destination() {
        let heard = Heard::default();
        ["crm", "crm", "mq"].iter().for_each(|name| heard.begun(&(*name).into()));
        assert_eq!(heard.under_way(), BTreeMap::from([("crm".into(), 2), ("mq".into(), 1)]));
        ["crm", "mq"].iter().for_each(|name| heard.ended(&(*name).into()));
        assert_eq!(heard.under_way(), BTreeMap::from([("crm".into(), 1)]));
    }

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

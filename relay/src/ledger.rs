//! What the relay holds and what it has to report. Pure: the caller brings the clock.
//!
//! An event that went to all its destinations is one entry in a settlement. Anything else is reported delivery by
//! delivery: a failure at once, and what went well when the rest of the event takes longer than [`PATIENCE`].

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::budget::{Load, Size};
use crate::destination::Outcome;
use crate::lease::{Asked, Lease};
use crate::store::Exception;

/// How long a delivery that went well waits for the others of its event.
pub const PATIENCE: Duration = Duration::from_millis(250);

/// How often the database is told, at most, that a destination answers: for everybody's judgement of a failure.
pub const NEWS: Duration = Duration::from_secs(2);

/// An event in one claim.
pub type Key = (i64, i64);

/// What became of one delivery.
#[derive(Debug, Clone, PartialEq)]
pub enum Ended {
    With(Outcome),
    /// Not tried, or not to be counted: goes back.
    Released,
}

struct Held {
    open: u32,
    delivered: Vec<Arc<str>>,
    /// Reported delivery by delivery from now on.
    split: bool,
    event_id: Uuid,
    size: Size,
}

/// One call of `outbox.settle`.
#[derive(Default)]
pub struct Settlement {
    pub tokens: Vec<i64>,
    pub ids: Vec<i64>,
    pub exceptions: Vec<Exception>,
    /// The events that went to all that they were handed out for.
    pub delivered: Vec<Uuid>,
}

impl Settlement {
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty() && self.exceptions.is_empty()
    }

    fn len(&self) -> usize {
        self.ids.len() + self.exceptions.len()
    }
}

#[derive(Default)]
pub struct Ledger {
    held: HashMap<Key, Held>,
    load: Load,
    claims: HashMap<i64, Claim>,
    /// When the lease of each claim is to be renewed.
    renewals: BTreeSet<(Instant, i64)>,
    ready: VecDeque<Settlement>,
    /// Claims to give back as a whole, once everything else is reported; `Some` from the shutdown on.
    given_back: Option<HashSet<i64>>,
    partial: VecDeque<(Instant, Key)>,
    /// When a destination's last success was reported.
    answered: HashMap<Arc<str>, Instant>,
    /// So many are remembered before those that matter no more are forgotten.
    answered_most: usize,
}

struct Claim {
    held: usize,
    renew_at: Instant,
    lease: Arc<Lease>,
}

/// The most entries in one settlement.
const BATCH: usize = 1000;

/// The fewest destinations of which it is remembered when they answered.
const ANSWERED: usize = 256;

impl Ledger {
    /// Takes an event into the books, with the number of its deliveries and the size of its payload.
    pub fn hold(
        &mut self,
        key: Key,
        deliveries: usize,
        event_id: Uuid,
        size: Size,
        renew_at: Instant,
        lease: &Arc<Lease>,
    ) {
        let open = u32::try_from(deliveries).unwrap_or(u32::MAX);
        let held = Held { open, delivered: Vec::new(), split: false, event_id, size };
        self.load.add(size);
        match self.held.insert(key, held) {
            Some(before) => self.load.remove(before.size),
            None => {
                let claim = self.claims.entry(key.0);
                claim
                    .or_insert_with(|| {
                        self.renewals.insert((renew_at, key.0));
                        Claim { held: 0, renew_at, lease: lease.clone() }
                    })
                    .held += 1;
            }
        }
    }

    /// What is held now.
    pub fn load(&self) -> Load {
        self.load
    }

    pub fn is_empty(&self) -> bool {
        self.held.is_empty() && self.ready.is_empty()
    }

    /// Enters how a delivery ended.
    pub fn ended(&mut self, key: Key, destination: &Arc<str>, ended: Ended, now: Instant) {
        let Some(held) = self.held.get_mut(&key) else {
            return;
        };
        held.open = held.open.saturating_sub(1);
        let last = held.open == 0;
        if ended == Ended::With(Outcome::Delivered) {
            self.answers(destination, now);
        }
        let Some(held) = self.held.get_mut(&key) else {
            return;
        };
        match ended {
            Ended::With(Outcome::Delivered) if !held.split && last => {
                let event_id = held.event_id;
                let batch = self.batch();
                batch.tokens.push(key.0);
                batch.ids.push(key.1);
                batch.delivered.push(event_id);
            }
            Ended::With(Outcome::Delivered) if !held.split => {
                if held.delivered.is_empty() {
                    self.partial.push_back((now + PATIENCE, key));
                }
                held.delivered.push(destination.clone());
            }
            Ended::Released if self.given_back.is_some() => {
                self.split(key);
                self.given_back.get_or_insert_default().insert(key.0);
            }
            other => {
                self.split(key);
                self.batch().exceptions.push(exception(key, destination, other));
            }
        }
        if last {
            self.forget(key);
        }
    }

    /// What failed elsewhere is judged by whether somebody has just delivered there.
    fn answers(&mut self, destination: &Arc<str>, now: Instant) {
        let is_old = |at: &Instant| now.saturating_duration_since(*at) >= NEWS;
        if self.answered.get(destination).is_none_or(is_old) {
            if self.answered.len() >= self.answered_most.max(ANSWERED) {
                self.answered.retain(|_, at| !is_old(at));
                self.answered_most = self.answered.len() * 2;
            }
            self.answered.insert(destination.clone(), now);
            self.batch().exceptions.push(Exception {
                token: 0,
                id: 0,
                destination: destination.clone(),
                outcome: "answered",
                error: None,
                retry_in: None,
            });
        }
    }

    /// The next success is reported at once.
    pub fn doubt(&mut self, destination: &str) {
        self.answered.remove(destination);
    }

    /// Reports this event delivery by delivery from now on, beginning with what has ended.
    fn split(&mut self, key: Key) {
        let Some(held) = self.held.get_mut(&key) else {
            return;
        };
        held.split = true;
        for destination in std::mem::take(&mut held.delivered) {
            let done = exception(key, &destination, Ended::With(Outcome::Delivered));
            self.batch().exceptions.push(done);
        }
    }

    fn forget(&mut self, key: Key) {
        if let Some(held) = self.held.remove(&key) {
            self.load.remove(held.size);
        }
        if let Some(claim) = self.claims.get_mut(&key.0) {
            claim.held -= 1;
            if claim.held == 0 {
                self.renewals.remove(&(claim.renew_at, key.0));
                self.claims.remove(&key.0);
            }
        }
    }

    fn batch(&mut self) -> &mut Settlement {
        if self.ready.back().is_none_or(|last| last.len() >= BATCH) {
            self.ready.push_back(Settlement::default());
        }
        let last = self.ready.len() - 1;
        &mut self.ready[last]
    }

    /// From now on what is given back is not reported one by one: its claims are, whole, at the end.
    pub fn stop(&mut self) {
        self.given_back.get_or_insert_default();
    }

    /// The claims to give back, when nothing else is held or to be reported any more.
    pub fn take_given_back(&mut self) -> Vec<i64> {
        match &mut self.given_back {
            Some(tokens) if self.held.is_empty() && self.ready.is_empty() => tokens.drain().collect(),
            _ => Vec::new(),
        }
    }

    /// The next settlement to send.
    pub fn settlement(&mut self) -> Option<Settlement> {
        self.ready.pop_front().filter(|settlement| !settlement.is_empty())
    }

    /// Reports what went well of events whose other destinations take too long; says when to call again.
    pub fn report_partial(&mut self, now: Instant) -> Option<Instant> {
        while let Some(&(due, key)) = self.partial.front() {
            let waiting = self.held.get(&key).is_some_and(|held| !held.split);
            if waiting && due > now {
                return Some(due);
            }
            self.partial.pop_front();
            if waiting {
                self.split(key);
            }
        }
        None
    }

    /// When the next lease is to be renewed.
    pub fn next_renewal(&self) -> Option<Instant> {
        self.renewals.first().map(|(at, _)| *at)
    }

    /// The server has renewed these leases.
    pub fn renewed(&self, tokens: &[i64], asked: Asked, length: Duration) {
        tokens.iter().filter_map(|token| self.claims.get(token)).for_each(|claim| claim.lease.renew(asked, length));
    }

    /// The claims whose leases are to be renewed now.
    pub fn renew(&mut self, now: Instant, next: Instant) -> Vec<i64> {
        let due: Vec<i64> = self.renewals.iter().take_while(|(at, _)| *at <= now).map(|(_, token)| *token).collect();
        for token in &due {
            if let Some(claim) = self.claims.get_mut(token) {
                self.renewals.remove(&(claim.renew_at, *token));
                self.renewals.insert((next, *token));
                claim.renew_at = next;
            }
        }
        due
    }
}

/// A delivery as `outbox.settle` takes it.
pub fn exception(key: Key, destination: &Arc<str>, ended: Ended) -> Exception {
    let (outcome, error, retry_in) = match ended {
        Ended::Released => ("released", None, None),
        Ended::With(Outcome::Delivered) => ("delivered", None, None),
        Ended::With(Outcome::Failed { error, retry_in }) => ("failed", Some(error), retry_in),
        Ended::With(Outcome::Rejected { error }) => ("rejected", Some(error), None),
        Ended::With(Outcome::Unavailable { error }) => ("unavailable", Some(error), None),
        Ended::With(Outcome::Throttled { error, retry_in }) => ("throttled", Some(error), retry_in),
        Ended::With(Outcome::Gone { error }) => ("gone", Some(error), None),
        Ended::With(Outcome::Unable { error }) => ("unable", Some(error), None),
    };
    let retry_in = retry_in.map(|wait| wait.as_secs_f64());
    Exception { token: key.0, id: key.1, destination: destination.clone(), outcome, error, retry_in }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger(deliveries: usize) -> (Ledger, Instant) {
        let mut ledger = Ledger::default();
        let now = Instant::now();
        ledger.hold((1, 5), deliveries, Uuid::nil(), SIZE, now + Duration::from_secs(20), &lease());
        for destination in ["a", "b", "c"] {
            ledger.answered.insert(name(destination), now);
        }
        (ledger, now)
    }

    fn lease() -> Arc<Lease> {
        Arc::new(Lease::new(Asked::now(), Duration::from_secs(60)))
    }

    fn name(text: &str) -> Arc<str> {
        Arc::from(text)
    }

    fn failed() -> Ended {
        Ended::With(Outcome::Failed { error: "500".into(), retry_in: Some(Duration::from_secs(2)) })
    }

    const SIZE: Size = Size { bytes: 10, large: false };

    const DELIVERED: Ended = Ended::With(Outcome::Delivered);

    #[test]
    fn delivered_everywhere_is_one_entry() {
        let (mut ledger, now) = ledger(2);
        ledger.ended((1, 5), &name("a"), DELIVERED, now);
        assert!(ledger.settlement().is_none());
        ledger.ended((1, 5), &name("b"), DELIVERED, now);
        let settlement = ledger.settlement().unwrap();
        assert_eq!((settlement.tokens, settlement.ids), (vec![1], vec![5]));
        assert!(settlement.exceptions.is_empty() && ledger.is_empty());
        assert_eq!(ledger.load(), Load::default());
        assert_eq!(ledger.report_partial(now), None);
        assert_eq!(ledger.next_renewal(), None);
    }

    #[test]
    fn a_failure_is_told_at_once_and_the_rest_delivery_by_delivery() {
        let (mut ledger, now) = ledger(3);
        ledger.ended((1, 5), &name("a"), DELIVERED, now);
        ledger.ended((1, 5), &name("b"), failed(), now);
        let told = ledger.settlement().unwrap();
        let outcomes: Vec<_> = told.exceptions.iter().map(|e| (&*e.destination, e.outcome)).collect();
        assert_eq!(outcomes, [("a", "delivered"), ("b", "failed")]);
        assert_eq!(told.exceptions[1].retry_in, Some(2.0));
        ledger.ended((1, 5), &name("c"), DELIVERED, now);
        let last = ledger.settlement().unwrap();
        assert!(last.ids.is_empty());
        assert_eq!(last.exceptions[0].outcome, "delivered");
        assert!(ledger.is_empty());
    }

    #[test]
    fn what_went_well_does_not_wait_long_for_the_others() {
        let (mut ledger, now) = ledger(2);
        ledger.ended((1, 5), &name("a"), DELIVERED, now);
        assert_eq!(ledger.report_partial(now), Some(now + PATIENCE));
        assert!(ledger.settlement().is_none());
        assert_eq!(ledger.report_partial(now + PATIENCE), None);
        assert_eq!(ledger.settlement().unwrap().exceptions[0].outcome, "delivered");
        assert_eq!(ledger.load(), Load { events: 1, bytes: 10, large: 0 });
    }

    #[test]
    fn it_is_not_remembered_of_all_destinations_when_they_answered() {
        let mut ledger = Ledger::default();
        let now = Instant::now();
        for id in 0..10_000 {
            let now = now + Duration::from_millis(10) * u32::try_from(id).expect("a small number");
            ledger.hold((1, id), 1, Uuid::nil(), SIZE, now, &lease());
            ledger.ended((1, id), &name(&id.to_string()), DELIVERED, now);
        }
        assert!(ledger.answered.len() <= 512, "{}", ledger.answered.len());
    }

    #[test]
    fn leases_are_renewed_while_something_is_held() {
        let (mut ledger, now) = ledger(1);
        let due = ledger.next_renewal().unwrap();
        assert!(ledger.renew(now, due).is_empty());
        let next = due + Duration::from_secs(20);
        assert_eq!(ledger.renew(due, next), [1]);
        assert_eq!(ledger.next_renewal(), Some(next));
        ledger.ended((1, 5), &name("a"), Ended::Released, due);
        assert_eq!(ledger.next_renewal(), None);
    }

    #[test]
    fn settlements_are_bounded_and_keep_their_order() {
        let mut ledger = Ledger::default();
        let now = Instant::now();
        for id in 0..2500 {
            ledger.answered.insert(name("a"), now);
            ledger.hold((1, id), 1, Uuid::nil(), SIZE, now, &lease());
            ledger.ended((1, id), &name("a"), DELIVERED, now);
        }
        let sizes: Vec<_> = std::iter::from_fn(|| ledger.settlement()).map(|s| s.ids.len()).collect();
        assert_eq!(sizes, [1000, 1000, 500]);
    }

    #[test]
    fn at_the_end_claims_are_given_back_whole_after_all_else_is_reported() {
        let (mut ledger, now) = ledger(2);
        ledger.stop();
        ledger.ended((1, 5), &name("a"), Ended::Released, now);
        assert!(ledger.take_given_back().is_empty(), "b is still under way");
        ledger.ended((1, 5), &name("b"), DELIVERED, now);
        assert!(ledger.take_given_back().is_empty(), "b is not reported yet");
        assert_eq!(ledger.settlement().unwrap().exceptions[0].outcome, "delivered");
        assert_eq!(ledger.take_given_back(), [1]);
        assert!(ledger.take_given_back().is_empty() && ledger.is_empty());
    }

    #[test]
    fn successes_are_told_now_and_then_and_at_once_after_a_doubt() {
        let mut ledger = Ledger::default();
        let now = Instant::now();
        let told = |ledger: &mut Ledger, id: i64, now: Instant| {
            ledger.hold((1, id), 1, Uuid::nil(), SIZE, now, &lease());
            ledger.ended((1, id), &name("a"), DELIVERED, now);
            ledger.settlement().is_some_and(|s| s.ids == [id] && s.exceptions.iter().any(|e| e.outcome == "answered"))
        };
        assert!(told(&mut ledger, 1, now));
        assert!(!told(&mut ledger, 2, now));
        assert!(told(&mut ledger, 3, now + NEWS));
        ledger.doubt("a");
        assert!(told(&mut ledger, 4, now + NEWS));
    }

    #[test]
    fn an_end_that_nobody_waits_for_changes_nothing() {
        let (mut ledger, now) = ledger(1);
        ledger.ended((2, 5), &name("a"), failed(), now);
        assert!(ledger.settlement().is_none());
        assert_eq!(ledger.load().events, 1);
    }
}

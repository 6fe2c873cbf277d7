//! Which of the processed events to look at next, so that retention gets on whatever stands in its way. Pure; the clock is
//! the caller's, microseconds of a monotonic one.
//!
//! A round walks the table from where the last one stopped. It ends at the first events that are too young: those behind
//! them are younger still, mostly. A sweep walks on, to the end: it finds those that became processed out of order. What
//! could not be removed (a foreign key, a lock, a trigger) is passed and tried again later.

use crate::backoff::Pause;

/// Events removed in one step.
const STEP: i32 = 1000;

const SECOND: i64 = 1_000_000;
const HOUR: i64 = 3600 * SECOND;

/// What a step did: see `outbox._retain()`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Step {
    /// The last id that was looked at; none: the end of the table was reached.
    pub last: Option<i64>,
    /// The lowest id that was to go and is still there.
    pub skipped: Option<i64>,
    /// The moment (on the wall) at which the first of the younger ones can go.
    pub young: Option<i64>,
}

/// What comes after a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Another step, after a rest.
    Step,
    /// The round is over; the next begins when the first of the younger ones can go (none: there is none).
    Wait(Option<i64>),
}

#[derive(Debug)]
pub struct Retention {
    from: i64,
    step: i32,
    sweeping: bool,
    /// When `from` was the table's beginning.
    started: Option<i64>,
    swept: i64,
    young: Option<i64>,
    skipped: Option<i64>,
    /// Rounds in a row that had to leave something behind.
    left_behind: u32,
    /// The next step, or what was left behind, is not to be tried before.
    pause: Option<Pause>,
    resting: bool,
}

impl Retention {
    pub fn new(now: i64) -> Self {
        Retention {
            from: i64::MIN,
            step: STEP,
            sweeping: false,
            started: None,
            swept: now,
            young: None,
            skipped: None,
            left_behind: 0,
            pause: None,
            resting: false,
        }
    }

    /// Where the next step begins and how many events it may remove; 0: it is to pass the first of them.
    pub fn next_step(&mut self, now: i64, kept: i64) -> (i64, i32) {
        if !self.sweeping {
            self.sweeping = now - self.swept >= sweep_after(kept);
            let long_ago = self.started.is_none_or(|started| now - started >= HOUR);
            if self.sweeping || long_ago {
                (self.from, self.started) = (i64::MIN, Some(now));
            }
        }
        (self.pause, self.resting) = (None, false);
        (self.from, self.step)
    }

    /// A step that took so long is over.
    pub fn stepped(&mut self, now: i64, took: i64, kept: i64, step: Step) -> Next {
        self.young = [self.young, step.young].into_iter().flatten().min();
        self.skipped = [self.skipped, step.skipped].into_iter().flatten().min();
        if step.skipped.is_none() || self.step < 10 {
            self.step = (self.step * 10).clamp(1, STEP);
        }
        let onward = step.last.and_then(|last| last.checked_add(1));
        match onward {
            Some(from) if step.young.is_none() || self.sweeping => {
                self.from = from;
                // Four times as long as it worked, it leaves the machine to others.
                (self.pause, self.resting) = (Some(Pause::new(now, (4 * took).max(SECOND / 20))), true);
                Next::Step
            }
            // Nothing young stopped it, nor the end of the table: it is the end of all ids.
            _ => self.end_round(now, kept, onward.is_none()),
        }
    }

    fn end_round(&mut self, now: i64, kept: i64, at_the_end: bool) -> Next {
        if std::mem::take(&mut self.sweeping) {
            self.swept = now;
        }
        let young = self.young.take();
        let mut again = (!at_the_end).then(|| (sweep_after(kept) - (now - self.swept)).max(SECOND));
        if at_the_end {
            self.from = i64::MAX;
        }
        match self.skipped.take() {
            Some(skipped) => {
                self.from = self.from.min(skipped);
                let retry = (SECOND << self.left_behind.min(12)).min(HOUR);
                self.left_behind += 1;
                again = Some(again.map_or(retry, |again| again.min(retry)));
            }
            None if at_the_end => (self.from, self.left_behind) = (i64::MIN, 0),
            None => self.left_behind = 0,
        }
        self.pause = again.map(|length| Pause::new(now, length));
        Next::Wait(young)
    }

    /// A step failed as a whole: the next is smaller, until it passes the event that can't even be tried.
    pub fn failed(&mut self) {
        self.step /= 10;
    }

    /// Settings or the clock changed: everything is to be looked at anew.
    pub fn start_over(&mut self, now: i64) {
        *self = Retention { swept: self.swept, ..Retention::new(now) };
    }

    /// The next step comes by itself, after a rest.
    pub fn is_resting(&self, now: i64) -> bool {
        self.resting && self.left(now).is_some_and(|left| left > 0)
    }

    /// Time until the next step; none: nothing is left to do that a moment on the wall does not tell.
    pub fn left(&self, now: i64) -> Option<i64> {
        self.pause.map(|pause| pause.left(now))
    }
}

/// Processed out of order, an event is removed so much later at most.
fn sweep_after(kept: i64) -> i64 {
    (kept / 8).clamp(10 * SECOND, 24 * HOUR)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEPT: i64 = 7 * 24 * HOUR;

    fn step(last: i64) -> Step {
        Step { last: Some(last), ..Step::default() }
    }

    #[test]
    fn a_round_goes_on_behind_what_can_not_be_removed_and_comes_back_to_it() {
        let mut retention = Retention::new(0);
        assert_eq!(retention.next_step(0, KEPT), (i64::MIN, STEP));
        assert_eq!(retention.stepped(0, 10, KEPT, Step { skipped: Some(3), ..step(99) }), Next::Step);
        assert_eq!(retention.next_step(1, KEPT).0, 100);
        assert_eq!(retention.stepped(1, 10, KEPT, Step::default()), Next::Wait(None));
        assert_eq!(retention.left(1), Some(SECOND));
        assert_eq!(retention.next_step(SECOND, KEPT).0, 3);
    }

    #[test]
    fn what_is_left_behind_is_tried_ever_less_often_and_never_given_up() {
        let mut retention = Retention::new(0);
        let pauses: Vec<i64> = (0..20)
            .map(|_| {
                retention.next_step(0, KEPT);
                retention.stepped(0, 10, KEPT, Step { skipped: Some(3), ..Step::default() });
                retention.left(0).expect("it is tried again")
            })
            .collect();
        assert_eq!((pauses[0], pauses[1], pauses[19]), (SECOND, 2 * SECOND, HOUR));
    }

    #[test]
    fn young_events_in_front_end_a_round_and_hide_nothing_from_a_sweep() {
        let mut retention = Retention::new(0);
        retention.next_step(0, KEPT);
        let young = Step { young: Some(77), ..step(99) };
        assert_eq!(retention.stepped(0, 10, KEPT, young), Next::Wait(Some(77)));
        let day = 24 * HOUR;
        assert!(retention.left(0).is_some_and(|left| left <= day));
        assert_eq!(retention.next_step(day, KEPT).0, i64::MIN);
        assert_eq!(retention.stepped(day, 10, KEPT, young), Next::Step);
        assert_eq!(retention.next_step(day, KEPT).0, 100);
        assert_eq!(retention.stepped(day, 10, KEPT, Step::default()), Next::Wait(Some(77)));
        assert_eq!(retention.left(day), None);
    }

    #[test]
    fn an_event_that_stops_every_step_is_found_and_passed() {
        let mut retention = Retention::new(0);
        let mut steps = Vec::new();
        for _ in 0..4 {
            steps.push(retention.next_step(0, KEPT).1);
            retention.failed();
        }
        assert_eq!(steps, [1000, 100, 10, 1]);
        assert_eq!(retention.next_step(0, KEPT).1, 0);
        retention.stepped(0, 10, KEPT, Step { skipped: Some(5), ..step(5) });
        assert_eq!(retention.next_step(0, KEPT), (6, 1));
    }

    #[test]
    fn the_highest_id_of_all_ends_a_round() {
        let mut retention = Retention::new(0);
        retention.next_step(0, KEPT);
        assert_eq!(retention.stepped(0, 10, KEPT, step(i64::MAX)), Next::Wait(None));
    }
}

//! No wake-up is lost, however commits and the worker interleave and whatever weak memory shows them.

use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicI64, Ordering::*};
use loom::thread;
use outbox_models::ring::Ring;
use outbox_models::timers::{AT_ONCE, Moments, NEVER, Timers};

/// Every interleaving in which no more than three times a thread is stopped where it could go on.
fn model(test: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(test);
}

const NOTHING: Moments = Moments { due: NEVER, retention: NEVER, claims: 0, lease_end: NEVER };

/// The worker's database: shared memory, its latch, and the ends of leases as the table of claims has them.
#[derive(Default)]
struct Stage {
    timers: Timers,
    ring: Ring<2>,
    latch: AtomicBool,
    claims: [AtomicI64; 2],
}

impl Stage {
    fn set() -> Arc<Self> {
        let stage = Stage::default();
        stage.timers.reset();
        stage.claims.iter().for_each(|end| end.store(NEVER, Relaxed));
        Arc::new(stage)
    }

    fn commit(&self, new: &Moments) {
        self.wake_for(self.timers.note(new));
    }

    fn wake_for(&self, at: i64) {
        if self.timers.alarm.ring(at) {
            self.latch.store(true, SeqCst);
        }
    }

    /// A claim commits: its row is there before its callback runs.
    fn claim(&self, place: usize, end: i64) {
        self.claims[place].store(end, Release);
        self.commit(&Moments { claims: 1, lease_end: end, ..NOTHING });
    }

    fn ack(&self, place: usize) {
        self.claims[place].store(NEVER, Release);
        self.commit(&Moments { claims: -1, ..NOTHING });
    }

    fn insert(&self, id: i64) {
        assert!(self.ring.push(id));
        self.wake_for(AT_ONCE);
    }

    /// The worker does what is due, and says when the next thing is.
    fn work(&self, now: i64) {
        while self.ring.pop().is_some() {}
        if self.timers.leases.take(now) {
            let next = self.claims.iter().map(|end| end.load(Acquire)).filter(|end| *end > now).min();
            self.commit(&Moments { lease_end: next.unwrap_or(NEVER), ..NOTHING });
        }
        let _due = self.timers.due.take(now);
    }

    /// Until when the worker sleeps; none: it found something to do.
    fn rest(&self) -> Option<i64> {
        let until = self.timers.moment();
        self.timers.alarm.set(until);
        let idle = self.ring.len() == 0 && self.timers.moment() >= until;
        if !idle {
            self.timers.alarm.clear();
        }
        idle.then_some(until)
    }

    fn is_woken(&self) -> bool {
        self.latch.load(SeqCst)
    }
}

#[test]
fn an_event_is_not_left_in_the_ring_while_the_worker_sleeps() {
    model(|| {
        let stage = Stage::set();
        let committer = {
            let stage = stage.clone();
            thread::spawn(move || stage.insert(17))
        };
        stage.work(0);
        let asleep = stage.rest().is_some();
        committer.join().unwrap();
        assert!(!asleep || stage.is_woken() || stage.ring.len() == 0);
    });
}

#[test]
fn two_commits_wake_the_worker_and_both_are_found() {
    model(|| {
        let stage = Stage::set();
        let committers: Vec<_> = [1, 2]
            .map(|id| {
                let stage = stage.clone();
                thread::spawn(move || stage.insert(id))
            })
            .into();
        let asleep = stage.rest().is_some();
        committers.into_iter().for_each(|committer| committer.join().unwrap());
        assert!(!asleep || stage.is_woken());
        assert!((stage.ring.pop().is_some(), stage.ring.pop().is_some()) == (true, true));
    });
}

#[test]
fn what_is_due_earlier_than_the_worker_thought_wakes_it() {
    model(|| {
        let stage = Stage::set();
        stage.commit(&Moments { due: 9, ..NOTHING });
        let committer = {
            let stage = stage.clone();
            thread::spawn(move || stage.commit(&Moments { due: 5, ..NOTHING }))
        };
        let asleep = stage.rest();
        committer.join().unwrap();
        assert!(asleep.is_none_or(|until| until <= 5) || stage.is_woken());
    });
}

/// A claim is settled and another made, in turns as PostgreSQL's lock has it, while the worker drops what settled claims
/// left behind.
#[test]
fn a_lease_ends_though_the_worker_looks_just_when_claims_change() {
    model(|| {
        let stage = Stage::set();
        stage.claim(0, 4);
        let consumer = {
            let stage = stage.clone();
            thread::spawn(move || {
                stage.ack(0);
                stage.claim(1, 6);
            })
        };
        stage.work(0);
        let asleep = stage.rest();
        consumer.join().unwrap();
        assert!(asleep.is_none_or(|until| until <= 6) || stage.is_woken());
        assert!(stage.timers.moment() <= 6);
    });
}

/// The worker takes a lease that is over while a later one is set: it would be lost with the earlier, but the claim's row
/// was there before.
#[test]
fn a_lease_that_is_set_while_the_worker_takes_an_earlier_one_is_not_lost() {
    model(|| {
        let stage = Stage::set();
        stage.claim(0, 4);
        let consumer = {
            let stage = stage.clone();
            thread::spawn(move || stage.claim(1, 6))
        };
        stage.work(5);
        let asleep = stage.rest();
        consumer.join().unwrap();
        assert!(asleep.is_none_or(|until| until <= 6) || stage.is_woken());
        assert!(stage.timers.moment() <= 6);
    });
}

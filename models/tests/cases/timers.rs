use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, Ordering::*};
use loom::thread;
use outbox_models::model;
use outbox_models::recount::{Recount, Seen};
use outbox_models::status::{ByStatus, Counts, Status};

const NOTHING: Moments = Moments { due: NEVER, retention: NEVER, claims: 0, lease_end: NEVER };

/// The worker's database: shared memory, its latch, and the ends of leases as the table of claims has them.
#[derive(Default)]
struct Stage {
    timers: Timers,
    news: News<2>,
    recount: Recount<1>,
    counts: Counts,
    ended: AtomicU32,
    latch: AtomicBool,
    claims: [AtomicI64; 2],
}

impl Stage {
    fn set() -> Arc<Self> {
        let stage = Stage::default();
        stage.timers.reset();
        stage.news.reset();
        stage.recount.reset();
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

    fn insert(&self, ids: &[i64]) {
        assert!(self.news.tell(ids, [false; 3]));
        self.wake_for(AT_ONCE);
    }

    /// A retry is due: a wake-up without events.
    fn tell_due(&self) {
        assert!(self.news.tell(&[], [false, true, false]));
        self.wake_for(AT_ONCE);
    }

    /// An attached session ends.
    fn end_session(&self) {
        self.ended.fetch_add(1, SeqCst);
        self.wake_for(AT_ONCE);
    }

    /// The worker does what is due, and says when the next thing is.
    fn work(&self, now: i64) {
        let _told = self.take();
        let _ended = self.ended.swap(0, SeqCst);
        if self.timers.leases.take(now) {
            let next = self.claims.iter().map(|end| end.load(Acquire)).filter(|end| *end > now).min();
            self.commit(&Moments { lease_end: next.unwrap_or(NEVER), ..NOTHING });
        }
        let _due = self.timers.due.take(now);
    }

    /// What the worker announces: whether it names no events but says to look at all, and the ids.
    fn take(&self) -> (bool, Vec<i64>) {
        let (mut reasons, ids) = self.news.take(9);
        (reasons.any(|reason| reason == "overflow"), ids)
    }

    /// Until when the worker sleeps; none: it found something to do.
    fn rest(&self) -> Option<i64> {
        self.timers.arm(|| self.ended.load(SeqCst) > 0 || self.recount.is_spoiled() || self.news.is_any())
    }

    fn is_woken(&self) -> bool {
        self.latch.load(SeqCst)
    }
}

pub fn an_event_is_not_left_in_the_ring_while_the_worker_sleeps() {
    model(|| {
        let stage = Stage::set();
        let committer = {
            let stage = stage.clone();
            thread::spawn(move || stage.insert(&[17]))
        };
        stage.work(0);
        let asleep = stage.rest().is_some();
        committer.join().unwrap();
        assert!(!asleep || stage.is_woken() || !stage.news.is_any(), "the worker sleeps on");
    });
}

pub fn two_commits_wake_the_worker_and_both_are_found() {
    model(|| {
        let stage = Stage::set();
        let committers: Vec<_> = [1, 2]
            .map(|id| {
                let stage = stage.clone();
                thread::spawn(move || stage.insert(&[id]))
            })
            .into();
        let asleep = stage.rest().is_some();
        committers.into_iter().for_each(|committer| committer.join().unwrap());
        assert!(!asleep || stage.is_woken(), "the worker sleeps on");
        assert_eq!(stage.take().1.len(), 2);
    });
}

pub fn what_is_due_earlier_than_the_worker_thought_wakes_it() {
    model(|| {
        let stage = Stage::set();
        stage.commit(&Moments { due: 9, ..NOTHING });
        let committer = {
            let stage = stage.clone();
            thread::spawn(move || stage.commit(&Moments { due: 5, ..NOTHING }))
        };
        let asleep = stage.rest();
        committer.join().unwrap();
        assert!(asleep.is_none_or(|until| until <= 5) || stage.is_woken(), "the worker sleeps on");
    });
}

/// A claim is settled and another made, in turns as PostgreSQL's lock has it, while the worker drops what settled claims
/// left behind.
pub fn a_lease_ends_though_the_worker_looks_just_when_claims_change() {
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
        assert!(asleep.is_none_or(|until| until <= 6) || stage.is_woken(), "the worker sleeps on");
        assert!(stage.timers.moment() <= 6, "a lease has no end");
    });
}

/// The worker takes a lease that is over while a later one is set: it would be lost with the earlier, but the claim's row
/// was there before.
pub fn a_lease_that_is_set_while_the_worker_takes_an_earlier_one_is_not_lost() {
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
        assert!(asleep.is_none_or(|until| until <= 6) || stage.is_woken(), "the worker sleeps on");
        assert!(stage.timers.moment() <= 6, "a lease has no end");
    });
}

/// Three events, room for two: no id is lost without a word.
pub fn what_does_not_fit_is_said() {
    model(|| {
        let stage = Stage::set();
        let committer = {
            let stage = stage.clone();
            thread::spawn(move || stage.insert(&[1, 2]))
        };
        stage.insert(&[3]);
        let (many, ids) = stage.take();
        committer.join().unwrap();
        let (more, rest) = stage.take();
        assert!(
            many || more || ids.len() + rest.len() == 3,
            "an event is not announced: {many} {ids:?}, {more} {rest:?}"
        );
    });
}

/// What else the worker is asked for, each by another process.
pub fn an_ended_session_and_a_retry_wake_the_worker() {
    model(|| {
        let stage = Stage::set();
        let others: Vec<_> = [Stage::end_session, Stage::tell_due]
            .map(|act| {
                let stage = stage.clone();
                thread::spawn(move || act(&stage))
            })
            .into();
        let asleep = stage.rest().is_some();
        others.into_iter().for_each(|other| other.join().unwrap());
        let asked = stage.ended.load(SeqCst) > 0 || stage.news.is_any();
        assert!(!asleep || !asked || stage.is_woken(), "the worker sleeps on");
    });
}

/// A count is spoiled just when the worker, which made it, goes to sleep.
pub fn a_spoiled_count_wakes_the_worker() {
    model(|| {
        let stage = Stage::set();
        let committer = {
            let stage = stage.clone();
            thread::spawn(move || {
                let one = ByStatus::of(|status| i64::from(status == Status::Pending));
                if stage.recount.add(&stage.counts, 7, one) {
                    stage.wake_for(AT_ONCE);
                }
            })
        };
        stage.recount.begin();
        stage.recount.chosen(&stage.counts, Seen::default);
        let asleep = stage.rest().is_some();
        committer.join().unwrap();
        assert!(!asleep || !stage.recount.is_spoiled() || stage.is_woken(), "the worker sleeps on");
    });
}

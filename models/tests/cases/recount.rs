use loom::sync::atomic::{AtomicBool, Ordering::*};
use loom::sync::{Arc, Mutex};
use loom::thread;
use outbox_models::model;
use outbox_models::status::{ByStatus, Counts, Status};

const TRANSACTIONS: usize = 2;
/// The identity of the first.
const FIRST: u64 = 10;

/// Transactions that have committed, as PostgreSQL's process array has them, and the counters.
#[derive(Default)]
struct Stage {
    committed: Mutex<[bool; TRANSACTIONS]>,
    counts: Counts,
    recount: Recount<2>,
    latch: AtomicBool,
}

fn pending(n: i64) -> ByStatus {
    ByStatus::of(|status| if status == Status::Pending { n } else { 0 })
}

impl Stage {
    fn set() -> Arc<Self> {
        let stage = Stage::default();
        stage.recount.reset();
        stage.counts.set(ByStatus::NONE);
        Arc::new(stage)
    }

    /// A transaction that inserted an event: it is visible when its callback runs.
    fn commit(&self, number: usize) {
        self.committed.lock().unwrap()[number] = true;
        self.count(number);
    }

    fn count(&self, number: usize) {
        if self.recount.add(&self.counts, FIRST + number as u64, pending(1)) {
            self.latch.store(true, SeqCst);
        }
    }

    /// The callback runs while others can't see the commit yet: what PostgreSQL must not do.
    fn commit_late(&self, number: usize) {
        self.count(number);
        self.committed.lock().unwrap()[number] = true;
    }

    /// Nobody is told that the count was spoiled: what the extension must not do.
    fn commit_quietly(&self, number: usize) {
        self.committed.lock().unwrap()[number] = true;
        let _spoiled = self.recount.add(&self.counts, FIRST + number as u64, pending(1));
    }

    /// The worker counts the table, as `outbox._recover` does. False: a commit came in while the snapshot was chosen.
    fn recover(&self) -> bool {
        self.recount.begin();
        let snapshot = *self.committed.lock().unwrap();
        self.recount.chosen(&self.counts, || Seen {
            first_running: FIRST,
            next: FIRST + TRANSACTIONS as u64,
            running: (0..TRANSACTIONS).filter(|n| !snapshot[*n]).map(|n| (FIRST + n as u64) as u32).collect(),
        });
        if self.recount.is_spoiled() {
            return false;
        }
        self.counts.add(pending(snapshot.iter().filter(|seen| **seen).count() as i64));
        true
    }

    /// Whoever looks now, with all at rest: the counters are right, or the worker is awake to count anew.
    fn check(&self, counted: bool) {
        let right = self.counts[Status::Pending].load(SeqCst) == TRANSACTIONS as i64;
        let again = !counted || self.recount.is_spoiled();
        assert!(right || again, "counted wrong and nobody knows: {}", self.counts[Status::Pending].load(SeqCst));
        assert!(
            !self.recount.is_spoiled() || !counted || self.latch.load(SeqCst),
            "to be counted anew while the worker sleeps"
        );
    }
}

fn spawn(stage: &Arc<Stage>, act: impl FnOnce(&Stage) + Send + 'static) -> thread::JoinHandle<()> {
    let stage = stage.clone();
    thread::spawn(move || act(&stage))
}

/// Two commits while the first count is made.
pub fn commits_are_counted_once_or_the_count_is_spoiled() {
    model(|| {
        let stage = Stage::set();
        let commits = [0, 1].map(|n| spawn(&stage, move |stage| stage.commit(n)));
        let counted = stage.recover();
        commits.into_iter().for_each(|commit| commit.join().unwrap());
        stage.check(counted);
    });
}

fn one_commit(commit: fn(&Stage, usize)) {
    model(move || {
        let stage = Stage::set();
        stage.commit(1);
        let commit = spawn(&stage, move |stage| commit(stage, 0));
        let counted = stage.recover();
        commit.join().unwrap();
        stage.check(counted);
    });
}

pub fn counted_before_it_is_visible() {
    one_commit(Stage::commit_late);
}

pub fn spoiled_quietly() {
    one_commit(Stage::commit_quietly);
}

/// A commit while a second count is made, after one that saw another.
pub fn a_second_count_takes_nothing_twice() {
    model(|| {
        let stage = Stage::set();
        stage.commit(0);
        assert!(stage.recover());
        let commit = spawn(&stage, |stage| stage.commit(1));
        let counted = stage.recover();
        commit.join().unwrap();
        stage.check(counted);
    });
}

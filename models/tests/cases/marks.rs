use loom::sync::atomic::{AtomicUsize, Ordering::*};
use loom::sync::{Arc, Mutex};
use loom::thread;
use outbox_models::model;
use outbox_models::timers::NEVER;

/// The last one has the id that is drawn next.
const EVENTS: usize = 4;

/// The table as snapshots show it, and who holds the claim lock.
#[derive(Default)]
struct Stage {
    marks: Marks,
    /// A bit for each event that is committed: a snapshot shows them all as they are at one moment.
    visible: AtomicUsize,
    claimed: Mutex<[bool; EVENTS]>,
}

impl Stage {
    /// Event 2 was settled, and the mark is behind it. The ids before it were drawn by transactions that are still open.
    fn set() -> Arc<Self> {
        let stage = Stage::default();
        stage.marks.reset();
        stage.marks.find(3, 2);
        stage.show(2);
        stage.claimed.lock().unwrap()[2] = true;
        Arc::new(stage)
    }

    fn show(&self, id: usize) {
        self.visible.fetch_or(1 << id, AcqRel);
    }

    fn snapshot(&self) -> Vec<usize> {
        let visible = self.visible.load(Acquire);
        (0..EVENTS).filter(|id| visible & (1 << id) != 0).collect()
    }

    /// A commit: visible first, then its callback.
    fn commit(&self, id: usize) {
        self.show(id);
        self.marks.lower(id as i64);
    }

    /// The callback ran before the commit was visible: what the extension must not do.
    fn commit_too_early(&self, id: usize) {
        self.marks.lower(id as i64);
        self.show(id);
    }

    /// Takes every fresh event from the mark on, and sets the mark behind them.
    fn claim(&self, commits: bool) {
        let mut claimed = self.claimed.lock().unwrap();
        let (low_water, _) = self.marks.take_over();
        let snapshot = self.snapshot();
        let from = low_water.min(self.marks.lowest());
        self.end_claim(&mut claimed, from, &snapshot, commits);
    }

    /// From the mark as it was before the snapshot was taken: what the walk of a claim must not do.
    fn claim_from_old_mark(&self) {
        let mut claimed = self.claimed.lock().unwrap();
        let (low_water, _) = self.marks.take_over();
        let snapshot = self.snapshot();
        self.end_claim(&mut claimed, low_water, &snapshot, true);
    }

    /// With a snapshot from before the lowered mark was taken over: what `_set_water` and SQL must not do.
    fn claim_with_old_snapshot(&self) {
        let mut claimed = self.claimed.lock().unwrap();
        let snapshot = self.snapshot();
        let (low_water, _) = self.marks.take_over();
        self.end_claim(&mut claimed, low_water, &snapshot, true);
    }

    fn end_claim(&self, claimed: &mut [bool; EVENTS], low_water: i64, snapshot: &[usize], commits: bool) {
        let taken: Vec<usize> =
            snapshot.iter().copied().filter(|id| *id as i64 >= low_water && !claimed[*id]).collect();
        if commits {
            taken.iter().for_each(|id| claimed[*id] = true);
            // All are claimed, and settled at once: `_advance_low_water` finds nothing, and goes past all.
            self.marks.set(EVENTS as i64, taken.iter().max().map_or(0, |id| *id as i64));
        }
    }

    /// The next claim would find all that is fresh.
    fn check(&self) {
        self.claim(true);
        let claimed = self.claimed.lock().unwrap();
        for id in self.snapshot() {
            assert!(claimed[id], "event {id} is below the marks: no claim finds it");
        }
        assert_eq!(self.marks.lowest(), self.marks.low_water().min(NEVER - 1));
    }
}

fn spawn(stage: &Arc<Stage>, act: impl FnOnce(&Stage) + Send + 'static) -> thread::JoinHandle<()> {
    let stage = stage.clone();
    thread::spawn(move || act(&stage))
}

/// Two transactions with low ids commit late, while claims walk from a mark above them.
pub fn late_commits_are_found() {
    model(|| {
        let stage = Stage::set();
        let commits = [1, 0].map(|id| spawn(&stage, move |stage| stage.commit(id)));
        stage.claim(true);
        commits.into_iter().for_each(|commit| commit.join().unwrap());
        stage.check();
    });
}

/// A claim that took a lowered mark over does not commit.
pub fn a_claim_that_rolls_back_loses_nothing() {
    model(|| {
        let stage = Stage::set();
        let commit = spawn(&stage, |stage| stage.commit(0));
        stage.claim(false);
        commit.join().unwrap();
        stage.check();
    });
}

/// Two claims in turn, while a late commit lowers the mark.
pub fn claims_in_turn_find_a_late_commit() {
    model(|| {
        let stage = Stage::set();
        let claim = spawn(&stage, |stage| stage.claim(false));
        stage.commit(0);
        claim.join().unwrap();
        let claim = spawn(&stage, |stage| stage.claim(true));
        stage.commit(1);
        claim.join().unwrap();
        stage.check();
    });
}

/// One session commits an event whose id is below the mark and then the next one, while a claim looks.
pub fn two_commits_of_a_session_are_handed_out_in_order() {
    two_commits(|stage| stage.claim(true));
}

pub fn walked_from_an_old_mark() {
    two_commits(Stage::claim_from_old_mark);
}

fn two_commits(claim: fn(&Stage)) {
    model(move || {
        let stage = Stage::set();
        let commits = spawn(&stage, |stage| [0, 3].into_iter().for_each(|id| stage.commit(id)));
        claim(&stage);
        let [first, .., second] = *stage.claimed.lock().unwrap();
        assert!(first || !second, "event 3 was handed out before event 0");
        commits.join().unwrap();
        stage.check();
    });
}

pub fn lowered_before_it_is_visible() {
    model(|| {
        let stage = Stage::set();
        let commit = spawn(&stage, |stage| stage.commit_too_early(0));
        stage.claim(true);
        commit.join().unwrap();
        stage.check();
    });
}

pub fn walked_with_an_old_snapshot() {
    model(|| {
        let stage = Stage::set();
        let commit = spawn(&stage, |stage| stage.commit(0));
        stage.claim_with_old_snapshot();
        commit.join().unwrap();
        stage.check();
    });
}

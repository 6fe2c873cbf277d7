use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, Ordering::*};
use loom::thread;
use outbox_models::model;

const DATABASE: u32 = 5;

/// The slots, the worker's call, and by whose name each attachment claims.
struct Stage<const SLOTS: usize> {
    slots: [Attachment; SLOTS],
    next: AtomicI64,
    asked: AtomicU32,
    claims: [AtomicBool; 4],
}

impl<const SLOTS: usize> Stage<SLOTS> {
    fn set() -> Arc<Self> {
        Arc::new(Stage {
            slots: std::array::from_fn(|_| Attachment::default()),
            next: AtomicI64::new(0),
            asked: AtomicU32::new(0),
            claims: std::array::from_fn(|_| AtomicBool::new(false)),
        })
    }

    fn attach(&self, pid: i32) -> Option<&Attachment> {
        Attachment::take(&self.slots, &self.next, (pid, DATABASE), &format!("consumer {pid}"), 0)
    }

    /// A session attaches, claims and ends. None: there was no slot.
    fn session(&self, pid: i32) -> Option<i64> {
        let mine = self.attach(pid)?;
        let id = mine.id();
        self.claims[id as usize].store(true, Release);
        assert_eq!(mine.id(), id, "two sessions in one slot");
        mine.end();
        self.asked.fetch_add(1, SeqCst);
        Some(id)
    }

    /// The worker: releases what ended sessions had claimed, then frees their slots.
    fn work(&self) {
        if self.asked.swap(0, SeqCst) > 0 {
            let ended: Vec<i64> = Attachment::ended(&self.slots, DATABASE).map(Attachment::id).collect();
            for id in ended {
                self.claims[id as usize].store(false, Release);
                if let Some(slot) = Attachment::ended(&self.slots, DATABASE).find(|a| a.id() == id) {
                    slot.give_back();
                }
            }
        }
    }
}

fn spawn<const SLOTS: usize, R: 'static>(
    stage: &Arc<Stage<SLOTS>>,
    act: impl FnOnce(&Stage<SLOTS>) -> R + Send + 'static,
) -> thread::JoinHandle<R> {
    let stage = stage.clone();
    thread::spawn(move || act(&stage))
}

/// What sessions had claimed is released when they are over, and their slots are free again.
pub fn nothing_stays_claimed_by_sessions_that_ended() {
    model(|| {
        let stage = Stage::<2>::set();
        let sessions = [1, 2].map(|pid| spawn(&stage, move |stage| stage.session(pid)));
        stage.work();
        sessions.into_iter().for_each(|session| assert!(session.join().unwrap().is_some(), "a slot for each"));
        stage.work();
        assert!(stage.claims.iter().all(|claim| !claim.load(Acquire)), "a claim of nobody");
        assert!(stage.attach(8).is_some() && stage.attach(9).is_some(), "a slot of nobody");
    });
}

/// Two sessions want the one slot.
pub fn a_slot_has_one_session() {
    model(|| {
        let stage = Stage::<1>::set();
        let sessions = [1, 2].map(|pid| spawn(&stage, move |stage| stage.attach(pid).map(Attachment::id)));
        let taken = sessions.map(|session| session.join().unwrap());
        assert!(taken.iter().flatten().count() == 1, "two sessions in one slot");
    });
}

/// A slot changes hands while somebody reads who is attached: whom it finds has both an identity and a process of its own.
pub fn a_slot_that_changes_hands_is_whole() {
    model(|| {
        let stage = Stage::<1>::set();
        let first = stage.attach(1).expect("a free slot");
        first.end();
        let next = spawn(&stage, |stage| stage.attach(2).map(Attachment::id));
        first.give_back();
        let taken = next.join().unwrap();
        let attached: Vec<_> = Attachment::attached(&stage.slots, DATABASE).map(|a| (a.id, a.pid)).collect();
        assert_eq!(attached, taken.map(|id| (id, 2)).into_iter().collect::<Vec<_>>(), "nobody, or somebody else");
    });
}

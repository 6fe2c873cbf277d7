//! What prepared transactions noted, in shared memory until their second phase. Kept is what [`Note::is_only_rows`] holds
//! true of, as a few numbers.

use crate::note::Note;
use crate::status::{ByStatus, PerStatus, Status};
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicI64, AtomicU64, Ordering::*};

/// The slot of one prepared transaction.
#[repr(C)]
pub struct Prepared {
    /// Its name, hashed. 0: free.
    name: AtomicU64,
    transaction: AtomicU64,
    min_id: AtomicI64,
    /// Those that are announced by name; -1: more than that.
    ids: [AtomicI64; IDS],
    len: AtomicI32,
    by_status: PerStatus<AtomicI64>,
    published: AtomicI64,
    due: AtomicI64,
    wake_due: AtomicBool,
    wake_released: AtomicBool,
    launch: AtomicBool,
}

/// Events of a prepared transaction that a notification names; with more it says that there are many.
const IDS: usize = 8;

/// The name of a slot that is being filled.
const TAKEN: u64 = u64::MAX;

fn key(name: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    hasher.finish().clamp(1, TAKEN - 1)
}

/// Keeps the note of the transaction of that name, unless all slots are taken.
pub fn keep(slots: &[Prepared], name: &[u8], transaction: u64, note: &Note) {
    if let Some(slot) = slots.iter().find(|p| p.name.compare_exchange(0, TAKEN, SeqCst, SeqCst).is_ok()) {
        slot.fill(transaction, note);
        slot.name.store(key(name), SeqCst);
    }
}

/// The transaction of that name and its note; none: it was not kept. Frees the slot.
pub fn take(slots: &[Prepared], name: &[u8]) -> Option<(u64, Note)> {
    let key = key(name);
    let slot = slots.iter().find(|p| p.name.load(SeqCst) == key)?;
    let kept = (slot.transaction.load(Relaxed), slot.note());
    slot.name.store(0, SeqCst);
    Some(kept)
}

/// Frees the slot of that name.
pub fn forget(slots: &[Prepared], name: &[u8]) {
    let key = key(name);
    for slot in slots {
        let _free = slot.name.compare_exchange(key, 0, SeqCst, SeqCst);
    }
}

impl Prepared {
    fn fill(&self, transaction: u64, note: &Note) {
        let rows = &note.rows;
        self.transaction.store(transaction, Relaxed);
        self.min_id.store(rows.min_id, Relaxed);
        self.ids.iter().zip(&rows.ids).for_each(|(slot, id)| slot.store(*id, Relaxed));
        let all = rows.ids.len() <= IDS && !rows.overflow;
        self.len.store(if all { rows.ids.len() as i32 } else { -1 }, Relaxed);
        for status in Status::ALL {
            self.by_status[status].store(rows.by_status[status], Relaxed);
        }
        self.published.store(rows.published, Relaxed);
        self.due.store(rows.due, Relaxed);
        self.wake_due.store(rows.wake_due, Relaxed);
        self.wake_released.store(rows.wake_released, Relaxed);
        self.launch.store(note.control.launch, Relaxed);
    }

    fn note(&self) -> Note {
        let mut note = Note::new(0);
        let rows = &mut note.rows;
        rows.min_id = self.min_id.load(Relaxed);
        match usize::try_from(self.len.load(Relaxed)).ok().and_then(|len| self.ids.get(..len)) {
            Some(ids) => ids.iter().for_each(|id| rows.list(id.load(Relaxed))),
            None => rows.overflow = true,
        }
        rows.by_status = ByStatus::of(|status| self.by_status[status].load(Relaxed));
        rows.published = self.published.load(Relaxed);
        rows.due = self.due.load(Relaxed);
        rows.wake_due = self.wake_due.load(Relaxed);
        rows.wake_released = self.wake_released.load(Relaxed);
        note.control.launch = self.launch.load(Relaxed);
        note
    }
}

//! Two-phase commit: what a prepared transaction noted, kept in shared memory until its second phase.
//!
//! Each prepared transaction of a database with the extension has a slot, also one that noted nothing. What is not found
//! here at COMMIT PREPARED (a restart forgets it, a full table never knew it, claims and recoveries are not kept) has the
//! worker recover from the tables.

use crate::note::Note;
use crate::shmem::{self, Database, NEVER};
use crate::status::{ByStatus, PerStatus, Status};
use crate::timers::{AT_ONCE, Moments};
use crate::{backend, wake};
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicI64, AtomicU64, Ordering::*};

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

/// The transaction of that name has been prepared, with this note.
pub fn remember(name: &[u8], note: Option<&Note>) {
    let Some(shared) = shmem::try_get() else { return };
    forget(name);
    let concerns = note.is_some_and(|n| n.launch) || shmem::current().is_some();
    if !concerns || note.is_some_and(|n| !n.is_only_rows()) {
        return;
    }
    let free = shared.prepared.iter().find(|p| p.name.compare_exchange(0, TAKEN, SeqCst, SeqCst).is_ok());
    if let Some(slot) = free {
        slot.fill(note);
        slot.name.store(key(name), SeqCst);
    }
}

impl Prepared {
    fn fill(&self, note: Option<&Note>) {
        self.transaction.store(backend::transaction(), Relaxed);
        self.min_id.store(note.map_or(NEVER, |n| n.min_id), Relaxed);
        let ids = note.map_or(&[][..], |n| &n.ids);
        self.ids.iter().zip(ids).for_each(|(slot, id)| slot.store(*id, Relaxed));
        let all = ids.len() <= IDS && !note.is_some_and(|n| n.overflow);
        self.len.store(if all { ids.len() as i32 } else { -1 }, Relaxed);
        let changes = note.map_or(ByStatus::NONE, |n| n.by_status);
        for status in Status::ALL {
            self.by_status[status].store(changes[status], Relaxed);
        }
        self.published.store(note.map_or(0, |n| n.published), Relaxed);
        self.due.store(note.map_or(NEVER, |n| n.due), Relaxed);
        self.launch.store(note.is_some_and(|n| n.launch), Relaxed);
    }

    fn apply(&self, database: &Database) {
        let changes = ByStatus::of(|status| self.by_status[status].load(Relaxed));
        database.count(self.transaction.load(Relaxed), changes);
        database.counters.published.fetch_add(self.published.load(Relaxed), Relaxed);
        database.timers.note(&Moments { due: self.due.load(Relaxed), retention: NEVER, claims: 0, lease_end: NEVER });
        let min_id = self.min_id.load(Relaxed);
        if min_id != NEVER {
            database.lowered.fetch_min(min_id, SeqCst);
        }
        let named = usize::try_from(self.len.load(Relaxed)).ok().and_then(|len| self.ids.get(..len));
        if !named.is_some_and(|ids| ids.iter().all(|id| database.ring.push(id.load(Relaxed)))) {
            database.overflow.store(true, SeqCst);
        }
    }
}

/// COMMIT PREPARED succeeded.
pub fn commit(name: &[u8]) {
    let Some(shared) = shmem::try_get() else { return };
    let key = key(name);
    let slot = shared.prepared.iter().find(|p| p.name.load(SeqCst) == key);
    if slot.is_some_and(|p| p.launch.load(Relaxed)) {
        wake::launcher_for_this_database(shared);
    }
    if let Some(database) = shmem::current() {
        match slot {
            Some(slot) => slot.apply(database),
            None => database.recover.store(true, SeqCst),
        }
        wake::worker(database, AT_ONCE);
    }
    if let Some(slot) = slot {
        slot.name.store(0, SeqCst);
    }
}

/// ROLLBACK PREPARED, or the name is used anew.
pub fn forget(name: &[u8]) {
    if let Some(shared) = shmem::try_get() {
        let key = key(name);
        for slot in &shared.prepared {
            let _free = slot.name.compare_exchange(key, 0, SeqCst, SeqCst);
        }
    }
}

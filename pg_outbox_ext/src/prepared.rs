//! Two-phase commit: what a prepared transaction noted, kept in shared memory until its second phase.
//!
//! A restart forgets it, and so does a full table. Then COMMIT PREPARED has the worker recover from the tables.

use crate::note::Note;
use crate::shmem::{self, NEVER};
use pgrx::pg_sys;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::sync::atomic::{AtomicI64, AtomicU32, AtomicU64, Ordering::*};

#[repr(C)]
pub struct Prepared {
    /// 0: free.
    transaction: AtomicU64,
    database: AtomicU32,
    min_id: AtomicI64,
    pending: AtomicI64,
    published: AtomicI64,
}

fn key(name: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    hasher.finish().max(1)
}

/// The transaction of that name has been prepared.
pub fn remember(name: &[u8], note: &Note, database: pg_sys::Oid) {
    let Some(shared) = shmem::try_get() else { return };
    let key = key(name);
    forget(name);
    if !note.is_only_inserts() {
        return;
    }
    for place in &shared.prepared {
        if place.transaction.compare_exchange(0, u64::MAX, SeqCst, SeqCst).is_ok() {
            place.database.store(database.to_u32(), Relaxed);
            place.min_id.store(note.min_id, Relaxed);
            place.pending.store(note.by_status[0], Relaxed);
            place.published.store(note.published, Relaxed);
            place.transaction.store(key, SeqCst);
            return;
        }
    }
}

/// COMMIT PREPARED succeeded.
pub fn commit(name: &[u8]) {
    let (Some(shared), Some(database)) = (shmem::try_get(), shmem::current()) else { return };
    let key = key(name);
    match shared.prepared.iter().find(|p| p.transaction.load(SeqCst) == key) {
        Some(place) => {
            let min_id = place.min_id.load(Relaxed);
            if min_id != NEVER {
                database.hint.fetch_min(min_id, SeqCst);
                database.overflow.store(true, SeqCst);
            }
            database.counters.by_status[0].fetch_add(place.pending.load(Relaxed), Relaxed);
            database.counters.published.fetch_add(place.published.load(Relaxed), Relaxed);
            place.transaction.store(0, SeqCst);
        }
        None => database.recover.store(true, SeqCst),
    }
    crate::wake::worker(database);
}

/// ROLLBACK PREPARED, or the name is used anew.
pub fn forget(name: &[u8]) {
    if let Some(shared) = shmem::try_get() {
        let key = key(name);
        for place in &shared.prepared {
            let _free = place.transaction.compare_exchange(key, 0, SeqCst, SeqCst);
        }
    }
}

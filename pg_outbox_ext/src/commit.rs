//! The ends of transactions. At commit the notes go to shared memory and the worker wakes; nothing here allocates, waits
//! or fails, because an error after a commit would take the server down.
//!
//! | event | what happens |
//! | --- | --- |
//! | COMMIT | the note is applied: after it became visible to others, before locks are let go |
//! | ABORT | the note is dropped |
//! | PREPARE | the note is kept under the transaction's name: see [`crate::two_phase`] |
//! | savepoint released, rolled back | its frame is merged, dropped |

use crate::backend::{self, Local};
use crate::note::{Claims, Note, Notes, Rows};
use crate::shmem::{self, Database, NEVER};
use crate::timers::AT_ONCE;
use crate::wake;
use pgrx::pg_sys;
use std::sync::atomic::Ordering::*;

static NOTES: Local<Notes> = Local::new(Notes::new());

/// Changes the note of the running (sub)transaction.
pub fn note(f: impl FnOnce(&mut Note)) {
    NOTES.with(|notes| f(notes.at(backend::nesting_level())));
}

/// All that the transaction noted, which is over for this backend.
pub fn take_note() -> Option<Note> {
    NOTES.with(Notes::take)
}

/// In `_PG_init`.
pub fn register() {
    backend::on_transaction_end(transaction_ended);
    backend::on_savepoint_end(savepoint_ended);
}

unsafe extern "C-unwind" fn transaction_ended(event: pg_sys::XactEvent::Type, _arg: *mut std::ffi::c_void) {
    use pg_sys::XactEvent::*;
    match event {
        XACT_EVENT_COMMIT => {
            if let Some(note) = take_note() {
                apply(&note, backend::transaction());
            }
        }
        XACT_EVENT_ABORT => {
            if NOTES.with(Notes::clear)
                && let Some(database) = shmem::current()
            {
                claim_lock_is_let_go(database);
            }
        }
        _ => {}
    }
}

unsafe extern "C-unwind" fn savepoint_ended(
    event: pg_sys::SubXactEvent::Type,
    _own: pg_sys::SubTransactionId,
    _parent: pg_sys::SubTransactionId,
    _arg: *mut std::ffi::c_void,
) {
    use pg_sys::SubXactEvent::*;
    let level = backend::nesting_level();
    match event {
        SUBXACT_EVENT_COMMIT_SUB => NOTES.with(|notes| notes.release(level)),
        SUBXACT_EVENT_ABORT_SUB => give_back_lowered(NOTES.with(|notes| notes.roll_back(level))),
        _ => {}
    }
}

/// A claim that took a lowered mark over is undone, while an earlier one of the transaction may still set the mark.
fn give_back_lowered(taken: i64) {
    if taken != NEVER
        && let Some(database) = shmem::current()
    {
        database.marks.lower(taken);
    }
}

/// The transaction that noted this has committed.
pub fn apply(note: &Note, transaction: u64) {
    let Some(shared) = shmem::try_get() else { return };
    if note.control.launch {
        wake::launcher_for_this_database(shared);
    }
    let Some(database) = shmem::current() else { return };
    if note.control.dropped {
        // Should the extension have been created anew in the same transaction, nothing that is known holds of its tables;
        // the locks of both keep others away until this is done.
        database.forget();
        database.stop.store(true, SeqCst);
        wake::worker_now(database);
        return;
    }
    let spoiled = apply_counts(note, transaction, database);
    apply_claims(&note.claims, database);
    if note.rows.min_id != NEVER {
        database.marks.lower(note.rows.min_id);
    }
    // Last, so that the worker finds everything when it wakes.
    let earliest = announce(note, database);
    wake::worker(database, if spoiled { AT_ONCE } else { earliest });
    if note.held_claim_lock() {
        claim_lock_is_let_go(database);
    }
}

/// This transaction is about to let go of the claim lock, for which the worker may wait.
fn claim_lock_is_let_go(database: &Database) {
    if database.claim_lock_wanted.load(SeqCst) && database.claim_lock_wanted.swap(false, SeqCst) {
        wake::worker(database, AT_ONCE);
    }
}

/// True: the worker has to count anew.
fn apply_counts(note: &Note, transaction: u64, database: &Database) -> bool {
    let (counters, rows) = (&database.counters, &note.rows);
    let spoiled = match note.control.found {
        Some(found) => {
            database.marks.find(found.low_water, found.high_water);
            counters.by_status.add(found.by_status);
            database.timers.leases.recount(found.open_claims);
            database.recovered.store(true, SeqCst);
            false
        }
        None => database.count(transaction, rows.by_status),
    };
    counters.published.fetch_add(rows.published, Relaxed);
    counters.processed.fetch_add(rows.processed, Relaxed);
    counters.failed.fetch_add(rows.failed, Relaxed);
    counters.unrouted.fetch_add(rows.unrouted, Relaxed);
    rows.latencies.iter().for_each(|bucket| counters.add_latency(*bucket));
    spoiled
}

fn apply_claims(claims: &Claims, database: &Database) {
    if let Some((low_water, high_water)) = claims.water {
        database.marks.set(low_water, high_water);
    }
    if let Some(waiting) = claims.waiting {
        database.waiting.store(waiting, SeqCst);
    }
}

/// Returns when the worker has something to do.
fn announce(note: &Note, database: &Database) -> i64 {
    let Rows { ids, overflow, wake_due, wake_released, .. } = &note.rows;
    let told = database.news.tell(ids, [*overflow, *wake_due, *wake_released]);
    if note.control.recover {
        database.recover.store(true, SeqCst);
    }
    let earliest = database.timers.note(&note.moments());
    if told || note.control.recover { AT_ONCE } else { earliest }
}

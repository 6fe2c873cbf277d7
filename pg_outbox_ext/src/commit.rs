//! The ends of transactions. At commit the notes go to shared memory and the worker wakes; nothing here allocates, waits
//! or fails, because an error after a commit would take the server down.
//!
//! | event | what happens |
//! | --- | --- |
//! | COMMIT | the note is applied: after it became visible to others, before locks are let go |
//! | ABORT | the note is dropped |
//! | PREPARE | the note is kept under the transaction's name |
//! | savepoint released, rolled back | its frame is merged, dropped |

use crate::backend::{self, Local};
use crate::note::{Note, Notes};
use crate::shmem::{self, Database, NEVER};
use crate::timers::AT_ONCE;
use crate::{hooks, prepared, wake};
use pgrx::pg_sys;
use std::sync::atomic::Ordering::*;

static NOTES: Local<Notes> = Local::new(Notes::new());

/// Changes the note of the running (sub)transaction.
pub fn note(f: impl FnOnce(&mut Note)) {
    NOTES.with(|notes| f(notes.at(backend::nesting_level())));
}

/// In `_PG_init`.
pub fn register() {
    // SAFETY: once in the postmaster; the callbacks live in this library, which is never unloaded.
    unsafe {
        pg_sys::RegisterXactCallback(Some(transaction_ended), std::ptr::null_mut());
        pg_sys::RegisterSubXactCallback(Some(savepoint_ended), std::ptr::null_mut());
    }
}

unsafe extern "C-unwind" fn transaction_ended(event: pg_sys::XactEvent::Type, _arg: *mut std::ffi::c_void) {
    use pg_sys::XactEvent::*;
    match event {
        XACT_EVENT_COMMIT => {
            if let Some(note) = NOTES.with(Notes::take) {
                apply(&note);
            }
            hooks::resume();
        }
        XACT_EVENT_PREPARE => {
            let note = NOTES.with(Notes::take);
            hooks::with_prepared_name(|name| prepared::remember(name, note.as_ref()));
            hooks::resume();
        }
        XACT_EVENT_ABORT => {
            if NOTES.with(Notes::clear)
                && let Some(database) = shmem::current()
            {
                turn_is_over(database);
            }
            hooks::resume();
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
        SUBXACT_EVENT_COMMIT_SUB => {
            NOTES.with(|notes| notes.release(level));
            hooks::release(level);
        }
        SUBXACT_EVENT_ABORT_SUB => {
            give_back_lowered(NOTES.with(|notes| notes.roll_back(level)));
            hooks::roll_back(level);
        }
        _ => {}
    }
}

/// A claim that took a lowered mark over is undone, while an earlier one of the transaction may still set the mark.
fn give_back_lowered(taken: i64) {
    if taken != NEVER
        && let Some(database) = shmem::current()
    {
        database.lowered.fetch_min(taken, SeqCst);
    }
}

fn apply(note: &Note) {
    let Some(shared) = shmem::try_get() else { return };
    if note.launch {
        wake::launcher_for_this_database(shared);
    }
    let Some(database) = shmem::current() else { return };
    if note.dropped {
        // Should the extension have been created anew in the same transaction, nothing that is known holds of its tables;
        // the locks of both keep others away until this is done.
        database.forget();
        database.stop.store(true, SeqCst);
        wake::worker_now(database);
        return;
    }
    apply_counters(note, database);
    apply_claims(note, database);
    // Last, so that the worker finds everything when it wakes.
    wake::worker(database, announce(note, database));
    if note.had_the_turn() {
        turn_is_over(database);
    }
}

/// This transaction is about to let go of the lock of claims and settlements, for which the worker may wait.
fn turn_is_over(database: &Database) {
    if database.turn_wanted.load(SeqCst) && database.turn_wanted.swap(false, SeqCst) {
        wake::worker(database, AT_ONCE);
    }
}

fn apply_counters(note: &Note, database: &Database) {
    let counters = &database.counters;
    match note.found {
        Some(found) => {
            database.low_water.store(found.low_water, SeqCst);
            database.high_water.store(found.high_water, SeqCst);
            counters.add_by_status(found.by_status);
            database.timers.leases.recount(found.open_claims);
            database.recovered.store(true, SeqCst);
        }
        None => database.count(backend::transaction(), note.by_status),
    }
    counters.published.fetch_add(note.published, Relaxed);
    counters.processed.fetch_add(note.processed, Relaxed);
    counters.failed.fetch_add(note.failed, Relaxed);
    counters.unrouted.fetch_add(note.unrouted, Relaxed);
    note.latencies.iter().for_each(|b| counters.add_latency(*b));
}

fn apply_claims(note: &Note, database: &Database) {
    if let Some((low_water, high_water)) = note.water {
        database.low_water.store(low_water, SeqCst);
        database.high_water.fetch_max(high_water, SeqCst);
    }
    if let Some(waiting) = note.waiting {
        database.waiting.store(waiting, SeqCst);
    }
    if note.min_id != NEVER {
        database.lowered.fetch_min(note.min_id, SeqCst);
    }
}

/// Returns when the worker has something to do.
fn announce(note: &Note, database: &Database) -> i64 {
    // Where not all can be named, none is: consumers look at the tables anyway.
    let overflow = note.overflow || !note.ids.iter().all(|id| database.ring.push(*id));
    for (flag, raised) in [
        (&database.overflow, overflow),
        (&database.wake_due, note.wake_due),
        (&database.wake_released, note.wake_released),
        (&database.recover, note.recover),
    ] {
        if raised {
            flag.store(true, SeqCst);
        }
    }
    let earliest = database.timers.note(&note.moments());
    let now = overflow || !note.ids.is_empty() || note.wake_due || note.wake_released || note.recover;
    if now { AT_ONCE } else { earliest }
}

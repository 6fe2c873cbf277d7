//! Two-phase commit: what a transaction noted waits in shared memory for its second phase.
//!
//! Each prepared transaction of a database with the extension has a slot, also one that noted nothing. What is not found
//! there at COMMIT PREPARED (a restart forgets it, a full table never knew it, claims and recoveries are not kept) has the
//! worker recover from the tables. Until then nobody knows its ids, so the next claim walks from the first event there is:
//! what the session commits next must not be handed out before.

use crate::backend::{self, Local};
use crate::commit;
use crate::marks::BEFORE_ALL;
use crate::note::Note;
use crate::{prepared, shmem};
use pgrx::pg_sys;

/// Name of the transaction that is being prepared.
static PREPARING: Local<Option<Vec<u8>>> = Local::new(None);

/// In `_PG_init`.
pub fn register() {
    backend::on_transaction_end(transaction_ended);
}

unsafe extern "C-unwind" fn transaction_ended(event: pg_sys::XactEvent::Type, _arg: *mut std::ffi::c_void) {
    use pg_sys::XactEvent::*;
    match event {
        XACT_EVENT_PREPARE => prepared(),
        XACT_EVENT_COMMIT | XACT_EVENT_ABORT => PREPARING.with(|preparing| *preparing = None),
        _ => {}
    }
}

/// PREPARE TRANSACTION begins.
pub fn prepare(name: Vec<u8>) {
    PREPARING.with(|preparing| *preparing = Some(name));
}

fn prepared() {
    let note = commit::take_note();
    let Some(name) = PREPARING.with(Option::take) else { return };
    let Some(shared) = shmem::try_get() else { return };
    prepared::forget(&shared.prepared, &name);
    let note = note.unwrap_or_else(|| Note::new(0));
    if (note.control.launch || shmem::current().is_some()) && note.is_only_rows() {
        prepared::keep(&shared.prepared, &name, backend::transaction(), &note);
    }
}

/// COMMIT PREPARED succeeded.
pub fn commit(name: &[u8]) {
    let Some(shared) = shmem::try_get() else { return };
    let (transaction, note) = prepared::take(&shared.prepared, name).unwrap_or_else(|| {
        let mut unknown = Note::new(0);
        unknown.control.recover = true;
        unknown.rows.lower(BEFORE_ALL);
        (0, unknown)
    });
    commit::apply(&note, transaction);
}

/// ROLLBACK PREPARED succeeded.
pub fn roll_back(name: &[u8]) {
    if let Some(shared) = shmem::try_get() {
        prepared::forget(&shared.prepared, name);
    }
}

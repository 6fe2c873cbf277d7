//! Attached consumers. A session takes a slot in shared memory; when its backend ends, in whatever way, or it detaches,
//! the slot is marked and the worker releases what the session had claimed. (A backend that is killed takes the server
//! through a restart, after which every claim is released.)

use crate::attachments::{Attached, Attachment};
use crate::backend::{self, Local};
use crate::error::{Error, raise};
use crate::shmem::{self, Database};
use crate::timers::AT_ONCE;
use crate::{clock, wake};
use pgrx::pg_sys;
use std::sync::atomic::Ordering::*;

static MINE: Local<Option<&'static Attachment>> = Local::new(None);

/// Attaches this session, or renames it if it is attached already.
pub fn attach(name: &str) {
    if name.is_empty() || name.len() > 63 {
        raise(Error::ConsumerName);
    }
    if let Some(mine) = MINE.with(|mine| *mine) {
        mine.rename(name);
        return;
    }
    if backend::is_standby() {
        raise(Error::Standby);
    }
    let shared = shmem::get();
    let session = (backend::pid(), backend::database().to_u32());
    let taken = Attachment::take(&shared.attachments, &shared.next_attachment, session, name, clock::now());
    let Some(mine) = taken else { raise(Error::TooManyConsumers) };
    MINE.with(|m| *m = Some(mine));
    // PostgreSQL has room for few such callbacks, and a pooled session may attach often.
    if !WATCHED.with(|watched| std::mem::replace(watched, true)) {
        // SAFETY: the callback lives in this library, which is never unloaded.
        unsafe { pg_sys::on_shmem_exit(Some(backend_ended), pg_sys::Datum::null()) };
    }
}

/// The end of this backend is watched.
static WATCHED: Local<bool> = Local::new(false);

/// Ends this session's attachment as the session's end would, for a session that goes to another user (DISCARD ALL).
/// False: there was none.
pub fn detach() -> bool {
    let mine = MINE.with(Option::take);
    mine.inspect(|slot| give_up(slot)).is_some()
}

/// This session's attachment.
pub fn mine() -> Option<i64> {
    MINE.with(|mine| mine.map(Attachment::id))
}

unsafe extern "C-unwind" fn backend_ended(_code: i32, _arg: pg_sys::Datum) {
    detach();
}

fn give_up(mine: &Attachment) {
    mine.end();
    match shmem::current() {
        Some(database) => {
            database.ended_attachments.fetch_add(1, SeqCst);
            wake::worker(database, AT_ONCE);
        }
        // The extension is gone, and with it what was claimed.
        None => mine.give_back(),
    }
}

/// The attached sessions of this database.
pub fn attached() -> Vec<Attached> {
    Attachment::attached(&shmem::get().attachments, backend::database().to_u32()).collect()
}

/// For the worker: the sessions of this database that ended, as their attachments.
pub fn ended(database: &Database) -> Vec<i64> {
    all_ended(database.oid.load(Relaxed)).map(Attachment::id).collect()
}

/// For the worker: the claims of the session are released, its slot is free again.
pub fn free(database: &Database, attachment: i64) {
    if let Some(slot) = all_ended(database.oid.load(Relaxed)).find(|a| a.id() == attachment) {
        slot.give_back();
    }
}

/// For the launcher: this database has no worker any more. Frees the slots of its sessions that ended.
pub fn forget_ended(database: u32) {
    all_ended(database).for_each(Attachment::give_back);
}

fn all_ended(database: u32) -> impl Iterator<Item = &'static Attachment> {
    Attachment::ended(&shmem::get().attachments, database)
}

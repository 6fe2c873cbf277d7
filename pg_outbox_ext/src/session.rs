//! Attached consumers. A session takes a slot in shared memory; when its backend ends, in whatever way, or it detaches,
//! the slot is marked and the worker releases what the session had claimed. (A backend that is killed takes the server
//! through a restart, after which every claim is released.)

use crate::backend::{self, Local};
use crate::error::{Error, raise};
use crate::shmem::{self, Attachment, Database};
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
        write_name(mine, name);
        return;
    }
    if backend::is_standby() {
        raise(Error::Standby);
    }
    let shared = shmem::get();
    let (pid, database) = (backend::pid(), backend::database());
    let free = shared.attachments.iter().find(|a| a.pid.compare_exchange(0, pid, SeqCst, SeqCst).is_ok());
    let Some(mine) = free else { raise(Error::TooManyConsumers) };
    write_name(mine, name);
    mine.attached_at.store(clock::now(), Relaxed);
    mine.database.store(database.to_u32(), Relaxed);
    mine.id.store(shared.next_attachment.fetch_add(1, SeqCst) + 1, SeqCst);
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
    MINE.with(|mine| mine.map(|a| a.id.load(Relaxed)))
}

unsafe extern "C-unwind" fn backend_ended(_code: i32, _arg: pg_sys::Datum) {
    detach();
}

fn give_up(mine: &Attachment) {
    mine.ended.store(true, SeqCst);
    match shmem::current() {
        Some(database) => {
            database.ended_attachments.fetch_add(1, SeqCst);
            wake::worker(database, AT_ONCE);
        }
        // The extension is gone, and with it what was claimed.
        None => give_back(mine),
    }
}

fn write_name(slot: &Attachment, name: &str) {
    let mut bytes = [0u8; 64];
    bytes[..name.len()].copy_from_slice(name.as_bytes());
    for (word, part) in slot.name.iter().zip(bytes.as_chunks::<8>().0) {
        word.store(u64::from_ne_bytes(*part), Relaxed);
    }
}

fn read_name(slot: &Attachment) -> String {
    let bytes: Vec<u8> =
        slot.name.iter().flat_map(|word| word.load(Relaxed).to_ne_bytes()).take_while(|b| *b != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The attached sessions of this database: attachment, pid, consumer, since when.
pub fn attached() -> Vec<(i64, i32, String, i64)> {
    let database = backend::database().to_u32();
    shmem::get()
        .attachments
        .iter()
        .filter(|a| a.pid.load(SeqCst) != 0 && a.id.load(SeqCst) != 0)
        .filter(|a| a.database.load(Relaxed) == database && !a.ended.load(SeqCst))
        .map(|a| (a.id.load(Relaxed), a.pid.load(Relaxed), read_name(a), a.attached_at.load(Relaxed)))
        .collect()
}

/// For the worker: the sessions of this database that ended, as their attachments.
pub fn ended(database: &Database) -> Vec<i64> {
    all_ended(database.oid.load(Relaxed)).map(|a| a.id.load(Relaxed)).collect()
}

/// For the worker: the claims of the session are released, its slot is free again.
pub fn free(database: &Database, attachment: i64) {
    if let Some(slot) = all_ended(database.oid.load(Relaxed)).find(|a| a.id.load(Relaxed) == attachment) {
        give_back(slot);
    }
}

/// For the launcher: this database has no worker any more. Frees the slots of its sessions that ended.
pub fn forget_ended(database: u32) {
    all_ended(database).for_each(give_back);
}

/// Frees the slot of a session that ended; of several who try, one does.
fn give_back(slot: &Attachment) {
    if slot.ended.compare_exchange(true, false, SeqCst, SeqCst).is_ok() {
        slot.id.store(0, SeqCst);
        slot.pid.store(0, SeqCst);
    }
}

fn all_ended(database: u32) -> impl Iterator<Item = &'static Attachment> {
    shmem::get().attachments.iter().filter(move |a| a.ended.load(SeqCst) && a.database.load(Relaxed) == database)
}

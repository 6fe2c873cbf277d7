//! The slots of attached sessions. A session takes one and ends it; the worker frees it when it has released what the
//! session had claimed.
//!
//! Pure code over atomics, which `models/` runs under loom. All-zero bytes are free slots.

use crate::atomic::{AtomicBool, AtomicI32, AtomicI64, AtomicU32, AtomicU64, Ordering::*};

/// `pid` 0: free.
#[derive(Default)]
#[repr(C)]
pub struct Attachment {
    pid: AtomicI32,
    database: AtomicU32,
    /// 0: being filled.
    id: AtomicI64,
    attached_at: AtomicI64,
    ended: AtomicBool,
    name: [AtomicU64; 8],
}

/// The session in a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    pub id: i64,
    pub pid: i32,
    pub name: String,
    pub at: i64,
}

impl Attachment {
    /// Takes a free slot for this session; none: all are taken. Identities rise, and none is given twice.
    pub fn take<'a>(
        slots: &'a [Attachment],
        next: &AtomicI64,
        (pid, database): (i32, u32),
        name: &str,
        now: i64,
    ) -> Option<&'a Attachment> {
        let slot = slots.iter().find(|a| a.pid.compare_exchange(0, pid, SeqCst, SeqCst).is_ok())?;
        slot.rename(name);
        slot.attached_at.store(now, Relaxed);
        slot.database.store(database, Relaxed);
        slot.id.store(next.fetch_add(1, SeqCst) + 1, SeqCst);
        Some(slot)
    }

    /// For the session itself: its name, of up to 63 bytes.
    pub fn rename(&self, name: &str) {
        let mut bytes = [0u8; 64];
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        for (word, part) in self.name.iter().zip(bytes.as_chunks::<8>().0) {
            word.store(u64::from_ne_bytes(*part), Relaxed);
        }
    }

    /// For the session itself.
    pub fn id(&self) -> i64 {
        self.id.load(Relaxed)
    }

    /// The session is over: the slot waits for whoever releases what it had claimed.
    pub fn end(&self) {
        self.ended.store(true, SeqCst);
    }

    /// Frees the slot of a session that ended; of several who try, one does.
    pub fn give_back(&self) {
        if self.ended.compare_exchange(true, false, SeqCst, SeqCst).is_ok() {
            self.id.store(0, SeqCst);
            self.pid.store(0, SeqCst);
        }
    }

    /// The slots of that database whose sessions ended.
    pub fn ended(slots: &[Attachment], database: u32) -> impl Iterator<Item = &Attachment> {
        slots.iter().filter(move |a| a.ended.load(SeqCst) && a.database.load(Relaxed) == database)
    }

    /// The attached sessions of that database.
    pub fn attached(slots: &[Attachment], database: u32) -> impl Iterator<Item = Attached> {
        slots
            .iter()
            .filter(|a| a.pid.load(SeqCst) != 0 && a.id.load(SeqCst) != 0)
            .filter(move |a| a.database.load(Relaxed) == database && !a.ended.load(SeqCst))
            .map(Attachment::read)
    }

    fn read(&self) -> Attached {
        let name: Vec<u8> =
            self.name.iter().flat_map(|word| word.load(Relaxed).to_ne_bytes()).take_while(|b| *b != 0).collect();
        Attached {
            id: self.id.load(Relaxed),
            pid: self.pid.load(Relaxed),
            name: String::from_utf8_lossy(&name).into_owned(),
            at: self.attached_at.load(Relaxed),
        }
    }
}

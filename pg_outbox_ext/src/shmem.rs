//! The one structure in shared memory: atomics only, no locks, all of it rebuilt from the tables after a crash.
//!
//! Each database that has the extension has a [`Database`]. The launcher alone gives and takes them. There are as many as
//! there can be workers.

use crate::attachments::Attachment;
use crate::counters::Counters;
use crate::marks::Marks;
use crate::news::News;
use crate::prepared::Prepared;
use crate::recount::Recount;
use crate::status::ByStatus;
use crate::timers::Timers;
use crate::{backend, clock};
use pgrx::pg_sys;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicI64, AtomicPtr, AtomicU32, Ordering::*};

pub const ATTACHMENTS: usize = 512;
pub const PREPARED: usize = 1024;
pub const REQUESTS: usize = 64;

/// Ids that wait to be announced; with more, the announcement names none.
const RING: usize = 2048;

/// Running transactions that a count remembers.
const RUNNING: usize = 1024;

pub use crate::timers::NEVER;

/// The life of a database's worker. The launcher moves Idle to Starting; the worker moves on to Running, and back to Idle
/// when it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum State {
    Idle = 0,
    Starting = 1,
    Running = 2,
}

#[repr(C)]
pub struct Database {
    /// 0: this slot is free.
    pub oid: AtomicU32,
    state: AtomicU32,
    pub worker_pid: AtomicI32,
    pub worker_latch: AtomicPtr<pg_sys::Latch>,
    /// The worker is to end.
    pub stop: AtomicBool,
    /// The worker found no extension here.
    pub absent: AtomicBool,

    pub marks: Marks,
    /// The last claim left events behind others in flight.
    pub waiting: AtomicBool,
    /// No claim has a higher token. Begins with the moment in microseconds, so that it is higher than what any start of the
    /// server before gave out.
    pub last_token: AtomicI64,

    pub timers: Timers,
    pub ended_attachments: AtomicU32,
    /// The worker did not get the claim lock in time: whoever holds it says when it lets go.
    pub claim_lock_wanted: AtomicBool,

    pub news: News<RING>,
    /// The tables hold what shared memory does not know of.
    pub recover: AtomicBool,
    pub recovered: AtomicBool,
    pub since: AtomicI64,

    pub counters: Counters,
    pub recount: Recount<RUNNING>,
}

impl Database {
    fn reset(&self) {
        for flag in [&self.stop, &self.absent, &self.claim_lock_wanted, &self.recover, &self.recovered] {
            flag.store(false, Relaxed);
        }
        self.state.store(State::Idle as u32, Relaxed);
        self.worker_pid.store(0, Relaxed);
        self.worker_latch.store(std::ptr::null_mut(), Relaxed);
        self.ended_attachments.store(0, Relaxed);
        self.since.store(clock::now(), Relaxed);
        self.last_token.store(clock::now(), Relaxed);
        self.news.reset();
        self.forget();
    }

    /// Nothing is known of the tables any more. Only while nobody writes to them.
    pub fn forget(&self) {
        self.recovered.store(false, SeqCst);
        self.marks.reset();
        self.waiting.store(false, SeqCst);
        self.timers.reset();
        self.counters.reset();
        self.recount.reset();
    }

    pub fn state(&self) -> State {
        match self.state.load(SeqCst) {
            1 => State::Starting,
            2 => State::Running,
            _ => State::Idle,
        }
    }

    /// At commit: changes by status of that transaction. True: the table is to be counted anew.
    pub fn count(&self, transaction: u64, changes: ByStatus) -> bool {
        changes != ByStatus::NONE && self.recount.add(&self.counters.by_status, transaction, changes)
    }

    pub fn set_state(&self, state: State) {
        self.state.store(state as u32, SeqCst);
    }
}

#[repr(C)]
pub struct Shared {
    /// Which start of the server this is: its moment in microseconds.
    pub boot: AtomicI64,
    pub next_attachment: AtomicI64,
    pub launcher_latch: AtomicPtr<pg_sys::Latch>,
    /// Databases whose workers must not run, one entry for each command that wants it so.
    pub suspended: [AtomicU32; REQUESTS],
    /// Databases to look at again.
    pub requests: [AtomicU32; REQUESTS],
    pub attachments: [Attachment; ATTACHMENTS],
    pub prepared: [Prepared; PREPARED],
}

impl Shared {
    /// Puts a database into a list of databases; false: the list is full.
    pub fn list(list: &[AtomicU32], oid: pg_sys::Oid) -> bool {
        list.iter().any(|slot| slot.compare_exchange(0, oid.to_u32(), SeqCst, SeqCst).is_ok())
    }

    /// Takes one entry of the database off a list.
    pub fn unlist(list: &[AtomicU32], oid: pg_sys::Oid) {
        let _found = list.iter().any(|slot| slot.compare_exchange(oid.to_u32(), 0, SeqCst, SeqCst).is_ok());
    }
}

static SHARED: AtomicPtr<Shared> = AtomicPtr::new(std::ptr::null_mut());
static DATABASES: AtomicPtr<Database> = AtomicPtr::new(std::ptr::null_mut());

/// More would waste memory on a server whose workers do other things: 40 kB each.
const MOST_DATABASES: usize = 1024;

fn slots() -> usize {
    backend::max_workers().min(MOST_DATABASES)
}

/// The slots of all databases, free ones among them.
pub fn databases() -> &'static [Database] {
    let first = DATABASES.load(Acquire);
    if first.is_null() {
        return &[];
    }
    // SAFETY: set once by `startup` to so many of them, in a segment that lives as long as the process.
    unsafe { std::slice::from_raw_parts(first, slots()) }
}

pub fn find(oid: pg_sys::Oid) -> Option<&'static Database> {
    databases().iter().find(|d| d.oid.load(Acquire) == oid.to_u32())
}

/// For the launcher alone. None: all slots are taken.
pub fn allocate(oid: pg_sys::Oid) -> Option<&'static Database> {
    let free = databases().iter().find(|d| d.oid.load(Acquire) == 0)?;
    free.reset();
    free.oid.store(oid.to_u32(), Release);
    Some(free)
}

/// None: the library was not preloaded, or this is the postmaster before it made the segment.
pub fn try_get() -> Option<&'static Shared> {
    // SAFETY: set once by `startup` to a segment that lives as long as the process.
    unsafe { SHARED.load(Acquire).as_ref() }
}

pub fn get() -> &'static Shared {
    try_get().unwrap_or_else(|| crate::error::raise(crate::error::Error::NotPreloaded))
}

/// This database's slot; none before the launcher made one.
pub fn current() -> Option<&'static Database> {
    static LAST: AtomicPtr<Database> = AtomicPtr::new(std::ptr::null_mut());
    let oid = backend::database();
    // SAFETY: null, or a slot in shared memory that was found here before; whose it is now, its oid says.
    let last = unsafe { LAST.load(Relaxed).as_ref() };
    if let Some(last) = last.filter(|slot| slot.oid.load(Acquire) == oid.to_u32()) {
        return Some(last);
    }
    let found = find(oid)?;
    LAST.store(std::ptr::from_ref(found).cast_mut(), Relaxed);
    Some(found)
}

static mut PREVIOUS_STARTUP: pg_sys::shmem_startup_hook_type = None;
#[cfg(not(feature = "pg14"))]
static mut PREVIOUS_REQUEST: pg_sys::shmem_request_hook_type = None;

/// In `_PG_init`: asks for the segment and for the moment to fill it.
pub fn install_hooks() {
    // SAFETY: the postmaster is single-threaded and runs this once, while it loads libraries.
    unsafe {
        PREVIOUS_STARTUP = pg_sys::shmem_startup_hook;
        pg_sys::shmem_startup_hook = Some(startup);
        #[cfg(not(feature = "pg14"))]
        {
            PREVIOUS_REQUEST = pg_sys::shmem_request_hook;
            pg_sys::shmem_request_hook = Some(request);
        }
        #[cfg(feature = "pg14")]
        request_space();
    }
}

/// # Safety
/// While libraries may ask for shared memory.
unsafe fn request_space() {
    // SAFETY: the caller's.
    unsafe {
        pg_sys::RequestAddinShmemSpace(size_of::<Shared>());
        pg_sys::RequestAddinShmemSpace(size_of::<Database>() * slots());
    }
}

#[cfg(not(feature = "pg14"))]
#[pgrx::pg_guard]
unsafe extern "C-unwind" fn request() {
    // SAFETY: called by PostgreSQL while libraries may ask for shared memory.
    unsafe {
        if let Some(previous) = PREVIOUS_REQUEST {
            previous();
        }
        request_space();
    }
}

#[pgrx::pg_guard]
unsafe extern "C-unwind" fn startup() {
    // SAFETY: called by PostgreSQL when shared memory is there; the lock is the one it wants held around ShmemInitStruct.
    // All-zero bytes are a valid `Shared`, and a valid `Database`.
    unsafe {
        if let Some(previous) = PREVIOUS_STARTUP {
            previous();
        }
        let lock = &raw mut (*pg_sys::MainLWLockArray.add(ADDIN_SHMEM_INIT_LOCK)).lock;
        let mut found = false;
        pg_sys::LWLockAcquire(lock, pg_sys::LWLockMode::LW_EXCLUSIVE);
        let shared = pg_sys::ShmemInitStruct(c"pg_outbox".as_ptr(), size_of::<Shared>(), &mut found).cast::<Shared>();
        if !found {
            std::ptr::write_bytes(shared, 0, 1);
            (*shared).boot.store(clock::now(), Relaxed);
            (*shared).next_attachment.store(clock::now(), Relaxed);
        }
        let size = size_of::<Database>() * slots();
        let databases = pg_sys::ShmemInitStruct(c"pg_outbox databases".as_ptr(), size, &mut found).cast::<Database>();
        if !found {
            std::ptr::write_bytes(databases, 0, slots());
        }
        pg_sys::LWLockRelease(lock);
        DATABASES.store(databases, Release);
        SHARED.store(shared, Release);
    }
}

/// The place of AddinShmemInitLock among PostgreSQL's own locks (lwlocknames.txt): 21 in each supported release.
const ADDIN_SHMEM_INIT_LOCK: usize = 21;

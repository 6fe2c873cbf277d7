//! This process as PostgreSQL knows it: safe reads of its variables, and state of our own that ends with it.

use pgrx::pg_sys;
use std::cell::UnsafeCell;
use std::ffi::{CStr, c_char};

/// State of this process. PostgreSQL's processes have one thread.
pub struct Local<T>(UnsafeCell<T>);

// SAFETY: a backend is single-threaded, so there is never a second thread to share it with.
unsafe impl<T> Sync for Local<T> {}

impl<T> Local<T> {
    pub const fn new(value: T) -> Self {
        Local(UnsafeCell::new(value))
    }

    /// Not to be nested.
    pub fn with<R>(&self, f: impl FnOnce(&mut T) -> R) -> R {
        // SAFETY: one thread, and no caller passes a closure that comes back here.
        f(unsafe { &mut *self.0.get() })
    }
}

/// The postmaster is loading `shared_preload_libraries`.
pub fn is_preloading() -> bool {
    // SAFETY: a plain read of a variable.
    unsafe { pg_sys::process_shared_preload_libraries_in_progress }
}

/// The server was started by pg_upgrade.
pub fn is_upgrading() -> bool {
    // SAFETY: a plain read of a variable.
    unsafe { pg_sys::IsBinaryUpgrade }
}

/// The server is a standby.
pub fn is_standby() -> bool {
    // SAFETY: reads a flag in PostgreSQL's shared memory.
    unsafe { pg_sys::RecoveryInProgress() }
}

/// `max_worker_processes`: set once, before libraries ask for shared memory.
pub fn max_workers() -> usize {
    // SAFETY: a plain read of a setting that does not change while the server runs.
    usize::try_from(unsafe { pg_sys::max_worker_processes }).unwrap_or(0)
}

pub fn pid() -> i32 {
    // SAFETY: a plain read of a variable.
    unsafe { pg_sys::MyProcPid }
}

/// The database that this process is connected to.
pub fn database() -> pg_sys::Oid {
    // SAFETY: a plain read of a variable.
    unsafe { pg_sys::MyDatabaseId }
}

/// The latch that others set to wake this process.
pub fn latch() -> *mut pg_sys::Latch {
    // SAFETY: a plain read of a variable that was set when the process started.
    unsafe { pg_sys::MyLatch }
}

/// What the client sent, and when its execution began: both the same for each row of a statement.
pub struct ClientStatement {
    text: *const c_char,
    began: i64,
}

impl ClientStatement {
    /// None in a process that has no client.
    pub fn running() -> Option<Self> {
        // SAFETY: reads two variables.
        let (text, began) = unsafe { (pg_sys::debug_query_string, pg_sys::GetCurrentStatementStartTimestamp()) };
        (!text.is_null()).then_some(ClientStatement { text, began })
    }

    /// No other statement of this process has the same.
    pub fn identity(&self) -> (usize, i64) {
        (self.text as usize, self.began)
    }

    /// In the client's own bytes. Looks for their end.
    pub fn text(&self) -> &[u8] {
        // SAFETY: PostgreSQL keeps the text, which ends in NUL, until the client's next message.
        unsafe { CStr::from_ptr(self.text) }.to_bytes()
    }
}

/// 1 in a transaction, one more in each savepoint.
pub fn nesting_level() -> i32 {
    // SAFETY: reads a number of this process's transaction state.
    unsafe { pg_sys::GetCurrentTransactionNestLevel() }
}

/// The running transaction's identity, with its epoch; 0: it has none, because it wrote nothing.
pub fn transaction() -> u64 {
    // SAFETY: reads this process's transaction state.
    unsafe { pg_sys::GetTopFullTransactionIdIfAny() }.value
}

/// All statements of the running transaction see the same: REPEATABLE READ and SERIALIZABLE.
pub fn has_one_snapshot() -> bool {
    // SAFETY: a plain read of a variable.
    unsafe { pg_sys::XactIsoLevel >= pg_sys::XACT_REPEATABLE_READ as i32 }
}

/// In `_PG_init`: has this called at each step of a transaction's end, in no particular order with others.
pub fn on_transaction_end(
    callback: unsafe extern "C-unwind" fn(event: pg_sys::XactEvent::Type, argument: *mut std::ffi::c_void),
) {
    // SAFETY: the callback is a function of this library, which is never unloaded.
    unsafe { pg_sys::RegisterXactCallback(Some(callback), std::ptr::null_mut()) }
}

/// In `_PG_init`: the same for savepoints.
pub fn on_savepoint_end(
    callback: unsafe extern "C-unwind" fn(
        event: pg_sys::SubXactEvent::Type,
        own: pg_sys::SubTransactionId,
        parent: pg_sys::SubTransactionId,
        argument: *mut std::ffi::c_void,
    ),
) {
    // SAFETY: the callback is a function of this library, which is never unloaded.
    unsafe { pg_sys::RegisterSubXactCallback(Some(callback), std::ptr::null_mut()) }
}

//! The server side of pg_outbox: what SQL can't do, and nothing else.
//!
//! In the order in which an event meets them:
//!
//! - [`trigger`]: an inserted row becomes a note in the backend's memory
//! - [`note`]: the notes of a transaction, with its savepoints, until it ends
//! - [`commit`]: at commit the notes go to shared memory
//! - [`shmem`], [`ring`], [`counters`], [`recount`]: what the backends and the worker share
//! - [`worker`]: the one process that notifies; its timers, its recovery
//! - [`pack`]: many events in one payload of at most 7,999 bytes
//! - [`launcher`]: one worker for each database that has the extension
//! - [`hooks`]: commands that end a database or the extension; two-phase commit
//! - [`roles`]: with whose rights code runs
//! - [`session`]: attached consumers, whose end is noticed at once
//! - [`api`], [`uuid`], [`guc`]: functions and settings
//!
//! Rules of delivery are not decided here: they are in `sql/`.

use pgrx::prelude::*;

mod api;
mod commit;
mod counters;
mod error;
mod guc;
mod hooks;
mod launcher;
mod note;
mod pack;
mod prepared;
mod recount;
mod ring;
mod roles;
mod session;
mod shmem;
mod trigger;
mod uuid;
mod wake;
mod worker;

pgrx::pg_module_magic!(name, version);

/// Runs in the postmaster, before there is shared memory.
#[pg_guard]
pub extern "C-unwind" fn _PG_init() {
    // SAFETY: plain reads of variables that the postmaster set before it loads libraries.
    let (preloading, upgrading) =
        unsafe { (pg_sys::process_shared_preload_libraries_in_progress, pg_sys::IsBinaryUpgrade) };
    if upgrading {
        return;
    }
    if !preloading {
        error::raise(error::Error::NotPreloaded);
    }
    guc::define();
    shmem::install_hooks();
    commit::register();
    hooks::install();
    launcher::register();
}

//! The server side of pg_outbox: what SQL can't do, and nothing else.
//!
//! In the order in which an event meets them:
//!
//! - [`trigger`]: an inserted row becomes a note in the backend's memory; [`traceparent`]: its trace context
//! - [`status`]: the states of an event
//! - [`note`]: the notes of a transaction, with its savepoints, until it ends
//! - [`commit`]: at commit the notes go to shared memory; [`two_phase`], [`prepared`]: in two phases
//! - [`shmem`], [`news`], [`ring`], [`marks`], [`timers`], [`counters`], [`recount`]: what the backends and the worker share
//! - [`worker`]: the one process that notifies; [`wake`], [`sleep`]: how it is woken and how it sleeps
//! - [`announce`], [`pack`]: many events in one payload of at most 7,999 bytes
//! - [`chores`], [`retention`]: what else the worker does, between announcements, and never waits for
//! - [`attempt`], [`backoff`], [`settings`]: a transaction that may fail, when to try again, what it depends on
//! - [`launcher`]: one worker for each database that has the extension
//! - [`hooks`], [`suspended`]: commands that end a database or the extension
//! - [`roles`]: with whose rights code runs
//! - [`backend`], [`clock`]: this process as PostgreSQL knows it, and the time
//! - [`session`], [`attachments`]: attached consumers, whose end is noticed at once
//! - [`api`], [`uuid`], [`guc`]: functions and settings
//!
//! Rules of delivery are not decided here: they are in `sql/`.

use pgrx::prelude::*;

mod announce;
mod api;
mod attachments;
mod attempt;
mod backend;
mod backoff;
mod chores;
mod clock;
mod commit;
mod counters;
mod error;
mod guc;
mod hooks;
mod launcher;
mod marks;
mod news;
mod note;
mod pack;
mod prepared;
mod recount;
mod retention;
mod ring;
mod roles;
mod session;
mod settings;
mod shmem;
mod sleep;
mod status;
mod suspended;
mod timers;
mod traceparent;
mod trigger;
mod two_phase;
mod uuid;
mod wake;
mod worker;

/// What the lock-free parts are built on; `models/` gives them loom's.
mod atomic {
    pub use std::sync::atomic::*;
}

pgrx::pg_module_magic!(name, version);

/// Runs in the postmaster, before there is shared memory.
#[pg_guard]
pub extern "C-unwind" fn _PG_init() {
    if backend::is_upgrading() {
        return;
    }
    if !backend::is_preloading() {
        error::raise(error::Error::NotPreloaded);
    }
    guc::define();
    shmem::install_hooks();
    commit::register();
    two_phase::register();
    suspended::register();
    hooks::install();
    launcher::register();
}

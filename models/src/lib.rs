//! The lock-free parts of the extension, on loom's atomics instead of the machine's. The files are the extension's own.

/// What they take for `std::sync::atomic`.
mod atomic {
    pub use loom::sync::atomic::*;
}

#[path = "../../pg_outbox_ext/src/ring.rs"]
#[allow(clippy::len_without_is_empty, reason = "the file belongs to the extension, where nobody asks that")]
pub mod ring;

#[path = "../../pg_outbox_ext/src/timers.rs"]
pub mod timers;

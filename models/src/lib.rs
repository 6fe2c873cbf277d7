//! The lock-free parts of the extension, on loom's atomics instead of the machine's. The files are the extension's own.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// What they take for `std::sync::atomic`.
mod atomic {
    pub use loom::sync::atomic::*;
}

#[path = "../../pg_outbox_ext/src/attachments.rs"]
pub mod attachments;

#[path = "../../pg_outbox_ext/src/marks.rs"]
pub mod marks;

#[path = "../../pg_outbox_ext/src/news.rs"]
pub mod news;

#[path = "../../pg_outbox_ext/src/recount.rs"]
pub mod recount;

#[path = "../../pg_outbox_ext/src/ring.rs"]
#[allow(clippy::len_without_is_empty, reason = "the file belongs to the extension, where nobody asks that")]
pub mod ring;

#[path = "../../pg_outbox_ext/src/status.rs"]
pub mod status;

#[path = "../../pg_outbox_ext/src/timers.rs"]
pub mod timers;

pub mod protocol;

/// The same files with one step changed: see `build.rs`.
#[allow(clippy::all, unused, reason = "they are broken on purpose")]
pub mod broken {
    macro_rules! variants {
        ($($name:ident)*) => { $(pub mod $name { include!(concat!(env!("OUT_DIR"), "/", stringify!($name), ".rs")); })* };
    }

    variants! {
        ring_published_early ring_not_reserved ring_never_full
        alarm_without_fence ring_without_fence alarm_set_last lease_end_dropped
        news_overflow_unsaid
        marks_not_swapped marks_lost_with_claim marks_raised
        recount_never_spoiled recount_without_fence
        attachment_not_reserved attachment_free_too_early
    }
}

/// Every interleaving in which no more than three times a thread is stopped where it could go on. Says how many there are.
pub fn model(test: impl Fn() + Sync + Send + 'static) {
    let tried = Arc::new(AtomicUsize::new(0));
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    let count = tried.clone();
    builder.check(move || {
        count.fetch_add(1, Relaxed);
        test();
    });
    let name = std::thread::current().name().unwrap_or_default().to_owned();
    #[allow(clippy::disallowed_macros, reason = "for whoever reads the output of the tests")]
    {
        println!("{name}: {} interleavings", tried.load(Relaxed));
    }
}

/// The tests of a module of cases that hold for the extension's own code, and of broken variants in which loom finds the
/// fault, with the words by which a case says so.
#[macro_export]
macro_rules! cases {
    (hold: $($case:ident)*; found: $($variant:ident => $found:ident $words:literal,)*) => {
        $(#[test] fn $case() { genuine::$case(); })*
        $(#[test] #[should_panic(expected = $words)] fn $variant() { self::$variant::$found(); })*
    };
}

//! Counting the events of a table that is being written to: exact, with no lock, and nobody waits.
//!
//! A count sees a snapshot. What that snapshot saw of a transaction is in the count already; all else is added when the
//! transaction commits. So the counters start at zero when the snapshot is known, each commit asks whether the snapshot saw
//! it, and the count is added at the end. While the snapshot is being chosen the question has no answer: a commit that
//! falls into that moment spoils the count, which then begins again.
//!
//! Pure code over atomics, which `models/` runs under loom.

use crate::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::*, fence};
use crate::status::{ByStatus, Counts};

/// Which transactions a count saw. Identities are PostgreSQL's, with their epoch where they are ordered.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Every transaction before this one was over.
    pub first_running: u64,
    /// No transaction from this one on had begun.
    pub next: u64,
    /// Those between the two that were not over.
    pub running: Vec<u32>,
}

/// A snapshot can remember so many running transactions. Should there be more, the others are taken for seen.
#[repr(C)]
pub struct Recount<const RUNNING: usize> {
    /// Odd: a snapshot is being chosen. Even: it is known (0: there never was one).
    generation: AtomicU64,
    spoiled: AtomicBool,
    first_running: AtomicU64,
    next: AtomicU64,
    len: AtomicU32,
    running: [AtomicU32; RUNNING],
}

impl<const RUNNING: usize> Default for Recount<RUNNING> {
    fn default() -> Self {
        Recount {
            generation: AtomicU64::default(),
            spoiled: AtomicBool::default(),
            first_running: AtomicU64::default(),
            next: AtomicU64::default(),
            len: AtomicU32::default(),
            running: std::array::from_fn(|_| AtomicU32::default()),
        }
    }
}

impl<const RUNNING: usize> Recount<RUNNING> {
    /// No count was made yet. Only while nobody else uses it.
    pub fn reset(&self) {
        self.generation.store(0, SeqCst);
        self.spoiled.store(false, SeqCst);
    }

    /// From now on a snapshot is being chosen.
    pub fn begin(&self) {
        self.spoiled.store(false, SeqCst);
        let generation = self.generation.load(SeqCst);
        self.generation.store((generation + 1) | 1, SeqCst);
        fence(SeqCst);
    }

    /// The snapshot is chosen; from now on the counters hold what it did not see. Does nothing when one is chosen already.
    pub fn chosen(&self, counts: &Counts, seen: impl FnOnce() -> Seen) {
        let generation = self.generation.load(SeqCst);
        if generation.is_multiple_of(2) {
            return;
        }
        let seen = seen();
        self.first_running.store(seen.first_running, SeqCst);
        self.next.store(seen.next, SeqCst);
        self.len.store(seen.running.len().min(RUNNING) as u32, SeqCst);
        for (slot, running) in self.running.iter().zip(&seen.running) {
            slot.store(*running, SeqCst);
        }
        counts.set(ByStatus::NONE);
        self.generation.store(generation + 1, SeqCst);
    }

    /// Whether a commit fell into the moment at which the snapshot was chosen.
    pub fn is_spoiled(&self) -> bool {
        self.spoiled.load(SeqCst)
    }

    /// At commit: the changes of that transaction, unless the last count has them. True: the table is to be counted anew.
    pub fn add(&self, counts: &Counts, transaction: u64, changes: ByStatus) -> bool {
        let generation = self.generation.load(SeqCst);
        let choosing = generation % 2 == 1;
        if choosing || generation == 0 || !self.saw(transaction) {
            counts.add(changes);
        }
        // A commit that does not see here that a count has begun has added to the counters before that count empties them.
        fence(SeqCst);
        let spoiled = choosing || self.generation.load(SeqCst) != generation;
        if spoiled {
            self.spoiled.store(true, SeqCst);
        }
        spoiled
    }

    fn saw(&self, transaction: u64) -> bool {
        if transaction >= self.next.load(SeqCst) {
            return false;
        }
        let len = (self.len.load(SeqCst) as usize).min(RUNNING);
        transaction < self.first_running.load(SeqCst)
            || !self.running[..len].iter().any(|running| running.load(SeqCst) == transaction as u32)
    }
}

/// A transaction's identity with its epoch, where `next` is the identity of the next one to begin.
pub fn with_epoch(transaction: u32, next: u64) -> u64 {
    let candidate = next & !0xffff_ffff | u64::from(transaction);
    if candidate > next { candidate.wrapping_sub(1 << 32) } else { candidate }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::Status;

    fn pending(counts: &Counts) -> i64 {
        counts[Status::Pending].load(SeqCst)
    }

    fn one() -> ByStatus {
        ByStatus::of(|status| i64::from(status == Status::Pending))
    }

    #[test]
    fn a_commit_that_the_count_saw_is_not_counted_twice() {
        let (recount, counts) = (Recount::<8>::default(), Counts::default());
        recount.begin();
        recount.chosen(&counts, || Seen { first_running: 10, next: 20, running: vec![10, 15] });
        for transaction in [9, 12, 19] {
            recount.add(&counts, transaction, one());
        }
        assert_eq!(pending(&counts), 0);
        for transaction in [10, 15, 20, 1 << 33] {
            recount.add(&counts, transaction, one());
        }
        assert_eq!(pending(&counts), 4);
        assert!(!recount.is_spoiled());
    }

    #[test]
    fn a_commit_while_the_snapshot_is_chosen_spoils_the_count_and_is_not_lost() {
        let (recount, counts) = (Recount::<8>::default(), Counts::default());
        recount.add(&counts, 5, one());
        assert!(!recount.is_spoiled());
        recount.begin();
        recount.add(&counts, 6, one());
        assert_eq!(pending(&counts), 2);
        recount.chosen(&counts, Seen::default);
        assert!(recount.is_spoiled());
        recount.begin();
        recount.chosen(&counts, Seen::default);
        assert!(!recount.is_spoiled());
    }

    #[test]
    fn the_epoch_is_the_one_before_when_the_counter_wrapped_in_between() {
        assert_eq!(with_epoch(7, 5 << 32 | 9), 5 << 32 | 7);
        assert_eq!(with_epoch(u32::MAX, 5 << 32 | 9), 4 << 32 | u64::from(u32::MAX));
    }
}

//! A bounded queue of event ids in shared memory: any backend pushes, the worker pops.
//!
//! Source: D. Vyukov, "Bounded MPMC queue", 1024cores.net. Each cell carries a sequence number that says whose turn it is,
//! so that nobody waits for a lock and a pusher that is descheduled delays only what comes behind it.
//!
//! Pure code over atomics, which `models/` runs under loom.

use crate::atomic::{AtomicI64, AtomicU64, Ordering::*};

#[derive(Default)]
#[repr(C)]
struct Cell {
    turn: AtomicU64,
    id: AtomicI64,
}

#[repr(C)]
pub struct Ring<const CAPACITY: usize> {
    tail: AtomicU64,
    head: AtomicU64,
    cells: [Cell; CAPACITY],
}

impl<const CAPACITY: usize> Default for Ring<CAPACITY> {
    fn default() -> Self {
        let ring = Ring {
            tail: AtomicU64::default(),
            head: AtomicU64::default(),
            cells: std::array::from_fn(|_| Cell::default()),
        };
        ring.reset();
        ring
    }
}

impl<const CAPACITY: usize> Ring<CAPACITY> {
    /// Empties the queue. Only while nobody else uses it.
    pub fn reset(&self) {
        self.tail.store(0, Relaxed);
        self.head.store(0, Relaxed);
        for (i, cell) in self.cells.iter().enumerate() {
            cell.turn.store(i as u64, Release);
        }
    }

    /// False: full.
    pub fn push(&self, id: i64) -> bool {
        let mut at = self.tail.load(Relaxed);
        loop {
            let cell = &self.cells[at as usize % CAPACITY];
            let turn = cell.turn.load(Acquire);
            if turn == at {
                match self.tail.compare_exchange_weak(at, at + 1, Relaxed, Relaxed) {
                    Ok(_) => {
                        cell.id.store(id, Relaxed);
                        cell.turn.store(at + 1, Release);
                        return true;
                    }
                    Err(now) => at = now,
                }
            } else if turn < at {
                return false;
            } else {
                at = self.tail.load(Relaxed);
            }
        }
    }

    /// For the worker alone. None: empty, or the next pusher is not done yet; it wakes the worker when it is.
    pub fn pop(&self) -> Option<i64> {
        let at = self.head.load(Relaxed);
        let cell = &self.cells[at as usize % CAPACITY];
        if cell.turn.load(Acquire) != at + 1 {
            return None;
        }
        let id = cell.id.load(Relaxed);
        cell.turn.store(at + CAPACITY as u64, Release);
        self.head.store(at + 1, Relaxed);
        Some(id)
    }

    /// Whoever pushed before it looked at an alarm that was not set yet is counted: see `timers`.
    pub fn len(&self) -> u64 {
        self.tail.load(Relaxed).saturating_sub(self.head.load(Relaxed))
    }
}

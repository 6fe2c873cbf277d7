//! What a transaction means to tell the worker, in the backend's own memory until it commits.
//!
//! Each savepoint that noted something has a frame of its own: dropped when the savepoint rolls back, merged into the one
//! around it when it is released. A transaction of any size keeps at most [`MAX_IDS`] ids.

use crate::status::ByStatus;
use crate::timers::{Moments, NEVER};

/// Ids listed for one transaction; beyond that the wake-up names no events.
pub const MAX_IDS: usize = 1000;

/// Latencies remembered for one transaction.
const MAX_LATENCIES: usize = 100_000;

/// What recovery found in the tables.
#[derive(Debug, Clone, Copy)]
pub struct Found {
    pub low_water: i64,
    pub high_water: i64,
    pub by_status: ByStatus,
    pub open_claims: i64,
}

#[derive(Debug, Clone)]
pub struct Note {
    level: i32,
    pub rows: Rows,
    pub claims: Claims,
    pub control: Control,
}

/// What became of rows, and what consumers are to be woken for.
#[derive(Debug, Clone)]
pub struct Rows {
    /// Events to announce by name.
    pub ids: Vec<i64>,
    /// There are more than those.
    pub overflow: bool,
    /// Lowest id that became fresh.
    pub min_id: i64,
    pub by_status: ByStatus,
    pub published: i64,
    pub processed: i64,
    pub failed: i64,
    pub unrouted: i64,
    /// Buckets of the events that were processed.
    pub latencies: Vec<u8>,
    /// When the first of what is due later is due.
    pub due: i64,
    /// When the first of the events that became processed is old enough to be removed.
    pub retention: i64,
    pub wake_due: bool,
    pub wake_released: bool,
}

/// What claims and settlements did, under the lock that they take.
#[derive(Debug, Clone)]
pub struct Claims {
    /// How many more are open.
    pub open: i64,
    /// When the first of their leases ends.
    pub lease_end: i64,
    /// Whether the last claim left events behind others in flight.
    pub waiting: Option<bool>,
    /// The low-water and the high-water mark.
    pub water: Option<(i64, i64)>,
    /// The lowered mark that a claim took over; given back if the claim rolls back alone.
    pub taken_lowered: i64,
}

/// What the worker itself is to know or to do.
#[derive(Debug, Clone)]
pub struct Control {
    /// Recovery is done, and found this.
    pub found: Option<Found>,
    /// Only the tables can tell.
    pub recover: bool,
    /// The extension was created.
    pub launch: bool,
    /// The extension is dropped.
    pub dropped: bool,
}

impl Rows {
    const NONE: Rows = Rows {
        ids: Vec::new(),
        overflow: false,
        min_id: NEVER,
        by_status: ByStatus::NONE,
        published: 0,
        processed: 0,
        failed: 0,
        unrouted: 0,
        latencies: Vec::new(),
        due: NEVER,
        retention: NEVER,
        wake_due: false,
        wake_released: false,
    };

    pub fn list(&mut self, id: i64) {
        self.overflow |= self.ids.len() >= MAX_IDS;
        if !self.overflow {
            self.ids.push(id);
        }
    }

    pub fn latency(&mut self, bucket: u8) {
        if self.latencies.len() < MAX_LATENCIES {
            self.latencies.push(bucket);
        }
    }

    pub fn lower(&mut self, id: i64) {
        self.min_id = self.min_id.min(id);
    }

    pub fn due_at(&mut self, at: i64) {
        self.due = self.due.min(at);
    }

    pub fn retain_until(&mut self, at: i64) {
        self.retention = self.retention.min(at);
    }

    fn absorb(&mut self, inner: Rows) {
        for id in inner.ids {
            self.list(id);
        }
        self.overflow |= inner.overflow;
        self.lower(inner.min_id);
        self.by_status.add(inner.by_status);
        self.published += inner.published;
        self.processed += inner.processed;
        self.failed += inner.failed;
        self.unrouted += inner.unrouted;
        for bucket in inner.latencies {
            self.latency(bucket);
        }
        self.due_at(inner.due);
        self.retain_until(inner.retention);
        self.wake_due |= inner.wake_due;
        self.wake_released |= inner.wake_released;
    }
}

impl Claims {
    const NONE: Claims = Claims { open: 0, lease_end: NEVER, waiting: None, water: None, taken_lowered: NEVER };

    /// Whether the transaction held the claim lock, as far as it can be told.
    fn held_lock(&self) -> bool {
        self.water.is_some() || self.waiting.is_some() || self.open != 0
    }

    fn is_none(&self) -> bool {
        !self.held_lock() && self.taken_lowered == NEVER && self.lease_end == NEVER
    }

    fn absorb(&mut self, inner: Claims) {
        self.open += inner.open;
        self.lease_end = self.lease_end.min(inner.lease_end);
        self.waiting = inner.waiting.or(self.waiting);
        self.water = inner.water.or(self.water);
        self.taken_lowered = self.taken_lowered.min(inner.taken_lowered);
    }
}

impl Control {
    const NONE: Control = Control { found: None, recover: false, launch: false, dropped: false };

    fn absorb(&mut self, inner: Control) {
        self.found = inner.found.or(self.found);
        self.recover |= inner.recover;
        self.launch |= inner.launch;
        self.dropped |= inner.dropped;
    }
}

impl Note {
    pub const fn new(level: i32) -> Self {
        Note { level, rows: Rows::NONE, claims: Claims::NONE, control: Control::NONE }
    }

    /// Whether there is nothing in it but rows that were inserted, changed or deleted by hand, so that COMMIT PREPARED can
    /// repeat it from a few numbers.
    pub fn is_only_rows(&self) -> bool {
        let rows = &self.rows;
        let by_hand = rows.unrouted == 0 && rows.processed == 0 && rows.failed == 0;
        let Control { found, recover, dropped, launch: _ } = self.control;
        by_hand && self.claims.is_none() && found.is_none() && !recover && !dropped
    }

    /// Whether the transaction held the claim lock, as far as it can be told.
    pub fn held_claim_lock(&self) -> bool {
        self.claims.held_lock()
    }

    /// What it adds to the worker's timers.
    pub fn moments(&self) -> Moments {
        Moments {
            due: self.rows.due,
            retention: self.rows.retention,
            // Recovery has counted them all.
            claims: if self.control.found.is_some() { 0 } else { self.claims.open },
            lease_end: self.claims.lease_end,
        }
    }

    fn absorb(&mut self, inner: Note) {
        self.rows.absorb(inner.rows);
        self.claims.absorb(inner.claims);
        self.control.absorb(inner.control);
    }
}

/// The frames of the running transaction, outermost first.
#[derive(Debug)]
pub struct Notes(Vec<Note>);

impl Notes {
    pub const fn new() -> Self {
        Notes(Vec::new())
    }

    /// The frame of this nesting level.
    pub fn at(&mut self, level: i32) -> &mut Note {
        if self.0.last().is_none_or(|top| top.level < level) {
            self.0.push(Note::new(level));
        }
        let top = self.0.len() - 1;
        &mut self.0[top]
    }

    /// The savepoint of this level is released.
    pub fn release(&mut self, level: i32) {
        while let Some(mut top) = self.0.pop_if(|top| top.level >= level) {
            match self.0.last_mut() {
                Some(outer) if outer.level >= level - 1 => outer.absorb(top),
                _ => {
                    top.level = level - 1;
                    self.0.push(top);
                    return;
                }
            }
        }
    }

    /// The savepoint of this level rolled back. Returns the lowered mark that was taken over in it.
    pub fn roll_back(&mut self, level: i32) -> i64 {
        let mut taken = NEVER;
        while let Some(top) = self.0.pop_if(|top| top.level >= level) {
            taken = taken.min(top.claims.taken_lowered);
        }
        taken
    }

    /// Everything that was noted, as one; the transaction is over.
    pub fn take(&mut self) -> Option<Note> {
        let mut frames = std::mem::take(&mut self.0).into_iter();
        let mut first = frames.next()?;
        frames.for_each(|note| first.absorb(note));
        Some(first)
    }

    /// The transaction is undone. Whether it held the claim lock.
    pub fn clear(&mut self) -> bool {
        std::mem::take(&mut self.0).iter().any(Note::held_claim_lock)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rolled_back_savepoint_leaves_nothing() {
        let mut notes = Notes::new();
        notes.at(1).rows.list(1);
        notes.at(2).rows.list(2);
        notes.at(3).rows.list(3);
        notes.at(3).claims.taken_lowered = 5;
        notes.release(3);
        assert_eq!(notes.roll_back(2), 5);
        notes.at(1).rows.list(4);
        assert_eq!(notes.take().expect("something was noted").rows.ids, [1, 4]);
    }

    #[test]
    fn a_released_savepoint_counts_even_when_nothing_was_noted_around_it() {
        let mut notes = Notes::new();
        notes.at(4).rows.list(7);
        notes.release(4);
        notes.release(3);
        assert_eq!(notes.roll_back(3), NEVER);
        assert_eq!(notes.take().expect("something was noted").rows.ids, [7]);
        assert!(notes.take().is_none());
    }

    #[test]
    fn a_million_ids_keep_memory_bounded() {
        let mut notes = Notes::new();
        (0..1_000_000).for_each(|id| notes.at(1).rows.list(id));
        let note = notes.take().expect("something was noted");
        assert!(note.rows.overflow && note.rows.ids.len() == MAX_IDS);
    }
}

//! Between which ids claims have to look.
//!
//! Holds true whenever a claim begins: no fresh or claimed event that anybody can see has an id below both the low-water
//! mark and the lowered mark. So a commit lowers the mark after it has become visible, and a claim takes the snapshot that
//! it walks with after it has taken the lowered mark over. It walks from the lowest mark that it reads after that, so that
//! of two commits of a session it sees the first if it sees the second.
//!
//! Pure code over atomics, which `models/` runs under loom.

use crate::atomic::{AtomicI64, Ordering::*};
use crate::timers::NEVER;

/// Below every id.
pub const BEFORE_ALL: i64 = i64::MIN;

/// An id as a lowered mark holds it, for which [`NEVER`] means none.
pub fn as_lowered(id: i64) -> i64 {
    id.min(NEVER - 1)
}

#[derive(Default)]
#[repr(C)]
pub struct Marks {
    /// Every fresh or claimed event has this id or a higher one. Written by claims alone.
    low_water: AtomicI64,
    /// Lowest id committed since a claim last looked.
    lowered: AtomicI64,
    /// No claimed event has a higher id.
    high_water: AtomicI64,
}

impl Marks {
    /// Nothing is known. Only while nobody else uses them.
    pub fn reset(&self) {
        self.low_water.store(BEFORE_ALL, SeqCst);
        self.lowered.store(NEVER, SeqCst);
        self.high_water.store(0, SeqCst);
    }

    /// An event with this id may be fresh, and is visible to whoever sees this.
    pub fn lower(&self, id: i64) {
        self.lowered.fetch_min(id, SeqCst);
    }

    /// For a claim: where its walk starts, and what commits had lowered the mark to. Both marks say so until the claim
    /// commits, so that nothing is lost when it does not.
    pub fn take_over(&self) -> (i64, i64) {
        let lowered = self.lowered.swap(NEVER, SeqCst);
        (self.low_water.fetch_min(lowered, SeqCst).min(lowered), lowered)
    }

    /// At the commit of a claim.
    pub fn set(&self, low_water: i64, high_water: i64) {
        self.low_water.store(low_water, SeqCst);
        self.high_water.fetch_max(high_water, SeqCst);
    }

    /// At the commit of a recovery, which read the tables.
    pub fn find(&self, low_water: i64, high_water: i64) {
        self.low_water.store(low_water, SeqCst);
        self.high_water.store(high_water, SeqCst);
    }

    pub fn low_water(&self) -> i64 {
        self.low_water.load(SeqCst)
    }

    pub fn high_water(&self) -> i64 {
        self.high_water.load(SeqCst)
    }

    /// Where a claim would start: for statistics, and for a claim that has its snapshot. Of two events that a session
    /// committed one after the other, the snapshot may show the second while the first is below the mark that was taken over.
    pub fn lowest(&self) -> i64 {
        self.low_water().min(self.lowered.load(SeqCst))
    }
}

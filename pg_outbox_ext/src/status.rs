//! The states of an event, as `outbox_events.status` spells them.

use crate::atomic::{AtomicI64, Ordering::Relaxed};
use std::ops::{Index, IndexMut};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Pending,
    Processing,
    Processed,
    Failed,
}

impl Status {
    /// In the order of [`ByStatus`].
    pub const ALL: [Status; 4] = [Status::Pending, Status::Processing, Status::Processed, Status::Failed];

    pub fn parse(word: &[u8]) -> Option<Status> {
        match word {
            b"pending" => Some(Status::Pending),
            b"processing" => Some(Status::Processing),
            b"processed" => Some(Status::Processed),
            b"failed" => Some(Status::Failed),
            _ => None,
        }
    }
}

/// Something of each status, such as how many events have it.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct PerStatus<T>([T; Status::ALL.len()]);

/// Events by status, as changes or as totals.
pub type ByStatus = PerStatus<i64>;

/// The same, shared between processes.
pub type Counts = PerStatus<AtomicI64>;

impl<T> PerStatus<T> {
    pub fn of(value: impl FnMut(Status) -> T) -> Self {
        PerStatus(Status::ALL.map(value))
    }
}

impl ByStatus {
    pub const NONE: ByStatus = PerStatus([0; Status::ALL.len()]);

    pub fn add(&mut self, other: ByStatus) {
        for status in Status::ALL {
            self[status] += other[status];
        }
    }
}

impl Counts {
    pub fn add(&self, delta: ByStatus) {
        for status in Status::ALL.into_iter().filter(|status| delta[*status] != 0) {
            self[status].fetch_add(delta[status], Relaxed);
        }
    }

    pub fn set(&self, counts: ByStatus) {
        for status in Status::ALL {
            self[status].store(counts[status], Relaxed);
        }
    }
}

impl<T> Index<Status> for PerStatus<T> {
    type Output = T;

    fn index(&self, status: Status) -> &T {
        &self.0[status as usize]
    }
}

impl<T> IndexMut<Status> for PerStatus<T> {
    fn index_mut(&mut self, status: Status) -> &mut T {
        &mut self.0[status as usize]
    }
}

//! What the worker has to tell: events by their ids, and wake-ups that name none.
//!
//! Pure code over atomics, which `models/` runs under loom.

use crate::atomic::{AtomicBool, Ordering::*};
use crate::ring::Ring;

#[derive(Default)]
#[repr(C)]
pub struct News<const CAPACITY: usize> {
    /// More events than could be listed.
    overflow: AtomicBool,
    due: AtomicBool,
    released: AtomicBool,
    ring: Ring<CAPACITY>,
}

impl<const CAPACITY: usize> News<CAPACITY> {
    /// Only while nobody else uses it.
    pub fn reset(&self) {
        self.wake_ups().iter().for_each(|(flag, _)| flag.store(false, Relaxed));
        self.ring.reset();
    }

    fn wake_ups(&self) -> [(&AtomicBool, &'static str); 3] {
        [(&self.overflow, "overflow"), (&self.due, "due"), (&self.released, "released")]
    }

    /// At commit: these events, and these wake-ups in the order overflow, due, released. False: there is nothing to tell.
    pub fn tell(&self, ids: &[i64], [overflow, due, released]: [bool; 3]) -> bool {
        // Where not all can be named, none is: consumers look at the tables anyway.
        let overflow = overflow || !ids.iter().all(|id| self.ring.push(*id));
        let raised = [overflow, due, released];
        for ((flag, _), _) in self.wake_ups().iter().zip(raised).filter(|(_, raised)| *raised) {
            // Read and written at once, as the worker does: each of the two comes after what the other left.
            flag.fetch_or(true, SeqCst);
        }
        !ids.is_empty() || raised.contains(&true)
    }

    /// For the worker: consumers are to look at the tables.
    pub fn look_at_all(&self) {
        self.overflow.store(true, SeqCst);
    }

    /// For the worker: consumers are told to look at the tables anyway.
    pub fn all_is_told(&self) {
        self.overflow.store(false, SeqCst);
    }

    pub fn is_any(&self) -> bool {
        self.waiting() > 0 || self.wake_ups().iter().any(|(flag, _)| flag.load(SeqCst))
    }

    /// Ids that wait to be announced.
    pub fn waiting(&self) -> u64 {
        self.ring.len()
    }

    /// For the worker: the reasons of wake-ups, and so many ids at most.
    pub fn take(&self, most: usize) -> (impl Iterator<Item = &'static str>, Vec<i64>) {
        let raised = self.wake_ups().map(|(flag, reason)| flag.swap(false, SeqCst).then_some(reason));
        (raised.into_iter().flatten(), std::iter::from_fn(|| self.ring.pop()).take(most).collect())
    }
}

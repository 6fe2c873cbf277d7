//! How much one lane may hold, and what the next claim will bring it. Pure.
//!
//! A claim asks for one number of events for all its destinations. What it will bring to each is estimated from what it
//! brought lately, so that one with little room and nothing to do makes nobody's claims smaller. What is more than that
//! it holds all the same, up to a second limit.

use std::time::Instant;

use crate::budget::{Room, Size};

/// Bytes of an event, of a lane that has had none.
const USUAL_SIZE: usize = 1024;

/// A smaller share is none: no claim is so large that it would matter.
const LEAST_SHARE: f64 = 1e-4;

/// What one lane holds.
#[derive(Debug, Clone)]
pub struct Window {
    /// Asked for up to here.
    pub limit: usize,
    /// Taken up to here.
    pub hard_limit: usize,
    pub held: usize,
    /// Of events that are not large.
    pub bytes: usize,
    /// A large event is among those held.
    pub large: bool,
    /// Of the events of a claim that could have brought some for it, the part that did.
    pub share: f64,
    /// Bytes of an event, on a moving average.
    pub average: usize,
    pub full_since: Option<Instant>,
    pub lagging: bool,
    /// Left alone: neither asked for nor waited for.
    pub paused: bool,
    /// Something of the present batch was refused: what follows it could be of its aggregate.
    refused: bool,
    /// The largest that was refused: without room for that there is nothing to ask for.
    wanted: Option<Size>,
}

impl Window {
    pub fn new(limit: usize, hard_limit: usize) -> Self {
        Window {
            limit: limit.max(1),
            hard_limit: hard_limit.max(limit).max(1),
            held: 0,
            bytes: 0,
            large: false,
            share: 0.0,
            average: USUAL_SIZE,
            full_since: None,
            lagging: false,
            paused: false,
            refused: false,
            wanted: None,
        }
    }

    /// Takes a delivery in, unless there is no room. An idle lane takes one of any size, as far as the relay has room. After
    /// one that is refused the rest of the batch is refused too: none may pass an earlier one of its aggregate.
    pub fn admit(&mut self, size: Size, room: &Room) -> bool {
        if !self.refused {
            let fits = self.fits(size, room);
            let counts = match self.held {
                0 => room.events > 0,
                held => held < self.hard_limit.min(room.for_lane),
            };
            self.refused = !(fits && counts);
            self.wanted = (!fits).then_some(size);
        }
        if self.refused {
            return false;
        }
        self.held += 1;
        match size.large {
            true => self.large = true,
            false => self.bytes += size.bytes,
        }
        true
    }

    fn fits(&self, size: Size, room: &Room) -> bool {
        match (size.large, self.bytes) {
            (true, _) => !self.large && room.takes_large(size.bytes),
            (false, 0) => room.bytes > 0,
            (false, bytes) => bytes + size.bytes <= room.bytes,
        }
    }

    /// One of the batch was too large to be kept until it is given to a lane.
    pub fn refuse(&mut self, size: Size) {
        if !self.refused {
            (self.refused, self.wanted) = (true, Some(size));
        }
    }

    /// A batch is complete.
    pub fn end_batch(&mut self) {
        if !self.refused {
            self.wanted = None;
        }
        self.refused = false;
    }

    pub fn leave(&mut self, size: Size) {
        self.held = self.held.saturating_sub(1);
        match size.large {
            true => self.large = false,
            false => self.bytes = self.bytes.saturating_sub(size.bytes),
        }
    }

    /// A claim of so many events brought so many for it, of so many bytes.
    pub fn brought(&mut self, deliveries: usize, bytes: usize, events: usize) {
        if events > 0 {
            let part = deliveries as f64 / events as f64;
            self.share = part.max((self.share * 3.0 + part) / 4.0);
            if self.share < LEAST_SHARE {
                self.share = 0.0;
            }
        }
        if let Some(average) = bytes.checked_div(deliveries) {
            self.average = if average > self.average { average } else { (self.average * 3 + average) / 4 };
        }
    }

    /// A claim found no more for it.
    pub fn caught_up(&mut self) {
        self.lagging = false;
        self.full_since = None;
        self.wanted = None;
    }

    /// Nothing would be lost if it were forgotten.
    pub fn is_at_rest(&self) -> bool {
        self.held == 0 && !self.lagging && self.wanted.is_none()
    }

    /// Deliveries that it could hold, if the others kept what they hold.
    fn capacity(&self, room: &Room) -> usize {
        if self.held == 0 && room.events == 0 {
            return 0;
        }
        let bytes = (room.bytes + self.bytes) / 2;
        let count = self.limit.min((room.for_lane + self.held) / 2).min(bytes / self.average.max(1));
        count.max(1)
    }

    /// Room for events of its average size.
    fn room(&self, room: &Room) -> usize {
        if self.wanted.is_some_and(|size| !self.fits(size, room)) {
            return 0;
        }
        let capacity = self.capacity(room);
        if self.held == 0 {
            return capacity;
        }
        let bytes = (room.bytes + self.bytes) / 2;
        capacity.saturating_sub(self.held).min(bytes.saturating_sub(self.bytes) / self.average.max(1))
    }

    /// The most events of a claim that should leave it within its limit.
    pub fn bearable(&self, room: &Room) -> usize {
        // Cut off at what is more than any batch.
        (self.room(room) as f64 / self.share.max(1e-6)).min(1e9) as usize
    }

    /// Claims are worth their price from here on.
    pub fn is_open(&self, batch: usize, room: &Room) -> bool {
        self.room(room) >= (self.capacity(room).min(batch) / 2).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::{Budget, Load};

    const MIB: usize = 1 << 20;

    /// A lane that is alone may hold 1 MiB of events that are not large.
    const BUDGET: Budget = Budget { max_events: 100_000, max_bytes: 4 * MIB };

    /// While nobody else holds anything.
    fn alone(window: &Window) -> Room {
        BUDGET.room(Load { events: window.held, bytes: window.bytes, large: 0 })
    }

    fn admit(window: &mut Window, bytes: usize) -> bool {
        let room = alone(window);
        window.admit(BUDGET.size(bytes), &room)
    }

    fn is_open(window: &Window) -> bool {
        window.is_open(500, &alone(window))
    }

    #[test]
    fn large_events_shrink_the_claims_and_one_always_goes() {
        let mut window = Window { share: 1.0, average: MIB / 4, ..Window::new(2000, 2000) };
        assert_eq!(window.bearable(&alone(&window)), 4);
        window.average = 100 * MIB;
        assert_eq!(window.bearable(&alone(&window)), 1);
        assert!(admit(&mut window, 100 * MIB));
        assert!(!admit(&mut window, MIB));
        window.leave(BUDGET.size(100 * MIB));
        window.end_batch();
        assert!(admit(&mut window, 1) && window.held == 1 && window.bytes == 1);
    }

    #[test]
    fn nothing_passes_what_was_refused_before_it_in_its_batch() {
        let mut window = Window { held: 3, bytes: MIB * 7 / 8, ..Window::new(2000, 2000) };
        assert!(!admit(&mut window, MIB / 2) && !admit(&mut window, 1));
        window.end_batch();
        assert!(admit(&mut window, 1));
    }

    #[test]
    fn more_than_was_foreseen_is_held_all_the_same() {
        let mut window = Window::new(4, 300);
        assert_eq!((0..500).filter(|_| admit(&mut window, 1)).count(), 300);
        window.end_batch();
        assert!(!is_open(&window), "and nothing is asked for until it has room");
    }

    #[test]
    fn nothing_is_asked_for_before_there_is_room_for_what_was_refused() {
        let mut window = Window::new(2000, 2000);
        assert!(admit(&mut window, MIB / 2) && admit(&mut window, MIB * 3 / 8) && !admit(&mut window, MIB / 2));
        window.end_batch();
        assert!(!is_open(&window), "small ones behind it would only be given back");
        window.leave(BUDGET.size(MIB / 2));
        assert!(is_open(&window) && admit(&mut window, MIB / 2));
        window.end_batch();
        assert!(admit(&mut window, 2 * MIB), "a large one goes beside the others");
        window.refuse(BUDGET.size(3 * MIB));
        window.end_batch();
        assert!(!is_open(&window), "there is one already");
        window.leave(BUDGET.size(2 * MIB));
        window.leave(BUDGET.size(MIB / 2));
        assert!(is_open(&window));
    }

    #[test]
    fn an_idle_lane_waits_only_while_the_relay_has_no_room_at_all() {
        let mut window = Window::new(4, 4);
        let full = BUDGET.room(Load { events: 100_000, bytes: 0, large: 0 });
        assert!(!window.is_open(500, &full) && !window.admit(BUDGET.size(1), &full));
        window.end_batch();
        let nearly = BUDGET.room(Load { events: 99_999, bytes: 2 * MIB - 1, large: 0 });
        assert!(window.is_open(500, &nearly) && window.admit(BUDGET.size(1000), &nearly));
        assert!(!window.admit(BUDGET.size(1000), &nearly), "one");
    }

    #[test]
    fn sizes_are_those_of_the_lane() {
        let mut window = Window::new(2000, 2000);
        window.brought(10, 10 * MIB / 4, 10);
        assert_eq!(window.average, MIB / 4);
        for _ in 0..40 {
            window.brought(10, 1000, 10);
        }
        assert!(window.average < 200, "{}", window.average);
    }
}

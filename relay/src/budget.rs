//! What the relay may hold as a whole, and what that leaves to one lane. Pure.
//!
//! A lane may hold as much as is left: so one that takes all it can get leaves as much as it has, two leave a third, and
//! so on; nobody has to be told to give something back. Large events have half of the bytes to themselves, because one of
//! them is more than what is left may be; each lane has one at a time, and one always goes.
//!
//! Source of the rule: A. Choudhury and E. Hahne, "Dynamic Queue Length Thresholds for Shared-Memory Packet Switches",
//! 1998.

/// The bounds of the whole relay.
#[derive(Debug, Clone, Copy)]
pub struct Budget {
    pub max_events: usize,
    pub max_bytes: usize,
}

/// The payload of an event, as far as it counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Size {
    pub bytes: usize,
    pub large: bool,
}

/// What is held, each event once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Load {
    pub events: usize,
    /// Of events that are not large.
    pub bytes: usize,
    /// Of large ones.
    pub large: usize,
}

impl Load {
    pub fn add(&mut self, size: Size) {
        self.events += 1;
        *self.of(size) += size.bytes;
    }

    pub fn remove(&mut self, size: Size) {
        self.events = self.events.saturating_sub(1);
        let bytes = self.of(size);
        *bytes = bytes.saturating_sub(size.bytes);
    }

    fn of(&mut self, size: Size) -> &mut usize {
        if size.large { &mut self.large } else { &mut self.bytes }
    }
}

/// What is left.
#[derive(Debug, Clone, Copy)]
pub struct Room {
    /// Events that may be claimed, and so be some idle lane's first.
    pub events: usize,
    /// Deliveries that a lane may hold.
    pub for_lane: usize,
    /// Bytes that a lane may hold, without large events.
    pub bytes: usize,
    large: usize,
    no_large: bool,
}

impl Room {
    /// Whether one more large event may be held.
    pub fn takes_large(&self, bytes: usize) -> bool {
        self.no_large || bytes <= self.large
    }
}

impl Budget {
    pub fn size(&self, bytes: usize) -> Size {
        Size { bytes, large: bytes > self.max_bytes / 8 }
    }

    pub fn room(&self, load: Load) -> Room {
        let half = self.max_bytes / 2;
        Room {
            events: self.max_events.saturating_sub(load.events),
            // A quarter is for the first events of lanes that had none.
            for_lane: (self.max_events - self.max_events / 4).saturating_sub(load.events),
            bytes: half.saturating_sub(load.bytes),
            large: half.saturating_sub(load.large),
            no_large: load.large == 0,
        }
    }

    /// Bytes of payloads of one claim to keep until they are given to their lanes.
    pub fn bytes_of_claim(&self, load: Load) -> usize {
        self.max_bytes.saturating_sub(load.bytes + load.large).max(self.max_bytes / 8).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: Budget = Budget { max_events: 1000, max_bytes: 8000 };

    #[test]
    fn what_is_held_is_counted_by_kind_and_given_back() {
        let (small, large) = (BUDGET.size(1000), BUDGET.size(1001));
        assert!(!small.large && large.large);
        let mut load = Load::default();
        load.add(small);
        load.add(large);
        assert_eq!(load, Load { events: 2, bytes: 1000, large: 1001 });
        load.remove(small);
        load.remove(large);
        assert_eq!(load, Load::default());
    }

    /// Lanes end one delivery in turn; whoever may take the next takes all it can get, and the first always asks first.
    #[test]
    fn greedy_lanes_come_to_share_what_there_is_and_leave_as_much_to_the_next() {
        for lanes in [1, 2, 9, 100] {
            let (mut load, mut held) = (Load::default(), vec![0; lanes]);
            for step in 0..100_000 {
                if held[step % lanes] > 0 {
                    held[step % lanes] -= 1;
                    load.remove(BUDGET.size(1));
                }
                while let Some(lane) = (0..lanes).find(|lane| held[*lane] < BUDGET.room(load).for_lane) {
                    held[lane] += 1;
                    load.add(BUDGET.size(1));
                }
            }
            let (least, most) = (held.iter().min().expect("lanes"), held.iter().max().expect("lanes"));
            assert!(most - least <= 2, "{lanes} lanes hold {least} to {most}");
            let left = BUDGET.room(load);
            assert!(left.for_lane + 2 >= *most && left.events >= 250, "{lanes} lanes leave {left:?}");
        }
    }

    #[test]
    fn one_large_event_always_goes_and_the_others_share_half_of_the_bytes() {
        let empty = BUDGET.room(Load::default());
        assert!(empty.takes_large(1_000_000) && empty.bytes == 4000);
        let load = Load { events: 1, bytes: 0, large: 1_000_000 };
        assert!(!BUDGET.room(load).takes_large(1001));
        assert_eq!(BUDGET.room(load).bytes, 4000, "small ones don't notice");
        assert_eq!(BUDGET.bytes_of_claim(load), 1000);
        let load = Load { events: 1, bytes: 0, large: 2000 };
        assert!(BUDGET.room(load).takes_large(2000) && !BUDGET.room(load).takes_large(2001));
    }
}

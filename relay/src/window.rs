//! How much each destination may hold, and what the next claim asks for. Pure: the caller brings the clock.
//!
//! A claim that leaves a destination out makes the database list what that destination is owed, so a destination that is
//! merely busy is waited for, for a moment. One that stays full is left behind: it gets small claims of its own pace
//! while the others go on without it, until it has caught up.
//!
//! A claim asks for one number of events for all its destinations. What it will bring to each is estimated from what it
//! brought lately, so that one with little room and nothing to do makes nobody's claims smaller. What is more than that
//! it holds all the same, up to a second limit.

use std::time::{Duration, Instant};

/// How long the others wait for a destination that has just become full.
pub const PATIENCE: Duration = Duration::from_millis(20);

/// What one destination holds.
#[derive(Debug, Clone)]
pub struct Window {
    /// Asked for up to here.
    pub limit: usize,
    /// Taken up to here.
    pub hard_limit: usize,
    pub byte_limit: usize,
    pub held: usize,
    pub bytes: usize,
    /// Of the events of a claim that could have brought some for it, the part that did.
    share: f64,
    full_since: Option<Instant>,
    lagging: bool,
    /// A claim has been made without it.
    left_out: bool,
    /// Something of the present batch was refused: what follows it could be of its aggregate.
    refused: bool,
    /// Bytes of the largest that was refused: without room for that there is nothing to ask for.
    wanted: usize,
}

impl Window {
    pub fn new(limit: usize, hard_limit: usize, byte_limit: usize) -> Self {
        Window {
            limit: limit.max(1),
            hard_limit: hard_limit.max(limit).max(1),
            byte_limit,
            held: 0,
            bytes: 0,
            share: 0.0,
            full_since: None,
            lagging: false,
            left_out: false,
            refused: false,
            wanted: 0,
        }
    }

    /// Takes a delivery in, unless there is no room. An idle destination takes any size. After one that is refused the
    /// rest of the batch is refused too: none may pass an earlier one of its aggregate.
    pub fn admit(&mut self, size: usize) -> bool {
        if !self.refused && self.held > 0 {
            let no_bytes = self.bytes + size > self.byte_limit;
            self.refused = no_bytes || self.held >= self.hard_limit;
            self.wanted = if no_bytes { size } else { 0 };
        }
        if self.refused {
            return false;
        }
        self.held += 1;
        self.bytes += size;
        true
    }

    /// One of the batch was too large to be kept until it is given to a destination.
    pub fn refuse(&mut self, size: usize) {
        if !self.refused {
            (self.refused, self.wanted) = (true, size);
        }
    }

    /// A batch is complete.
    pub fn end_batch(&mut self) {
        if !self.refused {
            self.wanted = 0;
        }
        self.refused = false;
    }

    pub fn leave(&mut self, size: usize) {
        self.held = self.held.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(size);
    }

    /// A claim of so many events brought so many for it.
    pub fn brought(&mut self, deliveries: usize, events: usize) {
        if events > 0 {
            let part = deliveries as f64 / events as f64;
            self.share = part.max((self.share * 3.0 + part) / 4.0);
        }
    }

    /// A claim found no more for it.
    pub fn caught_up(&mut self) {
        self.lagging = false;
        self.full_since = None;
    }

    /// A claim was made without it, and now it has room: there may be something for it alone.
    pub fn is_missed(&self, batch: usize, average: usize) -> bool {
        self.left_out && self.is_open(batch, average)
    }

    /// Room for events of this size on average.
    fn room(&self, average: usize) -> usize {
        if self.held == 0 {
            return self.limit.min((self.byte_limit / average.max(1)).max(1));
        }
        let bytes = self.byte_limit.saturating_sub(self.bytes);
        if bytes < self.wanted {
            return 0;
        }
        self.limit.saturating_sub(self.held).min(bytes / average.max(1))
    }

    /// The most events of a claim that should leave it within its limit.
    fn bearable(&self, average: usize) -> usize {
        // Cut off at what is more than any batch.
        (self.room(average) as f64 / self.share.max(1e-6)).min(1e9) as usize
    }

    /// Claims are worth their price from here on.
    fn is_open(&self, batch: usize, average: usize) -> bool {
        let capacity = self.limit.min((self.byte_limit / average.max(1)).max(1));
        self.room(average) >= (capacity.min(batch) / 2).max(1)
    }
}

#[derive(Debug, PartialEq)]
pub enum Plan {
    /// Ask for so many events, for the windows at these positions.
    Claim { count: usize, include: Vec<usize> },
    /// Nothing to ask for now. Ask again when a delivery ends, or at this moment.
    Wait { until: Option<Instant> },
}

/// Decides the next claim. `lagging_too` says that lagging destinations are to be included this time.
pub fn plan(windows: &mut [&mut Window], batch: usize, average: usize, lagging_too: bool, now: Instant) -> Plan {
    let open: Vec<bool> = windows.iter().map(|w| w.is_open(batch, average)).collect();
    if !open.contains(&true) {
        return Plan::Wait { until: None };
    }
    let mut wait: Option<Instant> = None;
    for (window, open) in windows.iter_mut().zip(&open) {
        if !open && !window.lagging {
            let end = *window.full_since.get_or_insert(now) + PATIENCE;
            window.lagging = end <= now;
            if !window.lagging {
                wait = Some(wait.map_or(end, |earliest| earliest.min(end)));
            }
        }
    }
    if wait.is_some() {
        return Plan::Wait { until: wait };
    }
    let prompt = |i: &usize| open[*i] && !windows[*i].lagging;
    let only_lagging = !(0..windows.len()).any(|i| prompt(&i));
    let include: Vec<usize> =
        (0..windows.len()).filter(|i| prompt(i) || (open[*i] && (lagging_too || only_lagging))).collect();
    for (i, window) in windows.iter_mut().enumerate() {
        window.left_out = !include.contains(&i);
    }
    let room = include.iter().map(|i| windows[*i].bearable(average)).min().unwrap_or(0);
    Plan::Claim { count: room.min(batch).max(1), include }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    fn full(limit: usize) -> Window {
        Window { held: limit, share: 1.0, ..Window::new(limit, 2000, MIB) }
    }

    fn busy(limit: usize) -> Window {
        Window { share: 1.0, ..Window::new(limit, 2000, MIB) }
    }

    fn decide(windows: &mut [Window], lagging_too: bool, now: Instant) -> Plan {
        plan(&mut windows.iter_mut().collect::<Vec<_>>(), 500, 100, lagging_too, now)
    }

    #[test]
    fn a_lone_full_destination_is_waited_for_without_a_timer() {
        let mut windows = [full(2000)];
        assert_eq!(decide(&mut windows, true, Instant::now()), Plan::Wait { until: None });
        windows[0].held = 1700;
        assert_eq!(decide(&mut windows, true, Instant::now()), Plan::Claim { count: 300, include: vec![0] });
    }

    #[test]
    fn a_slow_destination_holds_the_others_up_once_and_briefly() {
        let now = Instant::now();
        let mut windows = [busy(2000), full(64)];
        assert_eq!(decide(&mut windows, true, now), Plan::Wait { until: Some(now + PATIENCE) });
        let late = now + PATIENCE;
        let without = Plan::Claim { count: 500, include: vec![0] };
        assert_eq!(decide(&mut windows, true, late), without);
        windows[1].held = 30;
        assert_eq!(decide(&mut windows, false, late), without);
        assert_eq!(decide(&mut windows, true, late), Plan::Claim { count: 34, include: vec![0, 1] }, "at its own pace");
        windows[1].held = 64;
        assert_eq!(decide(&mut windows, true, late), without, "no second wait");
        windows[1].held = 0;
        windows[1].caught_up();
        assert_eq!(decide(&mut windows, false, late), Plan::Claim { count: 64, include: vec![0, 1] }, "caught up");
    }

    #[test]
    fn large_events_shrink_the_claims_and_one_always_goes() {
        let mut window = busy(2000);
        assert_eq!(
            plan(&mut [&mut window], 500, MIB / 4, true, Instant::now()),
            Plan::Claim { count: 4, include: vec![0] }
        );
        assert_eq!(
            plan(&mut [&mut window], 500, 100 * MIB, true, Instant::now()),
            Plan::Claim { count: 1, include: vec![0] }
        );
        assert!(window.admit(100 * MIB));
        assert!(!window.admit(1));
        window.leave(100 * MIB);
        window.end_batch();
        assert!(window.admit(1) && window.held == 1 && window.bytes == 1);
    }

    #[test]
    fn nothing_passes_what_was_refused_before_it_in_its_batch() {
        let mut window = Window { held: 3, bytes: MIB / 2, ..busy(2000) };
        assert!(!window.admit(MIB) && !window.admit(1));
        window.end_batch();
        assert!(window.admit(1));
    }

    #[test]
    fn a_destination_that_never_catches_up_lags_however_often_it_has_room() {
        let now = Instant::now();
        let mut windows = [busy(2000), full(64)];
        for step in 0..4 {
            windows[1].held = 64;
            decide(&mut windows, true, now + PATIENCE * step / 4);
            windows[1].held = 20;
            decide(&mut windows, true, now + PATIENCE * step / 4);
        }
        windows[1].held = 64;
        let without = Plan::Claim { count: 500, include: vec![0] };
        assert_eq!(decide(&mut windows, true, now + PATIENCE), without);
    }

    #[test]
    fn who_was_left_out_is_asked_for_when_there_is_room_again() {
        let now = Instant::now();
        let mut windows = [busy(2000), full(64)];
        decide(&mut windows, true, now);
        decide(&mut windows, true, now + PATIENCE);
        assert!(!windows[1].is_missed(500, 100), "still full");
        windows[1].held = 0;
        assert!(windows[1].is_missed(500, 100) && !windows[0].is_missed(500, 100));
        decide(&mut windows, true, now + PATIENCE);
        assert!(!windows[1].is_missed(500, 100), "asked for");
    }

    #[test]
    fn one_with_little_room_and_nothing_to_do_makes_no_claim_smaller() {
        let now = Instant::now();
        let mut windows = [busy(2000), Window::new(4, 2000, MIB)];
        let all = Plan::Claim { count: 500, include: vec![0, 1] };
        assert_eq!(decide(&mut windows, true, now), all);
        windows[1].brought(1, 500);
        assert_eq!(decide(&mut windows, true, now), all, "one of 500 events was for it");
        windows[1].brought(100, 200);
        assert_eq!(decide(&mut windows, true, now), Plan::Claim { count: 8, include: vec![0, 1] });
        for _ in 0..40 {
            windows[1].brought(0, 8);
        }
        assert_eq!(decide(&mut windows, true, now), all, "its share is forgotten");
    }

    #[test]
    fn more_than_was_foreseen_is_held_all_the_same() {
        let mut window = Window::new(4, 300, MIB);
        assert_eq!((0..500).filter(|_| window.admit(1)).count(), 300);
        assert!(!window.is_open(500, 100), "and nothing is asked for until it has room");
    }

    #[test]
    fn nothing_is_asked_for_before_there_is_room_for_what_was_refused() {
        let mut window = busy(2000);
        assert!(window.admit(MIB / 2) && window.admit(MIB / 8) && !window.admit(MIB / 2));
        window.end_batch();
        assert!(!window.is_open(500, 100), "small ones behind it would only be given back");
        window.leave(MIB / 2);
        assert!(window.is_open(500, 100) && window.admit(MIB / 2));
        window.end_batch();
        window.refuse(MIB * 2);
        window.end_batch();
        assert!(!window.is_open(500, 100));
        window.leave(MIB / 8);
        window.leave(MIB / 2);
        assert!(window.is_open(500, 100), "an idle destination takes any size");
    }

    #[test]
    fn nobody_to_serve_is_nothing_to_claim() {
        assert_eq!(decide(&mut [], true, Instant::now()), Plan::Wait { until: None });
    }
}

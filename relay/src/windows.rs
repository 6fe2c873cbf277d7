//! What the next claim asks for, and for whom. Pure: the caller brings the clock.
//!
//! A claim that leaves a destination out makes the database list what that destination is owed, so a lane that is merely
//! busy is waited for, for a moment. One that stays full is left behind: it gets small claims of its own pace while the
//! others go on without it, until it has caught up.
//!
//! A destination without a lane has room and is asked for with all the others: only lanes that hold something, lag, or got
//! something lately are looked at.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use crate::budget::{Room, Size};
use crate::window::Window;

/// How long the others wait for a lane that has just become full.
pub const PATIENCE: Duration = Duration::from_millis(20);

/// After such a wait nobody is waited for until this is over: any number of lanes may become full one after the other.
pub const NEXT_WAIT: Duration = Duration::from_millis(200);

/// The number of a lane.
pub type Id = u32;

#[derive(Debug, PartialEq)]
pub enum Plan {
    /// Ask for so many events, for all but these lanes.
    Claim { count: usize, without: Vec<Id> },
    /// Nothing to ask for now. Ask again when a delivery ends, or at this moment.
    Wait { until: Option<Instant> },
}

/// What a plan depends on beside the windows.
pub struct Question<'a> {
    /// Destinations to ask for, with a lane or without: all that are served and not left alone.
    pub destinations: usize,
    pub batch: usize,
    pub lagging_too: bool,
    pub room: &'a Room,
    pub now: Instant,
}

/// The windows of all lanes.
#[derive(Default)]
pub struct Windows {
    windows: HashMap<Id, Window>,
    /// Those that hold something, or were refused something.
    busy: BTreeSet<Id>,
    /// Those that were found full and have not caught up since.
    full: BTreeSet<Id>,
    /// Those that got part of the last claims.
    shared: BTreeSet<Id>,
    /// The last claim was made without these.
    left_out: BTreeSet<Id>,
    /// One that was left out may have room now.
    look: bool,
    /// When a wait last began.
    waited: Option<Instant>,
}

impl Windows {
    pub fn add(&mut self, id: Id, window: Window) {
        self.windows.insert(id, window);
    }

    pub fn remove(&mut self, id: Id) {
        self.windows.remove(&id);
        for set in [&mut self.busy, &mut self.full, &mut self.shared, &mut self.left_out] {
            set.remove(&id);
        }
    }

    pub fn get(&self, id: Id) -> Option<&Window> {
        self.windows.get(&id)
    }

    /// Nothing is known of it that would be lost with it.
    pub fn is_at_rest(&self, id: Id) -> bool {
        !self.left_out.contains(&id) && self.windows.get(&id).is_none_or(Window::is_at_rest)
    }

    pub fn set_limit(&mut self, id: Id, limit: usize) {
        if let Some(window) = self.windows.get_mut(&id) {
            window.limit = limit;
        }
        self.caught_up(id);
    }

    pub fn set_paused(&mut self, id: Id, paused: bool) {
        if let Some(window) = self.windows.get_mut(&id) {
            window.paused = paused;
            self.look = true;
        }
    }

    pub fn admit(&mut self, id: Id, size: Size, room: &Room) -> bool {
        self.busy.insert(id);
        self.windows.get_mut(&id).is_some_and(|window| window.admit(size, room))
    }

    pub fn refuse(&mut self, id: Id, size: Size) {
        if let Some(window) = self.windows.get_mut(&id) {
            self.busy.insert(id);
            window.refuse(size);
        }
    }

    /// A batch is complete, which gave something to this one or refused it.
    pub fn end_batch(&mut self, id: Id) {
        if let Some(window) = self.windows.get_mut(&id) {
            window.end_batch();
            if window.is_at_rest() {
                self.busy.remove(&id);
            }
        }
    }

    /// A delivery has ended. How many are left.
    pub fn leave(&mut self, id: Id, size: Size) -> usize {
        self.look = true;
        let Some(window) = self.windows.get_mut(&id) else { return 0 };
        window.leave(size);
        if window.is_at_rest() {
            self.busy.remove(&id);
        }
        window.held
    }

    /// A claim of so many events brought these: deliveries and bytes, by lane.
    pub fn brought(&mut self, given: &HashMap<Id, (usize, usize)>, events: usize) {
        self.shared.extend(given.keys());
        let windows = &mut self.windows;
        let left_out = &self.left_out;
        self.shared.retain(|id| {
            let Some(window) = windows.get_mut(id) else { return false };
            if !window.paused && !left_out.contains(id) {
                let (deliveries, bytes) = given.get(id).copied().unwrap_or_default();
                window.brought(deliveries, bytes, events);
            }
            window.share > 0.0
        });
    }

    /// A claim for all but those that were left out found no more.
    pub fn all_caught_up(&mut self) {
        let found: Vec<Id> = self.full.union(&self.busy).filter(|id| !self.left_out.contains(id)).copied().collect();
        found.into_iter().for_each(|id| self.caught_up(id));
    }

    /// A claim found no more for it.
    pub fn caught_up(&mut self, id: Id) {
        self.full.remove(&id);
        if let Some(window) = self.windows.get_mut(&id) {
            window.caught_up();
            if window.is_at_rest() {
                self.busy.remove(&id);
            }
        }
    }

    /// Whether one that the last claim left out has room now: there may be something for it alone.
    pub fn any_missed(&mut self, batch: usize, room: &Room) -> bool {
        if !self.look {
            return false;
        }
        let windows = &self.windows;
        self.look = self.left_out.iter().any(|id| windows.get(id).is_some_and(|w| !w.paused && w.is_open(batch, room)));
        self.look
    }

    /// Decides the next claim.
    pub fn plan(&mut self, question: &Question<'_>) -> Plan {
        let Question { destinations, batch, lagging_too, room, now } = *question;
        let windows = &mut self.windows;
        let closed = |id: &Id| windows.get(id).is_some_and(|w| !w.paused && !w.is_open(batch, room));
        let closed: BTreeSet<Id> = self.busy.iter().copied().filter(closed).collect();
        if closed.len() >= destinations || room.events == 0 || room.bytes == 0 {
            return Plan::Wait { until: None };
        }
        self.full.extend(&closed);
        if let Some(until) = self.wait_for(&closed, now) {
            return Plan::Wait { until: Some(until) };
        }
        let windows = &self.windows;
        let mut lagging: Vec<Id> =
            self.full.iter().copied().filter(|id| windows.get(id).is_some_and(|w| w.lagging && !w.paused)).collect();
        if lagging_too || lagging.len() >= destinations {
            lagging.retain(|id| closed.contains(id));
        }
        self.left_out = lagging.into_iter().collect();
        self.look = true;
        Plan::Claim { count: self.count(batch, room), without: self.left_out.iter().copied().collect() }
    }

    /// Lanes that are full from now on are waited for, those that have been for long lag behind. Until when to wait.
    fn wait_for(&mut self, closed: &BTreeSet<Id>, now: Instant) -> Option<Instant> {
        let waited = self.waited.filter(|began| now < *began + NEXT_WAIT);
        let mut until: Option<Instant> = None;
        for id in closed {
            let Some(window) = self.windows.get_mut(id).filter(|window| !window.lagging) else { continue };
            let since = *window.full_since.get_or_insert(now);
            let end = waited.map_or(since, |began| began.min(since)) + PATIENCE;
            window.lagging = end <= now;
            if !window.lagging {
                until = Some(until.map_or(end, |earliest| earliest.min(end)));
            }
        }
        if until.is_some() && waited.is_none() {
            self.waited = Some(now);
        }
        until
    }

    /// As many events as those that are asked for should bear.
    fn count(&self, batch: usize, room: &Room) -> usize {
        let asked = |id: &&Id| !self.left_out.contains(id);
        let windows = || self.shared.iter().filter(asked).filter_map(|id| self.windows.get(id)).filter(|w| !w.paused);
        let bearable = windows().map(|window| window.bearable(room)).min().unwrap_or(batch);
        let bytes: f64 = windows().map(|window| window.share * window.average as f64).sum();
        let by_bytes = (room.bytes as f64 / bytes.max(1e-6)).min(1e9) as usize;
        batch.min(room.events).min(bearable).min(by_bytes).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::{Budget, Load};

    const BUDGET: Budget = Budget { max_events: 100_000, max_bytes: 1 << 30 };

    fn busy(limit: usize) -> Window {
        let mut window = Window::new(limit, 2000);
        window.share = 1.0;
        window
    }

    fn full(limit: usize) -> Window {
        let mut window = busy(limit);
        window.held = limit;
        window
    }

    fn windows(all: Vec<Window>) -> Windows {
        let mut windows = Windows::default();
        for (id, window) in all.into_iter().enumerate() {
            windows.shared.insert(id as Id);
            windows.add(id as Id, window);
            hold(&mut windows, id as Id, None);
        }
        windows
    }

    /// Sets what one holds.
    fn hold(windows: &mut Windows, id: Id, held: Option<usize>) {
        let window = windows.windows.get_mut(&id).expect("a window");
        window.held = held.unwrap_or(window.held);
        match window.is_at_rest() {
            true => windows.busy.remove(&id),
            false => windows.busy.insert(id),
        };
        windows.look = true;
    }

    fn room(windows: &Windows) -> Room {
        BUDGET.room(Load { events: windows.windows.values().map(|w| w.held).sum(), ..Load::default() })
    }

    fn decide(windows: &mut Windows, lagging_too: bool, now: Instant) -> Plan {
        let (room, destinations) = (room(windows), windows.windows.len());
        windows.plan(&Question { destinations, batch: 500, lagging_too, room: &room, now })
    }

    fn is_missed(windows: &mut Windows) -> bool {
        let room = room(windows);
        windows.any_missed(500, &room)
    }

    fn claim(count: usize, without: &[Id]) -> Plan {
        Plan::Claim { count, without: without.to_vec() }
    }

    #[test]
    fn a_lone_full_destination_is_waited_for_without_a_timer() {
        let mut windows = windows(vec![full(2000)]);
        assert_eq!(decide(&mut windows, true, Instant::now()), Plan::Wait { until: None });
        hold(&mut windows, 0, Some(1700));
        assert_eq!(decide(&mut windows, true, Instant::now()), claim(300, &[]));
    }

    #[test]
    fn a_slow_destination_holds_the_others_up_once_and_briefly() {
        let now = Instant::now();
        let mut windows = windows(vec![busy(2000), full(64)]);
        assert_eq!(decide(&mut windows, true, now), Plan::Wait { until: Some(now + PATIENCE) });
        let late = now + PATIENCE;
        assert_eq!(decide(&mut windows, true, late), claim(500, &[1]));
        hold(&mut windows, 1, Some(30));
        assert_eq!(decide(&mut windows, false, late), claim(500, &[1]));
        assert_eq!(decide(&mut windows, true, late), claim(34, &[]), "at its own pace");
        hold(&mut windows, 1, Some(64));
        assert_eq!(decide(&mut windows, true, late), claim(500, &[1]), "no second wait");
        hold(&mut windows, 1, Some(0));
        windows.caught_up(1);
        assert_eq!(decide(&mut windows, false, late), claim(64, &[]), "caught up");
    }

    #[test]
    fn many_that_become_full_one_after_the_other_hold_nobody_up_for_longer() {
        let now = Instant::now();
        let mut windows = windows((0..50).map(|n| if n == 0 { busy(2000) } else { Window::new(4, 4) }).collect());
        let mut waited = Duration::ZERO;
        for step in 1..50 {
            let now = now + PATIENCE * step;
            hold(&mut windows, step, Some(4));
            if let Plan::Wait { until: Some(until) } = decide(&mut windows, true, now) {
                waited += until - now;
            }
        }
        assert!(waited <= PATIENCE * 5, "{waited:?} in a second");
    }

    #[test]
    fn a_destination_that_never_catches_up_lags_however_often_it_has_room() {
        let now = Instant::now();
        let mut windows = windows(vec![busy(2000), full(64)]);
        for step in 0..4 {
            hold(&mut windows, 1, Some(64));
            decide(&mut windows, true, now + PATIENCE * step / 4);
            hold(&mut windows, 1, Some(20));
            decide(&mut windows, true, now + PATIENCE * step / 4);
        }
        hold(&mut windows, 1, Some(64));
        assert_eq!(decide(&mut windows, true, now + PATIENCE), claim(500, &[1]));
    }

    #[test]
    fn who_was_left_out_is_asked_for_when_there_is_room_again() {
        let now = Instant::now();
        let mut windows = windows(vec![busy(2000), full(64)]);
        decide(&mut windows, true, now);
        decide(&mut windows, true, now + PATIENCE);
        assert!(!is_missed(&mut windows), "still full");
        hold(&mut windows, 1, Some(0));
        assert!(is_missed(&mut windows) && !windows.is_at_rest(1));
        decide(&mut windows, true, now + PATIENCE);
        assert!(!is_missed(&mut windows), "asked for");
    }

    #[test]
    fn one_with_little_room_and_nothing_to_do_makes_no_claim_smaller() {
        let now = Instant::now();
        let mut windows = windows(vec![busy(2000), Window::new(4, 2000)]);
        let given = |zero, one| HashMap::from([(0, (zero, zero * 100)), (1, (one, one * 100))]);
        assert_eq!(decide(&mut windows, true, now), claim(500, &[]));
        windows.brought(&given(500, 1), 500);
        assert_eq!(decide(&mut windows, true, now), claim(500, &[]), "one of 500 events was for it");
        windows.brought(&given(200, 100), 200);
        assert_eq!(decide(&mut windows, true, now), claim(8, &[]));
        for _ in 0..40 {
            windows.brought(&HashMap::from([(0, (8, 800))]), 8);
        }
        assert_eq!(decide(&mut windows, true, now), claim(500, &[]), "its share is forgotten");
        assert!(!windows.shared.contains(&1));
    }

    #[test]
    fn a_large_event_of_one_makes_the_claims_of_others_no_smaller() {
        let now = Instant::now();
        let mut windows = windows(vec![busy(2000), busy(40)]);
        let mib = 1 << 20;
        windows.brought(&HashMap::from([(0, (100, 100_000)), (1, (100, 100 * mib))]), 200);
        let Plan::Claim { count, .. } = decide(&mut windows, true, now) else { panic!("no claim") };
        assert!(count < 100, "{count} while both are asked for");
        hold(&mut windows, 1, Some(40));
        decide(&mut windows, true, now);
        assert_eq!(decide(&mut windows, true, now + PATIENCE), claim(500, &[1]));
    }

    #[test]
    fn who_is_left_alone_is_neither_waited_for_nor_counted() {
        let now = Instant::now();
        let mut windows = windows(vec![busy(2000), full(64)]);
        windows.set_paused(1, true);
        assert_eq!(decide(&mut windows, true, now), claim(500, &[]));
    }

    #[test]
    fn nobody_to_serve_is_nothing_to_claim() {
        assert_eq!(decide(&mut windows(vec![]), true, Instant::now()), Plan::Wait { until: None });
    }

    #[test]
    fn a_destination_without_a_lane_is_asked_for() {
        let (mut windows, now) = (windows(vec![full(2)]), Instant::now());
        let room = room(&windows);
        let mut plan =
            |now| windows.plan(&Question { destinations: 2, batch: 500, lagging_too: true, room: &room, now });
        assert_eq!(plan(now), Plan::Wait { until: Some(now + PATIENCE) });
        assert_eq!(plan(now + PATIENCE), claim(500, &[0]));
    }
}

//! The destinations that are left alone, in the order in which they are to be tried again. Pure: the caller brings the
//! clock. Thousands of them cost those that deliver nothing: only what is due is looked at.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::pause::Pause;

/// `T`: what ends with the pause.
pub struct Pauses<T> {
    all: HashMap<Arc<str>, Paused<T>>,
    /// Those to which something may be owed.
    due: BTreeSet<(Instant, Arc<str>)>,
    /// Those that were tried and had nothing.
    resting: BTreeSet<Arc<str>>,
    /// How often something has come.
    came: u64,
}

struct Paused<T> {
    pause: Pause,
    with: T,
    /// A try is under way; so often had something come when it began.
    trying: Option<u64>,
    /// Its place in `due`.
    at: Option<Instant>,
}

impl<T: Default> Paused<T> {
    fn new(now: Instant) -> Self {
        Paused { pause: Pause::new(now), with: T::default(), trying: None, at: None }
    }
}

impl<T> Default for Pauses<T> {
    fn default() -> Self {
        Pauses { all: HashMap::new(), due: BTreeSet::new(), resting: BTreeSet::new(), came: 0 }
    }
}

impl<T: Default> Pauses<T> {
    pub fn len(&self) -> usize {
        self.all.len()
    }

    pub fn names(&self) -> impl Iterator<Item = &Arc<str>> {
        self.all.keys()
    }

    pub fn contains(&self, name: &str) -> bool {
        self.all.contains_key(name)
    }

    pub fn get(&self, name: &str) -> Option<&T> {
        self.all.get(name).map(|paused| &paused.with)
    }

    /// Leaves it alone from now on, unless it is already; it may be tried once at once.
    pub fn begin(&mut self, name: &Arc<str>, now: Instant) -> &mut T {
        if !self.all.contains_key(name) {
            self.all.insert(name.clone(), Paused::new(now));
            self.place(name);
        }
        &mut self.all.entry(name.clone()).or_insert_with(|| Paused::new(now)).with
    }

    /// Whether it was left alone.
    pub fn end(&mut self, name: &str) -> bool {
        let Some((name, paused)) = self.all.remove_entry(name) else { return false };
        if let Some(at) = paused.at {
            self.due.remove(&(at, name.clone()));
        }
        self.resting.remove(&name);
        true
    }

    /// It failed, again or for the first time. Whether that is news to an operator.
    pub fn failed(&mut self, name: &Arc<str>, now: Instant, at_least: Duration, what: &str) -> bool {
        self.begin(name, now);
        let news = self.all.get_mut(name).is_some_and(|paused| {
            paused.trying = None;
            paused.pause.failed(now, at_least, what)
        });
        self.place(name);
        news
    }

    /// Something may have come for any of them.
    pub fn something_came(&mut self) {
        self.came += 1;
        for name in std::mem::take(&mut self.resting) {
            if let Some(paused) = self.all.get_mut(&name) {
                paused.pause.something_is_owed();
            }
            self.place(&name);
        }
    }

    /// When the next is to be tried.
    pub fn next(&self) -> Option<Instant> {
        self.due.first().map(|(at, _)| *at)
    }

    /// The next few that are to be tried now. They are not due again before it is said what came of it.
    pub fn take_due(&mut self, now: Instant, most: usize) -> Vec<Arc<str>> {
        let due: Vec<Arc<str>> =
            self.due.iter().take_while(|(at, _)| *at <= now).take(most).map(|(_, name)| name.clone()).collect();
        for name in &due {
            if let Some(paused) = self.all.get_mut(name) {
                paused.trying = Some(self.came);
                paused.pause.tried(now);
            }
            self.place(name);
        }
        due
    }

    /// The try is over and said nothing of the destination. With `found_none` nothing was owed to it.
    pub fn tried(&mut self, name: &Arc<str>, found_none: bool) {
        let Some(paused) = self.all.get_mut(name) else { return };
        let Some(came) = paused.trying.take() else { return };
        if !found_none || came != self.came {
            paused.pause.something_is_owed();
        }
        self.place(name);
    }

    /// Puts it where its pause says it belongs.
    fn place(&mut self, name: &Arc<str>) {
        let Some(paused) = self.all.get_mut(name) else { return };
        if let Some(at) = paused.at.take() {
            self.due.remove(&(at, name.clone()));
        }
        self.resting.remove(name);
        match paused.pause.due() {
            _ if paused.trying.is_some() => {}
            Some(at) => {
                paused.at = Some(at);
                self.due.insert((at, name.clone()));
            }
            None => {
                self.resting.insert(name.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn pauses(names: &[&str]) -> (Pauses<()>, Vec<Arc<str>>, Instant) {
        let (mut pauses, now) = (Pauses::default(), Instant::now());
        let names: Vec<Arc<str>> = names.iter().map(|name| Arc::from(*name)).collect();
        names.iter().for_each(|name| *pauses.begin(name, now) = ());
        (pauses, names, now)
    }

    #[test]
    fn each_is_tried_once_at_once_and_then_when_something_came() {
        let (mut pauses, names, now) = pauses(&["a", "b", "c"]);
        assert_eq!(pauses.take_due(now, 2).len(), 2);
        assert_eq!(pauses.take_due(now, 2), [names[2].clone()]);
        assert!(pauses.take_due(now + HOUR, 2).is_empty() && pauses.next().is_none(), "all are being tried");
        names.iter().for_each(|name| pauses.tried(name, true));
        assert_eq!(pauses.next(), None, "nothing is owed to any");
        pauses.something_came();
        assert!(pauses.next().is_some_and(|at| at > now));
        assert_eq!(pauses.take_due(now + HOUR, 9).len(), 3);
    }

    #[test]
    fn what_comes_while_a_try_is_under_way_is_not_forgotten() {
        let (mut pauses, names, now) = pauses(&["a", "b"]);
        pauses.take_due(now, 9);
        pauses.tried(&names[1], false);
        assert_eq!(pauses.take_due(now + HOUR, 9), [names[1].clone()], "it got none because others did");
        pauses.something_came();
        pauses.tried(&names[0], true);
        assert_eq!(pauses.take_due(now + HOUR, 9), [names[0].clone()]);
    }

    #[test]
    fn the_one_that_may_be_tried_first_is_first_whatever_its_name() {
        let (mut pauses, names, now) = pauses(&["a", "z"]);
        pauses.failed(&names[0], now, HOUR, "503");
        pauses.failed(&names[1], now, Duration::from_secs(60), "503");
        assert_eq!(pauses.take_due(now + Duration::from_secs(90), 9), [names[1].clone()]);
        assert!(pauses.end("z") && !pauses.end("z") && !pauses.contains("z") && pauses.len() == 1);
        assert!(pauses.next().is_some_and(|at| at >= now + HOUR));
        pauses.end("a");
        assert!(pauses.next().is_none() && pauses.due.is_empty() && pauses.resting.is_empty());
    }
}

//! Which connections may be kept after their answers. A pool of connections bounds what it keeps for each host alone; this
//! bounds what it keeps for all of them. A request that may not leave its connection behind says so to the receiver.
//!
//! A kept connection counts until the pool must have dropped it, whether its receiver closes it earlier or not.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Connections kept for all hosts.
pub const MOST: usize = 256;

/// Connections kept for one host.
pub const MOST_OF_HOST: usize = 128;

/// How long an unused connection is kept.
pub const IDLE: Duration = Duration::from_secs(30);

/// The pool looks for unused connections as often as it keeps them.
const GONE: Duration = IDLE.saturating_mul(2);

/// Scheme, name and port.
pub type Host = Arc<str>;

#[derive(Default)]
pub struct Keep(Mutex<Kept>);

/// Of a request under way: its connection may be kept when it is done.
pub struct Permit {
    keep: Arc<Keep>,
    host: Host,
}

impl Keep {
    /// Whether a request to this host may leave its connection behind.
    pub fn permit(self: &Arc<Self>, host: &Host) -> Option<Permit> {
        let allowed = self.kept().begin(host, Instant::now());
        allowed.then(|| Permit { keep: self.clone(), host: host.clone() })
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Permit {
    /// The answer was read to its end: the connection is kept.
    pub fn keep(self) {
        self.keep.kept().add(&self.host, Instant::now());
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.keep.kept().under_way -= 1;
    }
}

#[derive(Default)]
struct Kept {
    /// Requests that may leave their connections behind.
    under_way: usize,
    by_host: HashMap<Host, BTreeSet<(Instant, u64)>>,
    by_age: BTreeSet<(Instant, u64, Host)>,
    next: u64,
}

impl Kept {
    fn begin(&mut self, host: &Host, now: Instant) -> bool {
        while let Some((at, n, host)) = self.by_age.first().cloned().filter(|(at, ..)| *at + GONE <= now) {
            self.remove(&host, (at, n));
        }
        // The pool hands out the one that was used last.
        if let Some(last) = self.by_host.get(host).and_then(|kept| kept.last().copied()) {
            self.remove(host, last);
        } else if self.by_age.len() + self.under_way >= MOST {
            return false;
        }
        self.under_way += 1;
        true
    }

    fn add(&mut self, host: &Host, now: Instant) {
        let entry = (now, self.next);
        self.next += 1;
        let of_host = self.by_host.entry(host.clone()).or_default();
        if of_host.len() < MOST_OF_HOST {
            of_host.insert(entry);
            self.by_age.insert((entry.0, entry.1, host.clone()));
        }
    }

    fn remove(&mut self, host: &Host, entry: (Instant, u64)) {
        self.by_age.remove(&(entry.0, entry.1, host.clone()));
        if let Some(of_host) = self.by_host.get_mut(host) {
            of_host.remove(&entry);
            if of_host.is_empty() {
                self.by_host.remove(host);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(n: usize) -> Host {
        format!("http://host{n}:80").into()
    }

    fn end(kept: &mut Kept, host: &Host, now: Instant) {
        kept.under_way -= 1;
        kept.add(host, now);
    }

    #[test]
    fn the_connections_of_all_hosts_together_are_bounded() {
        let (mut kept, now) = (Kept::default(), Instant::now());
        let allowed = (0..3000).filter(|n| kept.begin(&host(*n), now)).collect::<Vec<_>>();
        assert_eq!(allowed.len(), MOST, "while they are under way");
        allowed.iter().for_each(|n| end(&mut kept, &host(*n), now));
        assert!(!kept.begin(&host(5000), now), "and when they are kept");
        assert!(kept.begin(&host(0), now) && !kept.begin(&host(0), now), "one is used again");
        assert!(kept.begin(&host(5000), now + GONE), "and after a while the others are gone");
        assert_eq!((kept.by_age.len(), kept.by_host.len(), kept.under_way), (0, 0, 2));
    }

    #[test]
    fn those_of_one_host_are_bounded_too() {
        let (mut kept, now) = (Kept::default(), Instant::now());
        (0..MOST).for_each(|_| assert!(kept.begin(&host(1), now)));
        (0..MOST).for_each(|_| end(&mut kept, &host(1), now));
        assert_eq!(kept.by_age.len(), MOST_OF_HOST);
    }

    #[test]
    fn what_is_not_kept_makes_room_for_others() {
        let keep = Arc::new(Keep::default());
        let mut permits: Vec<_> = (0..MOST).filter_map(|n| keep.permit(&host(n))).collect();
        assert!(permits.len() == MOST && keep.permit(&host(5000)).is_none());
        permits.pop();
        let kept = keep.permit(&host(5000)).expect("there is room");
        kept.keep();
        assert!(keep.permit(&host(5001)).is_none());
    }
}

//! The deliveries that one destination has been given and not begun. Pure: no clock, no socket.
//!
//! Holds true: of one aggregate at most one delivery is under way, and they begin in the order they were pushed, which is
//! the order of `id`. Deliveries without an aggregate wait for nothing.

use std::collections::{HashMap, VecDeque};

/// Deliveries of one key go one by one; `None` waits for nothing. The hash of an event's aggregate.
pub type OrderingKey = Option<u64>;

pub struct Queue<T> {
    ready: VecDeque<(OrderingKey, T)>,
    /// One entry for each key with a delivery that is ready or under way: those behind it.
    behind: HashMap<u64, VecDeque<T>>,
    len: usize,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Queue { ready: VecDeque::new(), behind: HashMap::new(), len: 0 }
    }
}

impl<T> Queue<T> {
    pub fn push(&mut self, ordering_key: OrderingKey, item: T) {
        self.len += 1;
        if let Some(key) = ordering_key {
            if let Some(waiting) = self.behind.get_mut(&key) {
                waiting.push_back(item);
                return;
            }
            self.behind.insert(key, VecDeque::new());
        }
        self.ready.push_back((ordering_key, item));
    }

    /// The next delivery that may begin; its key is taken until `leave` or `abandon`.
    pub fn pop(&mut self) -> Option<(OrderingKey, T)> {
        let next = self.ready.pop_front()?;
        self.len -= 1;
        Some(next)
    }

    /// Nothing may begin now.
    pub fn is_empty(&self) -> bool {
        self.ready.is_empty()
    }

    /// The delivery under way of this key has ended: the next one may begin.
    pub fn leave(&mut self, ordering_key: OrderingKey) {
        let Some(key) = ordering_key else { return };
        match self.behind.get_mut(&key).and_then(VecDeque::pop_front) {
            Some(item) => self.ready.push_back((ordering_key, item)),
            None => {
                self.behind.remove(&key);
            }
        }
    }

    /// The delivery under way of this key ended without success: gives up those behind it.
    pub fn abandon(&mut self, ordering_key: OrderingKey) -> VecDeque<T> {
        let dropped = ordering_key.and_then(|key| self.behind.remove(&key)).unwrap_or_default();
        self.len -= dropped.len();
        dropped
    }

    /// Gives up all that has not begun. Keys with a delivery under way stay taken.
    pub fn drain(&mut self) -> Vec<T> {
        let mut dropped = Vec::with_capacity(self.len);
        for (ordering_key, item) in self.ready.drain(..) {
            dropped.push(item);
            if let Some(waiting) = ordering_key.and_then(|key| self.behind.remove(&key)) {
                dropped.extend(waiting);
            }
        }
        for waiting in self.behind.values_mut() {
            dropped.extend(waiting.drain(..));
        }
        self.len = 0;
        dropped
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(items: &[(OrderingKey, i64)]) -> Queue<i64> {
        let mut queue = Queue::default();
        for (ordering_key, item) in items {
            queue.push(*ordering_key, *item);
        }
        queue
    }

    #[test]
    fn one_aggregate_goes_one_by_one_in_order_while_others_pass() {
        let mut queue = queue(&[(Some(1), 1), (Some(1), 2), (Some(2), 3), (None, 4), (Some(1), 5)]);
        assert_eq!(queue.pop(), Some((Some(1), 1)));
        assert_eq!(queue.pop(), Some((Some(2), 3)));
        assert_eq!(queue.pop(), Some((None, 4)));
        assert_eq!(queue.pop(), None);
        queue.leave(Some(1));
        assert_eq!(queue.pop(), Some((Some(1), 2)));
        assert_eq!(queue.pop(), None);
        queue.leave(Some(1));
        assert_eq!(queue.pop(), Some((Some(1), 5)));
        queue.leave(Some(1));
        assert!(queue.behind.len() == 1 && queue.len == 0);
    }

    #[test]
    fn without_an_aggregate_all_go_at_once() {
        let mut queue = queue(&[(None, 1), (None, 2)]);
        assert!(queue.pop().is_some() && queue.pop().is_some());
    }

    #[test]
    fn a_failure_gives_up_the_later_ones_of_its_aggregate_alone() {
        let mut queue = queue(&[(Some(1), 1), (Some(1), 2), (Some(1), 3), (Some(2), 4), (Some(2), 5)]);
        queue.pop();
        assert_eq!(queue.abandon(Some(1)), [2, 3]);
        assert_eq!(queue.pop(), Some((Some(2), 4)));
        queue.push(Some(1), 2);
        assert_eq!(queue.pop(), Some((Some(1), 2)));
        assert!(queue.abandon(None).is_empty());
        assert_eq!(queue.len, 1);
    }

    #[test]
    fn draining_keeps_the_keys_under_way_taken() {
        let mut queue = queue(&[(Some(1), 1), (Some(1), 2), (Some(2), 3), (Some(2), 4), (None, 5)]);
        queue.pop();
        let mut dropped = queue.drain();
        dropped.sort_unstable();
        assert_eq!(dropped, [2, 3, 4, 5]);
        queue.push(Some(1), 6);
        assert_eq!(queue.pop(), None, "1 is still under way");
        queue.leave(Some(1));
        assert_eq!(queue.pop(), Some((Some(1), 6)));
    }
}

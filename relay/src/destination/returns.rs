//! Which messages of a channel the broker returned as unroutable. Pure, but for the waiting.
//!
//! RabbitMQ returns a message before it confirms it. The client library hands a return over with a confirm
//! (<https://github.com/amqp-rs/lapin/issues/252>), but gives the oldest return that it has to whichever confirm it resolves
//! next, so under load a confirm can carry somebody else's return. Here a return goes by its
//! `message_id`, and three things hold:
//!
//! - a confirm that carries no return says that no return was left: what was returned until then is in confirms that were
//!   resolved before. Tasks may see them in another order, so that it is entered after those that are ready by then;
//! - a confirm that carries another's return says nothing of its own message, whose return may be the next in line. That
//!   of a message published later, without a return, says that there was none;
//! - when each message under way has its confirm, no return is left either.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use uuid::Uuid;

#[derive(Default)]
pub struct Returns {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Default)]
struct State {
    /// Of each message under way: how often, and why it was returned, once that is known.
    under_way: HashMap<Uuid, (usize, Option<String>)>,
    publishes: usize,
    /// Confirms that wait for others to tell them what became of their message.
    waiting: usize,
    /// How many messages were published so far.
    last: u64,
    /// The latest of them whose confirm carried no return.
    clean: u64,
}

/// A message under way, until this is dropped.
pub struct Published<'a> {
    returns: &'a Returns,
    id: Uuid,
    number: u64,
}

impl Returns {
    /// To be called before the message is published.
    pub fn published(&self, id: Uuid) -> Published<'_> {
        let mut state = self.lock();
        state.publishes += 1;
        state.last += 1;
        state.under_way.entry(id).or_default().0 += 1;
        Published { returns: self, id, number: state.last }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// What is known of a message whose confirm came when `last` messages had been published.
    fn verdict(&self, id: Uuid, last: u64) -> Option<Option<String>> {
        match self.under_way.get(&id) {
            Some((_, Some(why))) => Some(Some(why.clone())),
            _ => (self.clean > last || self.publishes == self.waiting).then_some(None),
        }
    }
}

impl Published<'_> {
    /// The confirm came, with this return: its message and why. Why the own message was returned; none: it was not.
    pub async fn confirmed(self, carried: Option<(Uuid, String)>) -> Option<String> {
        let clean = carried.is_none();
        if clean {
            // Confirms that were resolved before this one are ahead in the lane's queue: they are entered first.
            tokio::task::yield_now().await;
        }
        let last = self.enter(carried);
        if clean { self.returns.lock().verdict(self.id, last).flatten() } else { self.others_tell(last).await }
    }

    /// How many messages have been published before.
    fn enter(&self, carried: Option<(Uuid, String)>) -> u64 {
        let mut state = self.returns.lock();
        let last = state.last;
        match carried {
            None => state.clean = state.clean.max(self.number),
            Some((id, why)) => {
                if let Some(owner) = state.under_way.get_mut(&id) {
                    owner.1 = Some(why);
                }
            }
        }
        let tell = state.waiting > 0;
        drop(state);
        if tell {
            self.returns.changed.notify_waiters();
        }
        last
    }

    async fn others_tell(self, last: u64) -> Option<String> {
        self.returns.lock().waiting += 1;
        let _waiting = Waiting(self.returns);
        self.returns.changed.notify_waiters();
        loop {
            let mut changed = std::pin::pin!(self.returns.changed.notified());
            changed.as_mut().enable();
            if let Some(verdict) = self.returns.lock().verdict(self.id, last) {
                return verdict;
            }
            changed.await;
        }
    }
}

impl Drop for Published<'_> {
    fn drop(&mut self) {
        let mut state = self.returns.lock();
        state.publishes -= 1;
        if let Some(own) = state.under_way.get_mut(&self.id) {
            own.0 -= 1;
            if own.0 == 0 {
                state.under_way.remove(&self.id);
            }
        }
        let waiting = state.waiting > 0;
        drop(state);
        if waiting {
            self.returns.changed.notify_waiters();
        }
    }
}

/// Counts one that waits, also when it is given up.
struct Waiting<'a>(&'a Returns);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.lock().waiting -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    fn id(n: u128) -> Uuid {
        Uuid::from_u128(n)
    }

    fn why(n: u128) -> Option<(Uuid, String)> {
        Some((id(n), format!("return {n}")))
    }

    #[test]
    fn a_confirm_with_its_own_return_or_none_tells_what_became_of_it() {
        let returns = Returns::default();
        let (one, two) = (returns.published(id(1)), returns.published(id(2)));
        assert_eq!(one.confirmed(why(1)).now_or_never(), Some(Some("return 1".into())));
        let mut two = Box::pin(two.confirmed(None));
        assert_eq!(two.as_mut().now_or_never(), None, "others may be ready");
        assert_eq!(two.as_mut().now_or_never(), Some(None));
        drop(two);
        assert!(returns.lock().under_way.is_empty() && returns.lock().publishes == 0);
    }

    #[test]
    fn a_return_that_an_earlier_confirm_carried_is_known_though_it_is_seen_later() {
        let returns = Returns::default();
        let (one, two) = (returns.published(id(1)), returns.published(id(2)));
        let mut one = Box::pin(one.confirmed(None));
        assert_eq!(one.as_mut().now_or_never(), None);
        let mut two = Box::pin(two.confirmed(why(1)));
        assert_eq!(two.as_mut().now_or_never(), None);
        assert_eq!(one.as_mut().now_or_never(), Some(Some("return 1".into())));
        drop(one);
        assert_eq!(two.as_mut().now_or_never(), Some(None));
    }

    #[test]
    fn a_return_that_another_confirm_carried_is_not_taken_for_success() {
        let returns = Returns::default();
        let (one, two, three) = (returns.published(id(1)), returns.published(id(2)), returns.published(id(3)));
        let mut one = Box::pin(one.confirmed(why(2)));
        assert_eq!(one.as_mut().now_or_never(), None, "its own return may be the next in line");
        let mut two = Box::pin(two.confirmed(None));
        assert_eq!(two.as_mut().now_or_never(), None);
        assert_eq!(two.as_mut().now_or_never(), Some(Some("return 2".into())));
        drop(two);
        assert_eq!(one.as_mut().now_or_never(), None, "that confirm may have come before");
        let mut four = Box::pin(returns.published(id(4)).confirmed(None));
        assert_eq!((four.as_mut().now_or_never(), four.as_mut().now_or_never()), (None, Some(None)));
        assert_eq!(one.as_mut().now_or_never(), Some(None), "a later one without a return came after it");
        drop(three);
    }

    #[test]
    fn returns_that_are_exchanged_reach_their_owners() {
        let returns = Returns::default();
        let (one, two) = (returns.published(id(1)), returns.published(id(2)));
        let mut two = Box::pin(two.confirmed(why(1)));
        assert_eq!(two.as_mut().now_or_never(), None);
        let mut one = Box::pin(one.confirmed(why(2)));
        assert_eq!(one.as_mut().now_or_never(), Some(Some("return 1".into())));
        assert_eq!(two.as_mut().now_or_never(), Some(Some("return 2".into())));
    }

    #[test]
    fn when_every_confirm_is_there_no_return_is_left() {
        let returns = Returns::default();
        let (one, two) = (returns.published(id(1)), returns.published(id(2)));
        let mut one = Box::pin(one.confirmed(why(2)));
        assert_eq!(one.as_mut().now_or_never(), None);
        let gone = returns.published(id(2));
        drop(two);
        assert_eq!(one.as_mut().now_or_never(), None);
        drop(gone);
        assert_eq!(one.as_mut().now_or_never(), Some(None));
    }
}

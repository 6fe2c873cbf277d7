//! One destination at work: a task that keeps its queue, has a limited number of deliveries under way, and reports each
//! one's end. No lane waits for another.

use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::backoff::Backoff;
use crate::destination::{Destination, Event, Outcome};
use crate::ledger::{Ended, Key};
use crate::metrics::LaneMetrics;
use crate::queue::{Line, Queue};
use crate::trace;

/// One delivery to make.
pub struct Item {
    pub key: Key,
    pub line: Line,
    pub size: usize,
    /// At this destination, from 1 on.
    pub attempt: u32,
    pub event: Arc<Event>,
}

/// How one delivery ended.
pub struct Done {
    pub lane: u32,
    pub destination: Arc<str>,
    pub key: Key,
    pub size: usize,
    pub ended: Ended,
}

/// A destination, or why there can be none as it is configured: its first event disables it, which the operator sees in
/// `outbox.destinations`.
pub type Target = Arc<Result<Destination, String>>;

/// How a lane is to behave; changes while it runs.
#[derive(Clone)]
pub struct Settings {
    pub target: Target,
    pub concurrency: usize,
    /// A dead letter holds up the later events of its aggregate.
    pub blocks: bool,
}

pub enum Order {
    Deliver(Vec<Item>),
    Change(Settings),
    /// Begin nothing more; what has not begun goes back.
    Halt,
}

/// Starts the lane's task. It ends when the sender is dropped, and what is under way is dropped with it.
pub fn start(
    id: u32,
    name: Arc<str>,
    settings: Settings,
    metrics: LaneMetrics,
    done: UnboundedSender<Done>,
) -> UnboundedSender<Order> {
    let (orders, inbox) = unbounded_channel();
    let lane = Lane { id, name, settings, metrics, done, queue: Queue::default(), epoch: 0, halted: false };
    tokio::spawn(lane.run(inbox));
    orders
}

struct Lane {
    id: u32,
    name: Arc<str>,
    settings: Settings,
    metrics: LaneMetrics,
    done: UnboundedSender<Done>,
    queue: Queue<Item>,
    /// Rises when the destination is found to be down.
    epoch: u64,
    halted: bool,
}

impl Lane {
    async fn run(mut self, mut inbox: UnboundedReceiver<Order>) {
        let mut under_way = FuturesUnordered::new();
        let mut preparing = self.prepare();
        loop {
            while under_way.len() < self.settings.concurrency
                && let Some((line, item)) = self.queue.pop()
            {
                self.metrics.in_flight.inc();
                let target = self.settings.target.clone();
                under_way.push(attempt(target, self.name.clone(), self.epoch, line, item));
            }
            tokio::select! {
                biased;
                Some((epoch, line, item, outcome)) = under_way.next(), if !under_way.is_empty() => {
                    self.metrics.in_flight.dec();
                    self.ended(epoch, line, item, outcome);
                }
                order = inbox.recv() => match order {
                    Some(order) => {
                        let changed = matches!(order, Order::Change(_));
                        self.obey(order);
                        if changed {
                            preparing = self.prepare();
                        }
                    }
                    None => break,
                },
                () = &mut preparing => preparing = std::future::pending().boxed(),
            }
        }
        self.metrics.in_flight.sub(i64::try_from(under_way.len()).unwrap_or(0));
    }

    /// Ends when the destination is ready for its first event; what does not come up is tried again.
    fn prepare(&self) -> BoxFuture<'static, ()> {
        let (target, name) = (self.settings.target.clone(), self.name.clone());
        async move {
            let Ok(destination) = &*target else { return };
            let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30));
            while let Err(error) = destination.prepare().await {
                tracing::debug!(destination = &*name, error, "not ready");
                match &mut backoff {
                    Some(backoff) => tokio::time::sleep(backoff.next()).await,
                    None => return,
                }
            }
        }
        .boxed()
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Deliver(items) if self.halted => {
                items.into_iter().for_each(|item| self.report(&item, Ended::Released));
            }
            Order::Deliver(items) => {
                items.into_iter().for_each(|item| self.queue.push(item.line, item));
            }
            Order::Change(settings) => self.settings = settings,
            Order::Halt => {
                self.halted = true;
                self.release_queue();
            }
        }
    }

    fn ended(&mut self, epoch: u64, line: Line, item: Item, outcome: Outcome) {
        self.metrics.count(&outcome);
        let delivered = outcome == Outcome::Delivered;
        let goes_on = delivered || (matches!(outcome, Outcome::Rejected { .. }) && !self.settings.blocks);
        let down = matches!(outcome, Outcome::Unavailable { .. } | Outcome::Gone { .. });
        let step = if delivered { "confirmed" } else { "failed" };
        trace::step(step, &item.event.event_id, Some(&self.name));
        if let Some(error) = error_of(&outcome) {
            tracing::debug!(destination = &*self.name, event_id = %item.event.event_id, error, "not delivered");
        }
        // What was under way when the destination went down says nothing new about it.
        let late = epoch < self.epoch && matches!(outcome, Outcome::Unavailable { .. });
        self.report(&item, if late { Ended::Released } else { Ended::With(outcome) });
        if goes_on {
            self.queue.leave(line);
        } else {
            let dropped: VecDeque<Item> = self.queue.abandon(line);
            dropped.iter().for_each(|item| self.report(item, Ended::Released));
        }
        if down && !late {
            self.epoch += 1;
            self.release_queue();
        }
    }

    fn release_queue(&mut self) {
        let dropped = self.queue.drain();
        dropped.iter().for_each(|item| self.report(item, Ended::Released));
    }

    fn report(&self, item: &Item, ended: Ended) {
        let done = Done { lane: self.id, destination: self.name.clone(), key: item.key, size: item.size, ended };
        // The receiver is gone only when the session has ended, and its claims with it.
        let _ = self.done.send(done);
    }
}

async fn attempt(target: Target, name: Arc<str>, epoch: u64, line: Line, item: Item) -> (u64, Line, Item, Outcome) {
    trace::step("sent", &item.event.event_id, Some(&name));
    let outcome = match &*target {
        // A fault of the relay's own costs this event an attempt, and the lane goes on.
        Ok(destination) => AssertUnwindSafe(destination.deliver(&item.event, item.attempt))
            .catch_unwind()
            .await
            .unwrap_or_else(|_| Outcome::Failed { error: "the relay failed, see its log".into(), retry_in: None }),
        Err(error) => Outcome::Gone { error: error.clone() },
    };
    (epoch, line, item, outcome)
}

fn error_of(outcome: &Outcome) -> Option<&str> {
    match outcome {
        Outcome::Delivered => None,
        Outcome::Failed { error, .. }
        | Outcome::Rejected { error }
        | Outcome::Unavailable { error, .. }
        | Outcome::Gone { error } => Some(error),
    }
}

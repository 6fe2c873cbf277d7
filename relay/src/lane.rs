//! One destination at work: a task that keeps its queue, has a limited number of deliveries under way, and reports each
//! one's end. No lane waits for another, and a lane that fails gives back what it held and starts again. A destination has
//! a lane from its first delivery until a while after its last.

use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use prometheus::Histogram;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::backoff::Backoff;
use crate::budget::Size;
use crate::destination::{Attempted, Destination, Event, Outcome};
use crate::lease::Lease;
use crate::ledger::{Ended, Key};
use crate::metrics::LaneMetrics;
use crate::pace::Pace;
use crate::queue::{OrderingKey, Queue};
use crate::spans::{self, Span};
use crate::timer::sleep_until;
use crate::{trace, ui};

/// One delivery to make. It reports its end by being dropped at the latest, so that none can be forgotten.
pub struct Item {
    pub ordering_key: OrderingKey,
    /// At this destination, from 1 on.
    pub attempt: u32,
    pub event: Arc<Event>,
    pub lease: Arc<Lease>,
    pub report: Report,
}

/// To whom a delivery's end is told.
pub struct Report {
    pub lane: u32,
    pub destination: Arc<str>,
    pub key: Key,
    pub size: Size,
    pub done: UnboundedSender<Done>,
    open: bool,
}

impl Report {
    pub fn new(lane: u32, destination: Arc<str>, key: Key, size: Size, done: UnboundedSender<Done>) -> Self {
        Report { lane, destination, key, size, done, open: true }
    }

    fn tell(&mut self, ended: Ended, news: News) {
        self.open = false;
        let (lane, destination, key, size) = (self.lane, self.destination.clone(), self.key, self.size);
        // The receiver is gone only when the session has ended, and its claims with it.
        let _ = self.done.send(Done { lane, destination, key, size, ended, news });
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        if self.open {
            let error = "the relay failed, see its log".to_owned();
            self.tell(Ended::With(Outcome::Unable { error: error.clone() }), News::Unable(error));
        }
    }
}

impl Item {
    fn end(mut self, ended: Ended, news: News) {
        self.report.tell(ended, news);
    }

    /// Back as if it had never been handed out.
    fn release(self) {
        self.end(Ended::Released, News::None);
    }
}

/// What a delivery's end says of its destination, besides what became of the event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum News {
    None,
    /// It answers.
    Well,
    /// It is to be left alone, for as long as it asks for.
    Down {
        error: String,
        retry_in: Option<Duration>,
    },
    /// This relay can't deliver there.
    Unable(String),
}

/// How one delivery ended.
pub struct Done {
    pub lane: u32,
    pub destination: Arc<str>,
    pub key: Key,
    pub size: Size,
    pub ended: Ended,
    pub news: News,
}

/// A destination, or why this relay has none as it is configured.
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

/// How fast a destination may be called; it outlives its lane.
pub type SharedPace = Arc<Mutex<Pace>>;

/// Starts the lane's task. It ends when the sender is dropped, and what is under way is dropped with it.
pub fn start(name: Arc<str>, settings: Settings, pace: SharedPace, metrics: LaneMetrics) -> UnboundedSender<Order> {
    let (orders, inbox) = unbounded_channel();
    tokio::spawn(keep(Lane::new(name, settings, pace, metrics), inbox));
    orders
}

/// Lets the lane run, and begins anew when it fails: what it held then has been reported by being dropped.
async fn keep(mut lane: Lane, mut inbox: UnboundedReceiver<Order>) {
    let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
    loop {
        if AssertUnwindSafe(lane.run(&mut inbox)).catch_unwind().await.is_ok() {
            return;
        }
        tracing::error!(
            destination = &*lane.name,
            "the task of a destination has failed; it gives back what it held and starts anew"
        );
        lane.metrics.in_flight.sub(i64::try_from(lane.under_way).unwrap_or(0));
        let Lane { name, settings, pace, metrics, halted, .. } = lane;
        lane = Lane { halted, ..Lane::new(name, settings, pace, metrics) };
        if let Some(backoff) = &mut backoff {
            tokio::time::sleep(backoff.next()).await;
        }
    }
}

struct Lane {
    name: Arc<str>,
    settings: Settings,
    metrics: LaneMetrics,
    queue: Queue<Item>,
    pace: SharedPace,
    under_way: usize,
    /// Rises when the destination is found to be down.
    epoch: u64,
    halted: bool,
}

impl Lane {
    fn new(name: Arc<str>, settings: Settings, pace: SharedPace, metrics: LaneMetrics) -> Self {
        Lane { name, settings, metrics, queue: Queue::default(), pace, under_way: 0, epoch: 0, halted: false }
    }

    fn pace(&self) -> MutexGuard<'_, Pace> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn run(&mut self, inbox: &mut UnboundedReceiver<Order>) {
        let mut under_way = FuturesUnordered::new();
        loop {
            while let Some((key, item)) = self.next() {
                self.metrics.in_flight.inc();
                self.under_way += 1;
                let target = self.settings.target.clone();
                let duration = self.metrics.duration.clone();
                under_way.push(attempt(target, self.name.clone(), duration, self.epoch, key, item));
            }
            let wait = self.pace().not_before(Instant::now()).filter(|_| !self.queue.is_empty());
            tokio::select! {
                biased;
                Some((epoch, key, item, outcome)) = under_way.next(), if !under_way.is_empty() => {
                    self.metrics.in_flight.dec();
                    self.under_way -= 1;
                    self.ended(epoch, key, item, outcome);
                }
                order = inbox.recv() => match order {
                    Some(order) => self.obey(order),
                    None => break,
                },
                () = sleep_until(wait), if wait.is_some() => {}
            }
        }
        self.metrics.in_flight.sub(i64::try_from(self.under_way).unwrap_or(0));
    }

    /// The next delivery that may begin now. Those that this relay holds no lease of any more go back.
    fn next(&mut self) -> Option<(OrderingKey, Item)> {
        let now = Instant::now();
        let may_begin = |pace: &Pace| pace.has_room(self.under_way) && pace.not_before(now).is_none();
        if !may_begin(&self.pace()) {
            return None;
        }
        while let Some((key, item)) = self.queue.pop() {
            if !item.lease.is_over() {
                self.pace().began(now);
                return Some((key, item));
            }
            item.release();
            self.queue.abandon(key).into_iter().for_each(Item::release);
        }
        None
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Deliver(items) if self.halted => items.into_iter().for_each(Item::release),
            Order::Deliver(items) => {
                items.into_iter().for_each(|item| self.queue.push(item.ordering_key, item));
            }
            Order::Change(settings) => {
                self.pace().set_ceiling(settings.concurrency);
                self.settings = settings;
            }
            Order::Halt => {
                self.halted = true;
                self.release_queue();
            }
        }
    }

    fn ended(&mut self, epoch: u64, key: OrderingKey, item: Item, outcome: Outcome) {
        self.metrics.count(&outcome);
        let delivered = outcome == Outcome::Delivered;
        let goes_on = delivered || (matches!(outcome, Outcome::Rejected { .. }) && !self.settings.blocks);
        let step = if delivered { "confirmed" } else { "failed" };
        trace::step(step, &item.event.event_id, Some(&self.name));
        if let Some(error) = outcome.error() {
            tracing::debug!(destination = &*self.name, event_id = %item.event.event_id, error, "not delivered");
        }
        // What was under way when the destination went down says nothing new about it.
        let late = epoch < self.epoch;
        let news = if late { News::None } else { self.news(&outcome) };
        let down = matches!(news, News::Down { .. } | News::Unable(_)) || matches!(outcome, Outcome::Gone { .. });
        let of_destination =
            matches!(outcome, Outcome::Unavailable { .. } | Outcome::Throttled { .. } | Outcome::Unable { .. });
        item.end(if late && of_destination { Ended::Released } else { Ended::With(outcome) }, news);
        if goes_on {
            self.queue.leave(key);
        } else {
            let dropped: VecDeque<Item> = self.queue.abandon(key);
            dropped.into_iter().for_each(Item::release);
        }
        if down {
            self.epoch += 1;
            self.release_queue();
        }
    }

    fn news(&mut self, outcome: &Outcome) -> News {
        match outcome {
            Outcome::Delivered => {
                self.pace().succeeded(Instant::now());
                News::Well
            }
            Outcome::Failed { .. } | Outcome::Rejected { .. } => News::Well,
            Outcome::Unavailable { error } => News::Down { error: error.clone(), retry_in: None },
            Outcome::Throttled { error, retry_in } => {
                self.pace().throttled(Instant::now());
                News::Down { error: error.clone(), retry_in: *retry_in }
            }
            Outcome::Unable { error } => News::Unable(error.clone()),
            Outcome::Gone { .. } => News::None,
        }
    }

    fn release_queue(&mut self) {
        self.queue.drain().into_iter().for_each(Item::release);
    }
}

async fn attempt(
    target: Target,
    name: Arc<str>,
    duration: Histogram,
    epoch: u64,
    key: OrderingKey,
    item: Item,
) -> (u64, OrderingKey, Item, Outcome) {
    trace::step("sent", &item.event.event_id, Some(&name));
    let began = Instant::now();
    let under_way = ui::begun(&name);
    let span = spans::begin(&item.event);
    let traceparent = span.as_ref().map(Span::traceparent);
    let Attempted { outcome, status } = match &*target {
        // A fault of the relay's own costs no event anything, and the lane goes on.
        Ok(destination) => AssertUnwindSafe(destination.deliver(&item.event, item.attempt, traceparent.as_deref()))
            .catch_unwind()
            .await
            .unwrap_or_else(|_| Outcome::Unable { error: "the relay failed, see its log".into() }.into()),
        Err(error) => Outcome::Unable { error: error.clone() }.into(),
    };
    if let Some(span) = span {
        let of_kind = target.as_ref().as_ref().map(|to| to.attributes(&item.event, status)).unwrap_or_default();
        span.end(&name, &item.event, item.attempt, of_kind, &outcome);
    }
    let took = began.elapsed();
    drop(under_way);
    duration.observe(took.as_secs_f64());
    ui::attempted(&item.event, &name, item.attempt, &outcome, took);
    (epoch, key, item, outcome)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::destination::sample_event;
    use crate::lease::Asked;
    use crate::metrics::Metrics;

    fn lane(
        deliver: fn(&Event) -> Outcome,
    ) -> (UnboundedSender<Order>, UnboundedSender<Done>, UnboundedReceiver<Done>) {
        let settings = Settings { target: Arc::new(Ok(Destination::Fake(deliver))), concurrency: 1, blocks: false };
        let metrics = Metrics::new(1).expect("metrics").lane("fake");
        let pace = Arc::new(Mutex::new(Pace::new(1)));
        let (done, ended) = unbounded_channel();
        (start("fake".into(), settings, pace, metrics), done, ended)
    }

    fn item(id: i64, done: &UnboundedSender<Done>, lease: Duration) -> Item {
        Item {
            ordering_key: None,
            attempt: 1,
            event: Arc::new(sample_event()),
            lease: Arc::new(Lease::new(Asked::now(), lease)),
            report: Report::new(0, "fake".into(), (1, id), Size::default(), done.clone()),
        }
    }

    const MINUTE: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn a_panic_is_the_relays_and_costs_no_attempt() {
        let (orders, done, mut ended) = lane(|_| panic!("on purpose"));
        assert!(orders.send(Order::Deliver(vec![item(1, &done, MINUTE), item(2, &done, MINUTE)])).is_ok());
        let first = ended.recv().await.expect("an end");
        assert!(matches!(first.ended, Ended::With(Outcome::Unable { .. })) && matches!(first.news, News::Unable(_)));
        assert_eq!(ended.recv().await.expect("an end").ended, Ended::Released, "the rest waits for another time");
    }

    #[tokio::test]
    async fn what_a_task_holds_when_it_dies_is_given_back() {
        let (_orders, done, mut ended) = lane(|_| Outcome::Delivered);
        let held = [item(1, &done, MINUTE), item(2, &done, MINUTE)];
        let task = tokio::spawn(async move {
            let _held = held;
            panic!("on purpose")
        });
        assert!(task.await.is_err());
        for id in [1, 2] {
            let end = ended.recv().await.expect("an end");
            assert!(end.key == (1, id) && matches!(end.ended, Ended::With(Outcome::Unable { .. })));
        }
    }

    #[tokio::test]
    async fn nothing_begins_after_the_lease() {
        let (orders, done, mut ended) = lane(|_| Outcome::Delivered);
        let items = vec![item(1, &done, Duration::ZERO), item(2, &done, MINUTE)];
        assert!(orders.send(Order::Deliver(items)).is_ok());
        let mut ends = [ended.recv().await.expect("an end"), ended.recv().await.expect("an end")];
        ends.sort_by_key(|end| end.key);
        assert_eq!((&ends[0].ended, &ends[1].ended), (&Ended::Released, &Ended::With(Outcome::Delivered)));
    }
}

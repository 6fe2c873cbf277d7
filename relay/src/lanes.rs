//! The destinations that this relay serves, each with its lane and its window; kept in step with the database.
//!
//! A destination that is down, or that this relay can't serve, is not asked for; after a while one event is, to see
//! whether it is so still. Nobody else notices.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::UnboundedSender;

use crate::destination::{Destination, Environment, Event, Object, Spec, Standing};
use crate::lane::{self, Done, Item, News, Order, Report, Settings};
use crate::lease::Lease;
use crate::ledger::Key;
use crate::metrics::Metrics;
use crate::pause::Pause;
use crate::queue::Line;
use crate::window::{self, Plan, Window};

/// Bounds on what one destination may hold.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub max_in_flight: usize,
    pub max_bytes: usize,
}

pub struct Lanes {
    lanes: Vec<Lane>,
    limits: Limits,
    environment: Arc<Environment>,
    metrics: Metrics,
    done: UnboundedSender<Done>,
    next_id: u32,
    /// How the connection to the broker stands.
    broker: Standing,
    networks: u64,
    /// What the database is to be told: destinations, and why this relay can't serve them.
    reports: Vec<(Vec<String>, String)>,
    /// The last claim could be a try.
    tried: bool,
}

struct Lane {
    id: u32,
    name: Arc<str>,
    spec: Spec,
    window: Window,
    orders: UnboundedSender<Order>,
    batch: Vec<Item>,
    pause: Option<Pause>,
    /// Why this relay has no such destination as it is configured.
    broken: Option<String>,
    /// Removed or disabled: finishes what is under way.
    retired: bool,
}

/// What a claim asks for.
pub enum Ask {
    Claim {
        count: usize,
        names: Vec<String>,
    },
    /// One event for this one, which could not be served; the others are still to be asked for.
    Try {
        name: String,
    },
    Wait {
        until: Option<Instant>,
    },
}

impl Lanes {
    pub fn new(limits: Limits, environment: Arc<Environment>, metrics: Metrics, done: UnboundedSender<Done>) -> Self {
        let networks = environment.generation_of_networks();
        Lanes {
            lanes: Vec::new(),
            limits,
            environment,
            metrics,
            done,
            next_id: 0,
            broker: Standing::Connecting,
            networks,
            reports: Vec::new(),
            tried: false,
        }
    }

    /// Takes up what changed: new, changed and removed destinations, and networks that may or may not be reached now.
    pub fn update(&mut self, specs: Vec<Spec>) {
        let networks = self.environment.generation_of_networks();
        let other_networks = std::mem::replace(&mut self.networks, networks) != networks;
        let served: Vec<Spec> = specs.into_iter().filter(|spec| self.environment.serves(&spec.kind)).collect();
        for lane in self.lanes.iter_mut().filter(|lane| !lane.retired) {
            if !served.iter().any(|spec| spec.name == *lane.name) {
                tracing::info!(destination = &*lane.name, "no longer served");
                lane.retire();
            }
        }
        for spec in served {
            match self.lanes.iter().position(|lane| !lane.retired && *lane.name == *spec.name) {
                Some(at) if self.lanes[at].spec == spec && !(other_networks && spec.kind == "webhook") => {
                    // An operator may have resumed it.
                    self.retry(at);
                }
                Some(at) => {
                    tracing::info!(destination = spec.name, "changed");
                    self.lanes[at].spec = spec;
                    self.rebuild(at);
                    self.retry(at);
                }
                None => self.add(spec),
            }
        }
        self.lanes.retain(|lane| !(lane.retired && lane.window.held == 0));
    }

    fn add(&mut self, spec: Spec) {
        tracing::info!(destination = spec.name, kind = spec.kind, "served");
        let (settings, broken) = settings(&spec, &self.environment);
        let name: Arc<str> = spec.name.as_str().into();
        let limit = window_limit(&spec, &settings, self.limits);
        let window = Window::new(limit, self.limits.max_in_flight, self.limits.max_bytes);
        let id = self.next_id;
        self.next_id += 1;
        let metrics = self.metrics.lane(&name);
        let orders = lane::start(name.clone(), settings, metrics);
        let lane = Lane { id, name, spec, window, orders, batch: Vec::new(), pause: None, broken, retired: false };
        self.lanes.push(lane);
        self.retry(self.lanes.len() - 1);
    }

    /// Makes the destination anew from its row.
    fn rebuild(&mut self, at: usize) {
        let lane = &mut self.lanes[at];
        let (settings, broken) = settings(&lane.spec, &self.environment);
        lane.window.limit = window_limit(&lane.spec, &settings, self.limits);
        lane.window.caught_up();
        lane.broken = broken;
        lane.send(Order::Change(settings));
    }

    /// Asks for it again, as far as this relay can serve it at all.
    fn retry(&mut self, at: usize) {
        let down = self.broker.reason().map(str::to_owned);
        let lane = &mut self.lanes[at];
        let why = lane.broken.clone().or_else(|| down.filter(|_| lane.is_rabbitmq()));
        let before = std::mem::replace(&mut lane.pause, why.as_ref().map(|_| Pause::new(Instant::now())));
        if before.is_some() || why.is_some() {
            self.metrics.unable(&lane.name, why.is_some());
        }
        if let Some(why) = why {
            self.reports.push((vec![lane.name.to_string()], why));
        }
    }

    pub fn needs_broker(&self) -> bool {
        self.lanes.iter().any(Lane::is_rabbitmq)
    }

    /// The connection to the broker stands otherwise now. The destinations that can be served again.
    pub fn broker_changed(&mut self, standing: Standing) -> Vec<String> {
        self.broker = standing;
        let of_broker = |lane: &&mut Lane| lane.is_rabbitmq() && !lane.retired;
        let names = self.lanes.iter_mut().filter(of_broker).map(|lane| lane.name.to_string()).collect::<Vec<_>>();
        match self.broker.reason() {
            Some(why) => {
                let now = Instant::now();
                for lane in self.lanes.iter_mut().filter(of_broker) {
                    self.metrics.unable(&lane.name, true);
                    lane.pause.get_or_insert_with(|| Pause::new(now)).something_is_owed();
                }
                if !names.is_empty() {
                    self.reports.push((names, why.to_owned()));
                }
                Vec::new()
            }
            None if self.broker == Standing::Up => {
                for lane in self.lanes.iter_mut().filter(of_broker).filter(|lane| lane.broken.is_none()) {
                    if lane.pause.take().is_some() {
                        self.metrics.unable(&lane.name, false);
                    }
                }
                names
            }
            None => Vec::new(),
        }
    }

    /// What the database has not been told yet.
    pub fn take_reports(&mut self) -> Vec<(Vec<String>, String)> {
        std::mem::take(&mut self.reports)
    }

    /// Something may have come for those that are not asked for.
    pub fn something_came(&mut self) {
        self.lanes.iter_mut().filter_map(|lane| lane.pause.as_mut()).for_each(Pause::something_is_owed);
    }

    /// When one that is not asked for is to be tried.
    pub fn next_probe(&self) -> Option<Instant> {
        self.lanes
            .iter()
            .filter(|lane| lane.may_be_tried(&self.broker))
            .filter_map(|lane| lane.pause.as_ref()?.due())
            .min()
    }

    /// What the next claim asks for. Tries and claims for all others take turns.
    pub fn ask(&mut self, batch: usize, average: usize, turn: bool, now: Instant) -> Ask {
        self.tried = !self.tried;
        if self.tried
            && let Some(name) = self.probe(now)
        {
            return Ask::Try { name };
        }
        match self.ask_for_all(batch, average, turn, now) {
            Ask::Wait { until } => match self.probe(now) {
                Some(name) => Ask::Try { name },
                None => Ask::Wait { until },
            },
            claim => claim,
        }
    }

    fn ask_for_all(&mut self, batch: usize, average: usize, turn: bool, now: Instant) -> Ask {
        let broker = &self.broker;
        let (names, mut windows): (Vec<&Arc<str>>, Vec<&mut Window>) = self
            .lanes
            .iter_mut()
            .filter(|lane| lane.is_asked_for(broker))
            .map(|lane| (&lane.name, &mut lane.window))
            .unzip();
        match window::plan(&mut windows, batch, average, turn, now) {
            Plan::Wait { until } => Ask::Wait { until },
            Plan::Claim { count, include } => {
                Ask::Claim { count, names: include.iter().map(|i| names[*i].to_string()).collect() }
            }
        }
    }

    /// One event for a destination that could not be served, to see whether it can.
    fn probe(&mut self, now: Instant) -> Option<String> {
        let due = |lane: &Lane| {
            lane.may_be_tried(&self.broker)
                && lane.window.held == 0
                && lane.pause.as_ref().is_some_and(|p| p.is_due(now))
        };
        let at = self.lanes.iter().position(due)?;
        if self.lanes[at].broken.is_some() {
            self.rebuild(at);
        }
        let lane = &mut self.lanes[at];
        lane.pause.as_mut()?.tried(now);
        Some(lane.name.to_string())
    }

    /// Whether there is something to claim for that the last claim left out.
    pub fn any_missed(&self, batch: usize, average: usize, now: Instant) -> bool {
        self.lanes.iter().any(|lane| match &lane.pause {
            None => lane.is_asked_for(&self.broker) && lane.window.is_missed(batch, average),
            Some(pause) => lane.may_be_tried(&self.broker) && lane.window.held == 0 && pause.is_due(now),
        })
    }

    /// A claim for these destinations brought so many events and was all there was, or not.
    pub fn claimed(&mut self, names: &[String], events: usize, given: &HashMap<&str, usize>, all: bool) {
        for lane in self.lanes.iter_mut().filter(|lane| names.iter().any(|name| **name == *lane.name)) {
            if lane.pause.is_none() {
                lane.window.brought(given.get(&*lane.name).copied().unwrap_or(0), events);
            }
            if all {
                lane.window.caught_up();
            }
        }
    }

    /// Gives an event to one of its destinations, unless that one has no room or is not served.
    pub fn give(
        &mut self,
        to: &str,
        key: Key,
        size: usize,
        attempt: u32,
        event: &Arc<Event>,
        lease: &Arc<Lease>,
    ) -> bool {
        let Some(lane) = self.lanes.iter_mut().find(|lane| !lane.retired && *lane.name == *to) else {
            return false;
        };
        if !lane.window.admit(size) {
            return false;
        }
        let report = Report::new(lane.id, lane.name.clone(), key, size, self.done.clone());
        lane.batch.push(Item { line: line_of(event), attempt, event: event.clone(), lease: lease.clone(), report });
        true
    }

    /// An event for it was too large to be kept.
    pub fn refuse(&mut self, destination: &str, size: usize) {
        if let Some(lane) = self.lanes.iter_mut().find(|lane| !lane.retired && *lane.name == *destination) {
            lane.window.refuse(size);
        }
    }

    /// Hands over what was given since the last time.
    pub fn flush(&mut self) {
        for lane in &mut self.lanes {
            lane.window.end_batch();
            let batch = std::mem::take(&mut lane.batch);
            if !batch.is_empty() {
                lane.send(Order::Deliver(batch));
            }
        }
    }

    /// A delivery has ended. Whether there may be more to claim for that reason.
    pub fn ended(&mut self, done: &Done, now: Instant) -> bool {
        let Some(at) = self.lanes.iter().position(|lane| lane.id == done.lane) else { return false };
        self.lanes[at].window.leave(done.size);
        if self.lanes[at].retired {
            if self.lanes[at].window.held == 0 {
                self.lanes.swap_remove(at);
            }
            return false;
        }
        let broker_is_up = self.broker == Standing::Up;
        let lane = &mut self.lanes[at];
        match &done.news {
            News::None => false,
            News::Well if lane.pause.is_some() && (broker_is_up || !lane.is_rabbitmq()) => {
                tracing::info!(destination = &*lane.name, "delivers again");
                self.metrics.unable(&lane.name, false);
                lane.pause = None;
                true
            }
            News::Well => false,
            News::Down { error, retry_in } => {
                lane.pause(now, *retry_in, error, "down");
                false
            }
            News::Unable(error) => {
                self.metrics.unable(&lane.name, true);
                lane.pause(now, None, error, "this relay can't deliver; others may");
                false
            }
        }
    }

    /// Begin nothing more, anywhere.
    pub fn halt(&mut self) {
        self.lanes.iter().for_each(|lane| lane.send(Order::Halt));
    }
}

impl Lane {
    fn is_rabbitmq(&self) -> bool {
        self.spec.kind == "rabbitmq"
    }

    /// With the others, as its window allows.
    fn is_asked_for(&self, broker: &Standing) -> bool {
        self.may_be_tried(broker) && self.pause.is_none()
    }

    /// While it is not known how the broker is, nothing of its destinations is touched.
    fn may_be_tried(&self, broker: &Standing) -> bool {
        !(self.retired || self.is_rabbitmq() && *broker == Standing::Connecting)
    }

    fn pause(&mut self, now: Instant, at_least: Option<Duration>, error: &str, what: &str) {
        let pause = self.pause.get_or_insert_with(|| Pause::new(now));
        if pause.failed(now, at_least.unwrap_or_default(), error) {
            tracing::warn!(destination = &*self.name, error, "{what}");
        }
    }

    fn retire(&mut self) {
        self.retired = true;
        self.send(Order::Halt);
    }

    fn send(&self, order: Order) {
        // The lane's task ends only when this sender is dropped.
        let _ = self.orders.send(order);
    }
}

/// How the lane is to behave, and why this relay can't have such a destination.
fn settings(spec: &Spec, environment: &Environment) -> (Settings, Option<String>) {
    let target = Destination::build(spec, environment).map_err(|error| error.to_string());
    let broken = target.as_ref().err().cloned();
    let concurrency = target.as_ref().map_or(1, |destination| destination.concurrency().max(1));
    let blocks = Object::new(spec.settings.as_str()).string("on_failure").as_deref() == Some("block");
    (Settings { target: Arc::new(target), concurrency, blocks }, broken)
}

/// A broker confirms in bulk; a receiver that answers one by one is given a few rounds' work.
fn window_limit(spec: &Spec, settings: &Settings, limits: Limits) -> usize {
    match spec.kind.as_str() {
        "rabbitmq" => limits.max_in_flight,
        _ => (settings.concurrency * 4).min(limits.max_in_flight),
    }
}

/// Two aggregates with one hash would wait for each other and lose nothing.
fn line_of(event: &Event) -> Line {
    let id = event.aggregate_id.as_ref()?;
    let mut hasher = DefaultHasher::new();
    (event.aggregate_type.as_deref().unwrap_or(""), id).hash(&mut hasher);
    Some(hasher.finish())
}

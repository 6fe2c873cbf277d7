//! The destinations that this relay serves, each with its lane and its window; kept in step with the database.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;

use crate::destination::{Destination, Environment, Event, Spec};
use crate::lane::{self, Done, Item, Order, Settings};
use crate::ledger::Key;
use crate::metrics::Metrics;
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
}

struct Lane {
    id: u32,
    name: Arc<str>,
    spec: Spec,
    window: Window,
    orders: UnboundedSender<Order>,
    batch: Vec<Item>,
    /// Removed or disabled: finishes what is under way.
    retired: bool,
}

impl Lanes {
    pub fn new(limits: Limits, environment: Arc<Environment>, metrics: Metrics, done: UnboundedSender<Done>) -> Self {
        Lanes { lanes: Vec::new(), limits, environment, metrics, done, next_id: 0 }
    }

    /// Takes up what changed: new, changed and removed destinations.
    pub fn update(&mut self, specs: Vec<Spec>) {
        let served: Vec<Spec> = specs.into_iter().filter(|spec| self.environment.serves(&spec.kind)).collect();
        for lane in self.lanes.iter_mut().filter(|lane| !lane.retired) {
            if !served.iter().any(|spec| spec.name == *lane.name) {
                tracing::info!(destination = &*lane.name, "no longer served");
                lane.retire();
            }
        }
        for spec in served {
            match self.lanes.iter_mut().find(|lane| !lane.retired && *lane.name == *spec.name) {
                Some(lane) if lane.spec == spec => {}
                Some(lane) => {
                    tracing::info!(destination = spec.name, "changed");
                    let settings = settings(&spec, &self.environment);
                    lane.window.limit = window_limit(&spec, &settings, self.limits);
                    lane.window.caught_up();
                    lane.spec = spec;
                    lane.send(Order::Change(settings));
                }
                None => self.add(spec),
            }
        }
        self.lanes.retain(|lane| !(lane.retired && lane.window.held == 0));
    }

    fn add(&mut self, spec: Spec) {
        tracing::info!(destination = spec.name, kind = spec.kind, "served");
        let settings = settings(&spec, &self.environment);
        let name: Arc<str> = spec.name.as_str().into();
        let window = Window::new(window_limit(&spec, &settings, self.limits), self.limits.max_bytes);
        let id = self.next_id;
        self.next_id += 1;
        let metrics = self.metrics.lane(&name);
        let orders = lane::start(id, name.clone(), settings, metrics, self.done.clone());
        self.lanes.push(Lane { id, name, spec, window, orders, batch: Vec::new(), retired: false });
    }

    /// What the next claim asks for; the positions are for [`Lanes::names`].
    pub fn plan(&mut self, batch: usize, average: usize, turn: bool, now: Instant) -> Plan {
        let mut windows: Vec<&mut Window> =
            self.lanes.iter_mut().filter(|lane| !lane.retired).map(|lane| &mut lane.window).collect();
        window::plan(&mut windows, batch, average, turn, now)
    }

    /// Whether a destination that a claim left out has room now.
    pub fn any_missed(&self, batch: usize, average: usize) -> bool {
        let mut active = self.lanes.iter().filter(|lane| !lane.retired);
        active.any(|lane| lane.window.is_missed(batch, average))
    }

    pub fn names(&self, include: &[usize]) -> Vec<String> {
        let active: Vec<&Lane> = self.lanes.iter().filter(|lane| !lane.retired).collect();
        include.iter().map(|i| active[*i].name.to_string()).collect()
    }

    /// A claim for these destinations brought all there was.
    pub fn caught_up(&mut self, names: &[String]) {
        for lane in &mut self.lanes {
            if names.iter().any(|name| **name == *lane.name) {
                lane.window.caught_up();
            }
        }
    }

    /// Gives an event to one of its destinations, unless that one has no room or is not served.
    pub fn give(&mut self, destination: &str, key: Key, size: usize, attempt: u32, event: &Arc<Event>) -> bool {
        let Some(lane) = self.lanes.iter_mut().find(|lane| !lane.retired && *lane.name == *destination) else {
            return false;
        };
        if !lane.window.admit(size) {
            return false;
        }
        lane.batch.push(Item { key, line: line_of(event), size, attempt, event: event.clone() });
        true
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

    pub fn ended(&mut self, lane: u32, size: usize) {
        if let Some(at) = self.lanes.iter().position(|l| l.id == lane) {
            self.lanes[at].window.leave(size);
            if self.lanes[at].retired && self.lanes[at].window.held == 0 {
                self.lanes.swap_remove(at);
            }
        }
    }

    /// Begin nothing more, anywhere.
    pub fn halt(&mut self) {
        self.lanes.iter().for_each(|lane| lane.send(Order::Halt));
    }
}

impl Lane {
    fn retire(&mut self) {
        self.retired = true;
        self.send(Order::Halt);
    }

    fn send(&self, order: Order) {
        // The lane's task ends only when this sender is dropped.
        let _ = self.orders.send(order);
    }
}

fn settings(spec: &Spec, environment: &Environment) -> Settings {
    let target = Destination::build(spec, environment).map_err(|error| error.to_string());
    if let Err(error) = &target {
        tracing::error!(destination = spec.name, error, "can't be served as it is configured");
    }
    let concurrency = target.as_ref().map_or(1, |destination| destination.concurrency().max(1));
    let blocks = spec.settings.get("on_failure").and_then(|value| value.as_str()) == Some("block");
    Settings { target: Arc::new(target), concurrency, blocks }
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

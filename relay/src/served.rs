//! One destination as this relay serves it: its row, its window, and the way to its lane.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::UnboundedSender;

use crate::destination::{Destination, Environment, Object, Spec, Standing};
use crate::lane::{self, Item, Order, Settings};
use crate::metrics::LaneMetrics;
use crate::pause::Pause;
use crate::window::Window;

/// Bounds on what one destination may hold.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub max_in_flight: usize,
    pub max_bytes: usize,
}

/// The handle of a destination's lane.
pub struct Served {
    pub id: u32,
    pub name: Arc<str>,
    pub spec: Spec,
    pub window: Window,
    orders: UnboundedSender<Order>,
    pub batch: Vec<Item>,
    pub pause: Option<Pause>,
    /// Why this relay has no such destination as it is configured.
    pub broken: Option<String>,
    /// Removed or disabled: finishes what is under way.
    pub retired: bool,
}

impl Served {
    /// Makes the destination from its row and starts its lane.
    pub fn start(id: u32, spec: Spec, limits: Limits, environment: &Environment, metrics: LaneMetrics) -> Self {
        let (settings, broken) = settings(&spec, environment);
        let name: Arc<str> = spec.name.as_str().into();
        let limit = window_limit(&spec, &settings, limits);
        let window = Window::new(limit, limits.max_in_flight, limits.max_bytes);
        let orders = lane::start(name.clone(), settings, metrics);
        Served { id, name, spec, window, orders, batch: Vec::new(), pause: None, broken, retired: false }
    }

    /// Makes the destination anew from its row.
    pub fn rebuild(&mut self, limits: Limits, environment: &Environment) {
        let (settings, broken) = settings(&self.spec, environment);
        self.window.limit = window_limit(&self.spec, &settings, limits);
        self.window.caught_up();
        self.broken = broken;
        self.send(Order::Change(settings));
    }

    pub fn is_rabbitmq(&self) -> bool {
        self.spec.kind == "rabbitmq"
    }

    /// With the others, as its window allows.
    pub fn is_asked_for(&self, broker: &Standing) -> bool {
        self.may_be_tried(broker) && self.pause.is_none()
    }

    /// While it is not known how the broker is, nothing of its destinations is touched.
    pub fn may_be_tried(&self, broker: &Standing) -> bool {
        !(self.retired || self.is_rabbitmq() && *broker == Standing::Connecting)
    }

    pub fn pause(&mut self, now: Instant, at_least: Option<Duration>, error: &str, what: &str) {
        let pause = self.pause.get_or_insert_with(|| Pause::new(now));
        if pause.failed(now, at_least.unwrap_or_default(), error) {
            tracing::warn!(destination = &*self.name, error, "{what}");
        }
    }

    pub fn retire(&mut self) {
        self.retired = true;
        self.send(Order::Halt);
    }

    pub fn send(&self, order: Order) {
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

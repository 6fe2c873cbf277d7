//! The handle of a lane: its number, its name, and the way to its task.

use std::sync::{Arc, PoisonError};
use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;

use crate::destination::{Destination, Environment, Object, Spec};
use crate::lane::{self, Item, Order, Settings, SharedPace};
use crate::metrics::LaneMetrics;
use crate::pace::Pace;
use crate::windows::Id;

pub struct Served {
    pub id: Id,
    pub name: Arc<str>,
    orders: UnboundedSender<Order>,
    pub pace: SharedPace,
    pub batch: Vec<Item>,
    /// Since when it has nothing to do.
    pub idle_since: Option<Instant>,
    /// This relay has no such destination as it is configured.
    pub broken: bool,
    /// Removed or disabled: finishes what is under way.
    pub retired: bool,
}

impl Served {
    /// Makes the destination from its row and starts its lane. Also: how many deliveries to ask for.
    pub fn start(
        id: Id,
        spec: &Spec,
        max_in_flight: usize,
        environment: &Environment,
        pace: Option<SharedPace>,
        metrics: LaneMetrics,
    ) -> (Self, usize) {
        let settings = settings(spec, environment);
        let (broken, limit) = (settings.target.is_err(), limit(spec, &settings, max_in_flight));
        let pace = pace.unwrap_or_else(|| Arc::new(Pace::new(settings.concurrency).into()));
        pace.lock().unwrap_or_else(PoisonError::into_inner).set_ceiling(settings.concurrency);
        let orders = lane::start(spec.name.clone(), settings, pace.clone(), metrics);
        let name = spec.name.clone();
        (Served { id, name, orders, pace, batch: Vec::new(), idle_since: None, broken, retired: false }, limit)
    }

    /// Makes the destination anew from its row. How many deliveries to ask for.
    pub fn rebuild(&mut self, spec: &Spec, max_in_flight: usize, environment: &Environment) -> usize {
        let settings = settings(spec, environment);
        let limit = limit(spec, &settings, max_in_flight);
        self.broken = settings.target.is_err();
        self.send(Order::Change(settings));
        limit
    }

    pub fn retire(&mut self) {
        self.retired = true;
        self.send(Order::Halt);
    }

    /// The pace that the next lane of this destination has to keep.
    pub fn kept_pace(&self) -> Option<SharedPace> {
        let mut pace = self.pace.lock().unwrap_or_else(PoisonError::into_inner);
        if pace.is_at_rest() {
            return None;
        }
        pace.rest();
        Some(self.pace.clone())
    }

    pub fn send(&self, order: Order) {
        // The lane's task ends only when this sender is dropped.
        let _ = self.orders.send(order);
    }
}

/// How the lane is to behave.
fn settings(spec: &Spec, environment: &Environment) -> Settings {
    let target = Destination::build(spec, environment).map_err(|error| error.to_string());
    let concurrency = target.as_ref().map_or(1, |destination| destination.concurrency().max(1));
    let blocks = Object::new(spec.settings.as_str()).string("on_failure").as_deref() == Some("block");
    Settings { target: Arc::new(target), concurrency, blocks }
}

/// A broker confirms in bulk; a receiver that answers one by one is given a few rounds' work.
fn limit(spec: &Spec, settings: &Settings, max_in_flight: usize) -> usize {
    match spec.is_rabbitmq() {
        true => max_in_flight,
        false => (settings.concurrency * 4).min(max_in_flight),
    }
}

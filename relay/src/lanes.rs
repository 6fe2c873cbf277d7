//! The destinations that this relay serves, each with its lane and its window; kept in step with the database.
//!
//! A destination that is down, or that this relay can't serve, is not asked for; after a while one event is, to see
//! whether it is so still. Nobody else notices.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;

use crate::destination::{Environment, Event, Spec, Standing};
use crate::lane::{Done, Item, News, Order, Report};
use crate::lease::Lease;
use crate::ledger::Key;
use crate::metrics::Metrics;
use crate::pause::Pause;
use crate::queue::OrderingKey;
use crate::served::{Limits, Served};
use crate::window::{self, Plan, Window};

pub struct Lanes {
    lanes: Vec<Served>,
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
                    self.lanes[at].rebuild(self.limits, &self.environment);
                    self.retry(at);
                }
                None => self.add(spec),
            }
        }
        self.lanes.retain(|lane| !(lane.retired && lane.window.held == 0));
    }

    fn add(&mut self, spec: Spec) {
        tracing::info!(destination = spec.name, kind = spec.kind, "served");
        let metrics = self.metrics.lane(&spec.name);
        self.lanes.push(Served::start(self.next_id, spec, self.limits, &self.environment, metrics));
        self.next_id += 1;
        self.retry(self.lanes.len() - 1);
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
        self.lanes.iter().any(Served::is_rabbitmq)
    }

    /// The connection to the broker stands otherwise now. The destinations that can be served again.
    pub fn broker_changed(&mut self, standing: Standing) -> Vec<String> {
        self.broker = standing;
        let of_broker = |lane: &&mut Served| lane.is_rabbitmq() && !lane.retired;
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
    pub fn ask(&mut self, batch: usize, average: usize, lagging_too: bool, now: Instant) -> Ask {
        self.tried = !self.tried;
        if self.tried
            && let Some(name) = self.probe(now)
        {
            return Ask::Try { name };
        }
        match self.ask_for_all(batch, average, lagging_too, now) {
            Ask::Wait { until } => match self.probe(now) {
                Some(name) => Ask::Try { name },
                None => Ask::Wait { until },
            },
            claim => claim,
        }
    }

    fn ask_for_all(&mut self, batch: usize, average: usize, lagging_too: bool, now: Instant) -> Ask {
        let broker = &self.broker;
        let (names, mut windows): (Vec<&Arc<str>>, Vec<&mut Window>) = self
            .lanes
            .iter_mut()
            .filter(|lane| lane.is_asked_for(broker))
            .map(|lane| (&lane.name, &mut lane.window))
            .unzip();
        match window::plan(&mut windows, batch, average, lagging_too, now) {
            Plan::Wait { until } => Ask::Wait { until },
            Plan::Claim { count, include } => {
                Ask::Claim { count, names: include.iter().map(|i| names[*i].to_string()).collect() }
            }
        }
    }

    /// One event for a destination that could not be served, to see whether it can.
    fn probe(&mut self, now: Instant) -> Option<String> {
        let due = |lane: &Served| {
            lane.may_be_tried(&self.broker)
                && lane.window.held == 0
                && lane.pause.as_ref().is_some_and(|p| p.is_due(now))
        };
        let at = self.lanes.iter().position(due)?;
        if self.lanes[at].broken.is_some() {
            self.lanes[at].rebuild(self.limits, &self.environment);
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
        let ordering_key = ordering_key(event);
        lane.batch.push(Item { ordering_key, attempt, event: event.clone(), lease: lease.clone(), report });
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

/// Two aggregates with one hash would wait for each other and lose nothing.
fn ordering_key(event: &Event) -> OrderingKey {
    let id = event.aggregate_id.as_ref()?;
    let mut hasher = DefaultHasher::new();
    (event.aggregate_type.as_deref().unwrap_or(""), id).hash(&mut hasher);
    Some(hasher.finish())
}

//! When each event was where, as relays log it that trace (`OUTBOX_LOG_LEVEL=info,outbox_relay::trace=debug`).

use std::collections::HashMap;
use std::time::{SystemTime, UNIX_EPOCH};

use uuid::Uuid;

use crate::relay::Relay;

/// Microseconds since 1970: the clock of this process and of its relays.
pub type Micros = i64;

pub fn now_us() -> Micros {
    micros(SystemTime::now())
}

pub fn micros(at: SystemTime) -> Micros {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}

/// The first time of each step of an event, at a destination where the step has one.
#[derive(Default, Clone)]
pub struct Trace(HashMap<(Uuid, String, Option<String>), Micros>);

impl Trace {
    pub fn of(relay: &Relay) -> Self {
        let mut trace = Trace::default();
        trace.add(relay);
        trace
    }

    pub fn add(&mut self, relay: &Relay) {
        for line in relay.events() {
            let id = line["event_id"].as_str().and_then(|id| id.parse().ok());
            let (Some(id), Some(step), Some(at)) = (id, line["step"].as_str(), line["at_us"].as_i64()) else {
                continue;
            };
            let key = (id, step.to_owned(), line["destination"].as_str().map(str::to_owned));
            self.0.entry(key).and_modify(|first| *first = at.min(*first)).or_insert(at);
        }
    }

    pub fn at(&self, id: &Uuid, step: &str, destination: Option<&str>) -> Option<Micros> {
        self.0.get(&(*id, step.to_owned(), destination.map(str::to_owned))).copied()
    }

    /// A step of all events, at whichever destination it came first.
    pub fn step(&self, step: &str) -> HashMap<Uuid, Micros> {
        let mut first = HashMap::new();
        for ((id, _, _), at) in self.0.iter().filter(|((_, of, _), _)| of == step) {
            first.entry(*id).and_modify(|first: &mut Micros| *first = (*first).min(*at)).or_insert(*at);
        }
        first
    }
}

//! What the soak knows, in its own memory: what each session committed, what arrived where and when, who held what, and
//! which faults there were. No database keeps it.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use outbox_tests::trace::Micros;
use uuid::Uuid;

/// How a transaction ended, as its session knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Open,
    Committed,
    RolledBack,
    /// The connection died before the answer. The application's own table says later what it was.
    Unknown,
}

#[derive(Debug, Clone)]
pub struct Transaction {
    pub fate: Fate,
    /// Before its first statement was sent.
    pub began: Micros,
}

#[derive(Debug, Clone)]
pub struct Event {
    pub id: i64,
    pub transaction: u64,
    pub kind: &'static str,
    pub tenant: Option<&'static str>,
    pub aggregate: Option<u32>,
    /// Not to be delivered before.
    pub due: Option<Micros>,
    /// A savepoint around it was rolled back, whatever became of the transaction.
    pub undone: bool,
}

/// A destination, or one life of it if it is removed and added again.
#[derive(Debug, Clone)]
pub struct Wanted {
    pub types: &'static str,
    pub tenant: Option<&'static str>,
    /// Events of transactions that began later have to arrive.
    pub since: Micros,
    /// Removed: nothing has to arrive any more.
    pub removed: bool,
    /// All that is done to it are outages, so no delivery may fail.
    pub only_outages: bool,
}

/// A message in a queue, or a request.
#[derive(Debug, Clone)]
pub struct Arrival {
    pub at: Micros,
    pub event: Uuid,
    /// Answered with success (a request), or simply there (a message).
    pub accepted: bool,
    /// By the broker, whose consumer lost its connection.
    pub redelivered: bool,
}

/// How a consumer's hold on an event ended, as far as the database answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The session died, or the lease ended.
    Lost,
    /// An acknowledgement was sent and its answer never came.
    PerhapsAcknowledged(Micros),
    Acknowledged {
        sent: Micros,
        answered: Micros,
    },
    Rejected,
    /// Given back: released, or failed with another try.
    Returned,
}

/// An event in the hands of one of the soak's own consumers.
#[derive(Debug, Clone)]
pub struct Hold {
    pub event: Uuid,
    pub token: i64,
    /// When the claim was sent, and when it had been answered.
    pub asked: Micros,
    pub from: Micros,
    /// The last moment at which the hold is proved: something that only a holder can do was sent then.
    pub until: Micros,
    pub end: End,
}

#[derive(Debug, Clone)]
pub struct Fault {
    pub what: String,
    pub begin: Micros,
    pub end: Option<Micros>,
}

#[derive(Debug, Clone, Default)]
pub struct Record {
    pub transactions: HashMap<u64, Transaction>,
    pub events: HashMap<Uuid, Event>,
    pub destinations: HashMap<String, Wanted>,
    pub arrivals: HashMap<String, Vec<Arrival>>,
    pub holds: Vec<Hold>,
    /// Dead letters: destination and event.
    pub dead: HashSet<(String, Uuid)>,
    /// The same as the extension's own events told it.
    pub told_dead: HashSet<(String, Uuid)>,
    pub faults: Vec<Fault>,
    /// Since then there was no fault.
    pub calm_since: Option<Micros>,
    /// What no fault explains, as it happened.
    pub complaints: Vec<String>,
}

impl Record {
    pub fn is_committed(&self, event: &Event) -> bool {
        !event.undone && self.transactions.get(&event.transaction).is_some_and(|t| t.fate == Fate::Committed)
    }

    /// The destinations of one name are told apart by the number of their life: `churn1/7`.
    pub fn wants(&self, destination: &str, event: &Event) -> bool {
        self.destinations.get(destination).is_some_and(|wanted| {
            event.kind.starts_with(wanted.types) && (wanted.tenant.is_none() || wanted.tenant == event.tenant)
        })
    }

    /// Whether it has to arrive there.
    pub fn is_owed(&self, destination: &str, event: &Event) -> bool {
        let Some(wanted) = self.destinations.get(destination) else { return false };
        let began = self.transactions.get(&event.transaction).map_or(0, |t| t.began);
        !wanted.removed && began > wanted.since && self.is_committed(event) && self.wants(destination, event)
    }

    /// Events of a round that is over are forgotten; what goes on stays.
    pub fn next_round(&mut self) {
        let destinations = self.destinations.drain().filter(|(_, wanted)| !wanted.removed).collect();
        *self = Record { destinations, ..Record::default() };
    }
}

#[derive(Clone, Default)]
pub struct Shared(Arc<Mutex<Record>>);

impl Shared {
    pub fn lock(&self) -> MutexGuard<'_, Record> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn set_fate(&self, transaction: u64, fate: Fate) {
        if let Some(transaction) = self.lock().transactions.get_mut(&transaction) {
            transaction.fate = fate;
        }
    }

    pub fn arrived(&self, destination: &str, arrival: Arrival) {
        self.lock().arrivals.entry(destination.to_owned()).or_default().push(arrival);
    }

    pub fn complain(&self, what: String) {
        let mut record = self.lock();
        if record.complaints.len() < 100 {
            record.complaints.push(what);
        }
    }
}

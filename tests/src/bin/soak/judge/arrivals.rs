//! What came to queues and webhooks.

use std::collections::HashMap;

use outbox_tests::trace::Micros;
use uuid::Uuid;

use super::{OWN, Rule, Violation};
use crate::record::{Arrival, Event, Record};

/// One event at one destination.
#[derive(Default)]
struct Seen {
    first: Micros,
    /// When it was taken, each time.
    taken: Vec<Micros>,
    /// Without those that the broker delivered again.
    sent: usize,
}

pub fn judge(record: &Record, found: &mut Vec<Violation>) {
    let none = Vec::new();
    for destination in record.destinations.keys().filter(|name| *name != OWN) {
        let arrivals = record.arrivals.get(destination).unwrap_or(&none);
        let seen = gather(arrivals);
        strangers(record, destination, &seen, found);
        lost(record, destination, &seen, found);
        order(record, destination, &seen, found);
    }
    for name in record.arrivals.keys().filter(|name| !record.destinations.contains_key(*name)) {
        let evidence = format!("something arrived at {name}, which there is not");
        found.push(Violation { rule: Rule::Ghost, evidence });
    }
}

fn gather(arrivals: &[Arrival]) -> HashMap<Uuid, Seen> {
    let mut all: HashMap<Uuid, Seen> = HashMap::new();
    for arrival in arrivals {
        let seen = all.entry(arrival.event).or_insert_with(|| Seen { first: arrival.at, ..Seen::default() });
        seen.first = seen.first.min(arrival.at);
        if arrival.accepted {
            seen.taken.push(arrival.at);
        }
        if !arrival.redelivered {
            seen.sent += 1;
        }
    }
    all
}

fn strangers(record: &Record, destination: &str, seen: &HashMap<Uuid, Seen>, found: &mut Vec<Violation>) {
    let mut violation = |rule, evidence| found.push(Violation { rule, evidence });
    for (uuid, what) in seen {
        let Some(event) = record.events.get(uuid) else {
            violation(Rule::Ghost, format!("{uuid} arrived at {destination} and nobody published it"));
            continue;
        };
        if !record.is_committed(event) {
            violation(Rule::Ghost, format!("{} arrived at {destination}", shown(record, uuid, event)));
        }
        if !record.wants(destination, event) {
            violation(Rule::Unwanted, format!("{} arrived at {destination}", shown(record, uuid, event)));
        }
        if let Some(due) = event.due.filter(|due| what.first < *due) {
            let early = (due - what.first) / 1000;
            violation(Rule::Early, format!("{} arrived at {destination} {early} ms early", shown(record, uuid, event)));
        }
        let calm = record.calm_since.is_some_and(|calm| {
            record.transactions.get(&event.transaction).is_some_and(|transaction| transaction.began >= calm)
        });
        if calm && what.sent > 1 {
            violation(
                Rule::Repeated,
                format!("{} arrived at {destination} {} times without a fault", shown(record, uuid, event), what.sent),
            );
        }
    }
}

fn lost(record: &Record, destination: &str, seen: &HashMap<Uuid, Seen>, found: &mut Vec<Violation>) {
    for (uuid, event) in &record.events {
        let taken = seen.get(uuid).is_some_and(|what| !what.taken.is_empty());
        if !taken && record.is_owed(destination, event) && !record.dead.contains(&(destination.to_owned(), *uuid)) {
            let tries = seen.get(uuid).map_or(0, |what| what.sent);
            let evidence = format!("{} did not arrive at {destination} ({tries} tries)", shown(record, uuid, event));
            found.push(Violation { rule: Rule::Lost, evidence });
        }
    }
}

/// What is ahead was taken before the first try of what is behind it. A scheduled event takes its place when it appears,
/// which may be too late for those behind it.
fn order(record: &Record, destination: &str, seen: &HashMap<Uuid, Seen>, found: &mut Vec<Violation>) {
    let mut lines: HashMap<u32, Vec<(i64, &Uuid, &Event, &Seen)>> = HashMap::new();
    for (uuid, what) in seen {
        if let Some(event) = record.events.get(uuid)
            && let Some(aggregate) = event.aggregate
        {
            lines.entry(aggregate).or_default().push((event.id, uuid, event, what));
        }
    }
    for (aggregate, mut line) in lines {
        line.sort_unstable_by_key(|(id, ..)| *id);
        let mut ahead: Option<(Micros, &Uuid, i64)> = None;
        for (id, uuid, event, what) in line {
            if let Some((taken, before, before_id)) = ahead
                && what.first < taken
            {
                let evidence = format!(
                    "aggregate {aggregate} at {destination}: {uuid} (id {id}) came {} ms before {before} (id {before_id}) \
                     was taken, at {}",
                    (taken - what.first) / 1000,
                    crate::show::moment(what.first),
                );
                found.push(Violation { rule: Rule::Order, evidence });
            }
            let dead = record.dead.contains(&(destination.to_owned(), *uuid));
            if let Some(taken) = what.taken.iter().min().filter(|_| event.due.is_none() && !dead)
                && ahead.is_none_or(|(latest, ..)| *taken > latest)
            {
                ahead = Some((*taken, uuid, id));
            }
        }
    }
}

fn shown(record: &Record, uuid: &Uuid, event: &Event) -> String {
    let fate = record.transactions.get(&event.transaction);
    let fate = fate.map_or_else(
        || "of no transaction".to_owned(),
        |transaction| {
            let undone = if event.undone { ", in a savepoint that was rolled back" } else { "" };
            format!("{:?}{undone}, begun {}", transaction.fate, crate::show::moment(transaction.began))
        },
    );
    format!(
        "{uuid} (id {}, {}, tenant {:?}, aggregate {:?}; {fate})",
        event.id, event.kind, event.tenant, event.aggregate
    )
}

//! What the soak's own consumers were handed out.

use std::collections::{HashMap, HashSet};

use outbox_tests::trace::Micros;
use uuid::Uuid;

use super::{OWN, Rule, Violation};
use crate::record::{End, Hold, Record};

pub fn judge(record: &Record, found: &mut Vec<Violation>) {
    let mut by_event: HashMap<Uuid, Vec<&Hold>> = HashMap::new();
    for hold in &record.holds {
        by_event.entry(hold.event).or_default().push(hold);
    }
    for (uuid, holds) in &mut by_event {
        holds.sort_unstable_by_key(|hold| hold.from);
        strangers(record, uuid, holds, found);
        overlaps(uuid, holds, found);
        repeats(record, uuid, holds, found);
    }
    lost(record, &by_event, found);
    order(record, &by_event, found);
}

fn strangers(record: &Record, uuid: &Uuid, holds: &[&Hold], found: &mut Vec<Violation>) {
    let event = record.events.get(uuid);
    if event.is_none_or(|event| !record.is_committed(event)) {
        let evidence = format!("{uuid} was handed out and never committed: {event:?}");
        found.push(Violation { rule: Rule::Ghost, evidence });
    } else if event.is_some_and(|event| !record.wants(OWN, event)) {
        let evidence = format!("{uuid} was handed out for {OWN}, which does not want it: {event:?}");
        found.push(Violation { rule: Rule::Unwanted, evidence });
    }
    if let Some(due) = event.and_then(|event| event.due) {
        for hold in holds.iter().filter(|hold| hold.from < due) {
            let evidence = format!("{uuid} was handed out {} ms early", (due - hold.from) / 1000);
            found.push(Violation { rule: Rule::Early, evidence });
        }
    }
}

fn overlaps(uuid: &Uuid, holds: &[&Hold], found: &mut Vec<Violation>) {
    for (n, one) in holds.iter().enumerate() {
        for other in &holds[n + 1..] {
            // Both are proved to hold at the moment at which the later one began.
            if other.from < one.until {
                let evidence = format!("{uuid} was held by two claims at once: {one:?} and {other:?}");
                found.push(Violation { rule: Rule::HeldTwice, evidence });
            }
            if let End::Acknowledged { answered, .. } = one.end
                && other.asked > answered
            {
                let evidence = format!("{uuid} was handed out after it was acknowledged: {one:?} and {other:?}");
                found.push(Violation { rule: Rule::AfterAck, evidence });
            }
        }
    }
}

fn repeats(record: &Record, uuid: &Uuid, holds: &[&Hold], found: &mut Vec<Violation>) {
    let Some(calm) = record.calm_since else { return };
    for hold in holds.iter().filter(|hold| hold.asked >= calm && hold.end == End::Lost) {
        let evidence = format!("{uuid} was lost to its consumer without a fault: {hold:?}");
        found.push(Violation { rule: Rule::Repeated, evidence });
    }
}

/// When the first acknowledgement that may have counted was sent.
fn settled(holds: &[&Hold]) -> Option<Micros> {
    holds
        .iter()
        .filter_map(|hold| match hold.end {
            End::Acknowledged { sent, .. } | End::PerhapsAcknowledged(sent) => Some(sent),
            _ => None,
        })
        .min()
}

fn is_dead(record: &Record, uuid: &Uuid, holds: &[&Hold]) -> bool {
    record.dead.contains(&(OWN.to_owned(), *uuid)) || holds.iter().any(|hold| hold.end == End::Rejected)
}

fn lost(record: &Record, by_event: &HashMap<Uuid, Vec<&Hold>>, found: &mut Vec<Violation>) {
    for (uuid, event) in record.events.iter().filter(|(_, event)| record.is_owed(OWN, event)) {
        let holds = by_event.get(uuid).map(Vec::as_slice).unwrap_or_default();
        if settled(holds).is_none() && !is_dead(record, uuid, holds) {
            let evidence = format!("{uuid} was never acknowledged by a consumer of {OWN}: {event:?} {holds:?}");
            found.push(Violation { rule: Rule::Lost, evidence });
        }
    }
}

/// Whoever gets an event has those ahead of it in the same claim, or they are settled.
fn order(record: &Record, by_event: &HashMap<Uuid, Vec<&Hold>>, found: &mut Vec<Violation>) {
    let mut lines: HashMap<u32, Vec<(i64, Uuid)>> = HashMap::new();
    for (uuid, event) in record.events.iter().filter(|(_, event)| record.is_owed(OWN, event)) {
        if let Some(aggregate) = event.aggregate {
            lines.entry(aggregate).or_default().push((event.id, *uuid));
        }
    }
    let none = Vec::new();
    for line in lines.values_mut() {
        line.sort_unstable();
        // What is ahead of the one that is looked at, without what was settled long ago.
        let mut ahead: Vec<(i64, Uuid)> = Vec::new();
        for (id, uuid) in line.iter() {
            for hold in by_event.get(uuid).unwrap_or(&none) {
                for (before_id, before) in &ahead {
                    let holds = by_event.get(before).unwrap_or(&none);
                    let together: HashSet<i64> = holds.iter().map(|hold| hold.token).collect();
                    let late = settled(holds).is_none_or(|sent| sent > hold.from);
                    if late && !together.contains(&hold.token) && !is_dead(record, before, holds) {
                        let evidence = format!(
                            "{uuid} (id {id}) was handed out before {before} (id {before_id}) was settled: {hold:?} and {holds:?}"
                        );
                        found.push(Violation { rule: Rule::Order, evidence });
                    }
                }
            }
            let scheduled = record.events.get(uuid).is_some_and(|event| event.due.is_some());
            if !scheduled {
                ahead.push((*id, *uuid));
            }
            // A look at the last few is enough: each of them had to wait for the one before.
            if ahead.len() > 8 {
                ahead.remove(0);
            }
        }
    }
}

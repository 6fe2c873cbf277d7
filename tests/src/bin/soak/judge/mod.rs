//! The rules, and what breaks them. Whoever judges knows the record and nothing else.

mod arrivals;
mod holds;
pub mod tampered;
#[cfg(test)]
mod tests;

use std::fmt;

use crate::record::Record;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    /// Each committed event arrives at each destination that wants it, or is a dead letter there.
    Lost,
    /// Nothing arrives that was rolled back or never published.
    Ghost,
    /// Nothing arrives where it is not wanted.
    Unwanted,
    /// Per destination and aggregate, no event comes before the one ahead of it was taken.
    Order,
    /// Without a fault, each event arrives once.
    Repeated,
    /// No scheduled event arrives before its moment.
    Early,
    /// No event is in the hands of two consumers.
    HeldTwice,
    /// What was acknowledged is not handed out again.
    AfterAck,
    /// An outage uses no attempt.
    Attempt,
    /// The extension's own events tell of each dead letter, and of no other.
    Untold,
    /// A session got an error or an answer that no fault explains.
    Answer,
}

impl Rule {
    #[cfg(test)]
    pub const ALL: [Rule; 11] = [
        Rule::Lost,
        Rule::Ghost,
        Rule::Unwanted,
        Rule::Order,
        Rule::Repeated,
        Rule::Early,
        Rule::HeldTwice,
        Rule::AfterAck,
        Rule::Attempt,
        Rule::Untold,
        Rule::Answer,
    ];
}

#[derive(Debug, Clone)]
pub struct Violation {
    pub rule: Rule,
    pub evidence: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.rule, self.evidence)
    }
}

/// The destination that the soak's own consumers serve.
pub const OWN: &str = "own";

/// How the fault of a full disk begins in the timeline.
pub const DISK_FULL: &str = "the disk is full";

/// All that is wrong.
pub fn judge(record: &Record) -> Vec<Violation> {
    let mut found = Vec::new();
    arrivals::judge(record, &mut found);
    holds::judge(record, &mut found);
    dead_letters(record, &mut found);
    found.extend(record.complaints.iter().map(|evidence| Violation { rule: Rule::Answer, evidence: evidence.clone() }));
    found
}

fn dead_letters(record: &Record, found: &mut Vec<Violation>) {
    for (destination, event) in &record.dead {
        if record.destinations.get(destination).is_some_and(|wanted| wanted.only_outages) {
            let evidence = format!("{event} is a dead letter of {destination}, which had outages only");
            found.push(Violation { rule: Rule::Attempt, evidence });
        }
    }
    // With a full disk the delivery is settled all the same, and the server's log has a warning instead of the event.
    let was_full = record.faults.iter().any(|fault| fault.what.starts_with(DISK_FULL));
    let untold = |(_, event): &&(String, uuid::Uuid)| !was_full && record.events.contains_key(event);
    for (destination, event) in record.dead.difference(&record.told_dead).filter(untold) {
        let evidence = format!("no event told of the dead letter {event} of {destination}");
        found.push(Violation { rule: Rule::Untold, evidence });
    }
    for (destination, event) in record.told_dead.difference(&record.dead) {
        if record.destinations.get(destination).is_some_and(|wanted| !wanted.removed) {
            let evidence = format!("an event told of a dead letter {event} of {destination} that there is not");
            found.push(Violation { rule: Rule::Untold, evidence });
        }
    }
}

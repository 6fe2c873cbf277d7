//! Records that were tampered with, each so that one rule is broken: a judge who passes one of them is worth nothing.

use uuid::Uuid;

use super::{DISK_FULL, OWN, Rule};
use crate::record::{Arrival, End, Fate, Hold, Record};

/// What is done to a record, and the rule that has to notice. False: the record has nothing to do it to.
pub struct Tampering {
    pub what: &'static str,
    pub rule: Rule,
    pub with: fn(&mut Record) -> bool,
}

pub const ALL: [Tampering; 15] = [
    Tampering { what: "an arrival is dropped", rule: Rule::Lost, with: drop_an_arrival },
    Tampering { what: "an acknowledgement is forgotten", rule: Rule::Lost, with: forget_an_ack },
    Tampering { what: "a commit is swallowed", rule: Rule::Ghost, with: swallow_a_commit },
    Tampering { what: "a savepoint's event arrives", rule: Rule::Ghost, with: undo_a_savepoint },
    Tampering { what: "something unknown arrives", rule: Rule::Ghost, with: something_unknown },
    Tampering { what: "something arrives elsewhere", rule: Rule::Unwanted, with: elsewhere },
    Tampering { what: "two arrivals change places", rule: Rule::Order, with: swap_two },
    Tampering { what: "two claims change places", rule: Rule::Order, with: swap_claims },
    Tampering { what: "an arrival is repeated in the calm", rule: Rule::Repeated, with: repeat },
    Tampering { what: "a scheduled event arrives early", rule: Rule::Early, with: early },
    Tampering { what: "an event is handed out twice", rule: Rule::HeldTwice, with: hold_twice },
    Tampering { what: "a settled event is handed out", rule: Rule::AfterAck, with: after_ack },
    Tampering { what: "an outage makes a dead letter", rule: Rule::Attempt, with: use_an_attempt },
    Tampering { what: "nobody tells of a dead letter", rule: Rule::Untold, with: untold },
    Tampering { what: "a session gets a strange error", rule: Rule::Answer, with: strange_error },
];

/// A destination and an event that arrived there once, and had to.
fn some_arrival(record: &Record, suits: impl Fn(&str, &Arrival) -> bool) -> Option<(String, usize)> {
    record.arrivals.iter().find_map(|(destination, arrivals)| {
        let at = arrivals.iter().position(|arrival| {
            let owed = record.events.get(&arrival.event).is_some_and(|event| record.is_owed(destination, event));
            let once = || arrivals.iter().filter(|other| other.event == arrival.event).count() == 1;
            owed && arrival.accepted && suits(destination, arrival) && once()
        })?;
        Some((destination.clone(), at))
    })
}

fn drop_an_arrival(record: &mut Record) -> bool {
    let Some((destination, at)) = some_arrival(record, |_, _| true) else { return false };
    record.arrivals.get_mut(&destination).is_some_and(|arrivals| {
        arrivals.remove(at);
        true
    })
}

fn forget_an_ack(record: &mut Record) -> bool {
    let is_ack = |hold: &Hold| matches!(hold.end, End::Acknowledged { .. });
    let Some(event) = record.holds.iter().find(|hold| is_ack(hold)).map(|hold| hold.event) else { return false };
    record.holds.iter_mut().filter(|hold| hold.event == event).for_each(|hold| hold.end = End::Returned);
    true
}

fn swallow_a_commit(record: &mut Record) -> bool {
    let Some((destination, at)) = some_arrival(record, |_, _| true) else { return false };
    let Some(event) = record.arrivals[&destination].get(at).map(|arrival| arrival.event) else { return false };
    let transaction = record.events[&event].transaction;
    record.transactions.get_mut(&transaction).is_some_and(|transaction| {
        transaction.fate = Fate::RolledBack;
        true
    })
}

fn undo_a_savepoint(record: &mut Record) -> bool {
    let Some((destination, at)) = some_arrival(record, |_, _| true) else { return false };
    let event = record.arrivals[&destination][at].event;
    record.events.get_mut(&event).is_some_and(|event| {
        event.undone = true;
        true
    })
}

fn something_unknown(record: &mut Record) -> bool {
    let Some((destination, at)) = some_arrival(record, |_, _| true) else { return false };
    record.arrivals.get_mut(&destination).is_some_and(|arrivals| {
        let arrival = Arrival { event: Uuid::from_u64_pair(1, 2), ..arrivals[at].clone() };
        arrivals.push(arrival);
        true
    })
}

fn elsewhere(record: &mut Record) -> bool {
    let Some((to, _)) = record.destinations.iter().find(|(_, wanted)| wanted.tenant.is_some()) else { return false };
    let to = to.clone();
    let stranger = some_arrival(record, |_, arrival| {
        record.events.get(&arrival.event).is_some_and(|event| !record.wants(&to, event))
    });
    let Some((destination, at)) = stranger else { return false };
    let arrival = record.arrivals[&destination][at].clone();
    record.arrivals.entry(to).or_default().push(arrival);
    true
}

fn swap_two(record: &mut Record) -> bool {
    let found = record.arrivals.iter().find_map(|(destination, arrivals)| {
        let follows = |n: usize, m: usize| {
            let (one, other) = (record.events.get(&arrivals[n].event)?, record.events.get(&arrivals[m].event)?);
            let alike = one.aggregate.is_some() && one.aggregate == other.aggregate && one.id < other.id;
            let plain = one.due.is_none() && other.due.is_none();
            let once = [n, m].iter().all(|k| arrivals.iter().filter(|a| a.event == arrivals[*k].event).count() == 1);
            let taken = arrivals[n].accepted && arrivals[m].accepted && arrivals[n].at < arrivals[m].at;
            (alike && plain && taken && once).then_some(())
        };
        let most = arrivals.len().min(400);
        let pair = (0..most).find_map(|n| (n + 1..most).find(|m| follows(n, *m).is_some()).map(|m| (n, m)))?;
        Some((destination.clone(), pair))
    });
    let Some((destination, (n, m))) = found else { return false };
    record.arrivals.get_mut(&destination).is_some_and(|arrivals| {
        let (first, second) = (arrivals[n].at, arrivals[m].at);
        (arrivals[n].at, arrivals[m].at) = (second, first);
        true
    })
}

/// The first event of a line seems to be acknowledged only after the second was handed out.
fn swap_claims(record: &mut Record) -> bool {
    let pair = record.holds.iter().find_map(|later| {
        let second = record.events.get(&later.event)?;
        let first = record.holds.iter().find(|earlier| {
            earlier.token != later.token
                && matches!(earlier.end, End::Acknowledged { .. })
                && record.events.get(&earlier.event).is_some_and(|first| {
                    first.aggregate.is_some()
                        && first.aggregate == second.aggregate
                        && first.id < second.id
                        && first.due.is_none()
                        && record.is_owed(OWN, first)
                        && record.is_owed(OWN, second)
                })
        })?;
        let together = |hold: &Hold| hold.event == first.event && hold.token == later.token;
        if record.holds.iter().any(together) {
            return None;
        }
        // Only the last few of a line are looked at.
        let between =
            record.events.values().filter(|event| event.aggregate == second.aggregate && event.id < second.id);
        let near = between.filter(|event| record.events[&first.event].id < event.id).count() < 3;
        near.then_some((first.event, later.from))
    });
    let Some((event, from)) = pair else { return false };
    for hold in record.holds.iter_mut().filter(|hold| hold.event == event) {
        hold.end = End::Acknowledged { sent: from + 1, answered: from + 2 };
    }
    true
}

fn repeat(record: &mut Record) -> bool {
    let Some(calm) = record.calm_since else { return false };
    let in_calm = |_: &str, arrival: &Arrival| {
        let event = record.events.get(&arrival.event);
        event.is_some_and(|e| record.transactions.get(&e.transaction).is_some_and(|t| t.began >= calm))
    };
    let Some((destination, at)) = some_arrival(record, in_calm) else { return false };
    record.arrivals.get_mut(&destination).is_some_and(|arrivals| {
        let again = arrivals[at].clone();
        arrivals.push(again);
        true
    })
}

fn early(record: &mut Record) -> bool {
    let scheduled = some_arrival(record, |_, arrival| record.events[&arrival.event].due.is_some());
    let Some((destination, at)) = scheduled else { return false };
    let event = record.arrivals[&destination][at].event;
    let arrived = record.arrivals[&destination][at].at;
    record.events.get_mut(&event).is_some_and(|event| {
        event.due = Some(arrived + 1000);
        true
    })
}

fn hold_twice(record: &mut Record) -> bool {
    let Some(mut again) = record.holds.iter().find(|hold| hold.until > hold.from).cloned() else { return false };
    again.token += 1_000_000;
    record.holds.push(again);
    true
}

fn after_ack(record: &mut Record) -> bool {
    let settled = record.holds.iter().find_map(|hold| match hold.end {
        End::Acknowledged { answered, .. } => Some((hold.clone(), answered)),
        _ => None,
    });
    let Some((hold, answered)) = settled else { return false };
    let moment = answered + 1_000_000;
    record.holds.push(Hold { asked: moment, from: moment, until: moment, token: hold.token + 1_000_000, ..hold });
    true
}

fn use_an_attempt(record: &mut Record) -> bool {
    let outages = |destination: &str| record.destinations.get(destination).is_some_and(|wanted| wanted.only_outages);
    let Some((destination, at)) = some_arrival(record, |destination, _| outages(destination)) else { return false };
    let event = record.arrivals[&destination][at].event;
    record.dead.insert((destination.clone(), event));
    record.told_dead.insert((destination, event));
    true
}

fn untold(record: &mut Record) -> bool {
    let Some((destination, at)) = some_arrival(record, |_, _| true) else { return false };
    let event = record.arrivals[&destination][at].event;
    record.dead.insert((destination, event));
    record.faults.retain(|fault| !fault.what.starts_with(DISK_FULL));
    true
}

fn strange_error(record: &mut Record) -> bool {
    record.complaints.push("a tuple was concurrently updated".into());
    true
}

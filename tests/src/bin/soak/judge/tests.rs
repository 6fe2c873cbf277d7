//! The judge passes a good record, and none that was tampered with.

use std::collections::BTreeSet;

use uuid::Uuid;

use super::tampered::ALL;
use super::{OWN, Rule, judge};
use crate::record::{Arrival, End, Event, Fate, Hold, Record, Transaction, Wanted};

/// Two events of one aggregate, a scheduled one, one of a tenant, one in the calm, and one that was rolled back.
fn good() -> Record {
    let mut record = Record { calm_since: Some(5_000), ..Record::default() };
    let wanted = Wanted { types: "", tenant: None, since: 0, removed: false, only_outages: true };
    record.destinations.insert("mq".into(), wanted.clone());
    record.destinations.insert("acme".into(), Wanted { tenant: Some("acme"), ..wanted.clone() });
    record.destinations.insert(OWN.into(), wanted);
    for number in 1..=6_u64 {
        let fate = if number == 6 { Fate::RolledBack } else { Fate::Committed };
        let began = if number == 5 { 5_000 } else { 1_000 + number as i64 };
        record.transactions.insert(number, Transaction { fate, began });
        let event = Event {
            id: number as i64,
            transaction: number,
            kind: "order.created",
            tenant: (number == 4).then_some("acme"),
            aggregate: (number < 3).then_some(7),
            due: (number == 3).then_some(2_000),
            undone: false,
        };
        let uuid = Uuid::from_u64_pair(0, number);
        record.events.insert(uuid, event);
        if fate == Fate::Committed {
            let at = began.max(2_000) + 100 * number as i64;
            let arrival = Arrival { at, event: uuid, accepted: true, redelivered: false };
            record.arrivals.entry("mq".into()).or_default().push(arrival.clone());
            if number == 4 {
                record.arrivals.entry("acme".into()).or_default().push(arrival);
            }
            record.holds.push(Hold {
                event: uuid,
                token: number as i64,
                asked: at,
                from: at + 1,
                until: at + 50,
                end: End::Acknowledged { sent: at + 50, answered: at + 60 },
            });
        }
    }
    record
}

#[test]
fn a_good_record_passes() {
    let found = judge(&good());
    assert!(found.is_empty(), "{found:?}");
}

#[test]
fn each_rule_notices_what_breaks_it() {
    for tampering in &ALL {
        let mut record = good();
        assert!((tampering.with)(&mut record), "{}: nothing to tamper with", tampering.what);
        let found: BTreeSet<Rule> = judge(&record).iter().map(|violation| violation.rule).collect();
        assert!(found.contains(&tampering.rule), "{}: {found:?}", tampering.what);
    }
}

#[test]
fn each_rule_is_tried() {
    for rule in Rule::ALL {
        assert!(ALL.iter().any(|tampering| tampering.rule == rule), "{rule:?}");
    }
}

#[test]
fn a_repeat_after_a_fault_is_no_violation() {
    let mut record = good();
    let arrivals = record.arrivals.get_mut("mq").expect("arrivals");
    let again = Arrival { at: 4_900, ..arrivals[0].clone() };
    arrivals.push(again);
    assert!(judge(&record).is_empty());
}

#[test]
fn a_dead_letter_lets_those_behind_it_pass() {
    let mut record = good();
    record.destinations.get_mut("mq").expect("mq").only_outages = false;
    record.arrivals.get_mut("mq").expect("arrivals")[0].accepted = false;
    assert_eq!(judge(&record).len(), 1);
    let dead = ("mq".to_owned(), Uuid::from_u64_pair(0, 1));
    record.dead.insert(dead.clone());
    record.told_dead.insert(dead);
    assert!(judge(&record).is_empty());
}

//! A relay is killed while it holds events; another one is attached.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use anyhow::{Result, ensure};
use outbox_tests::receiver::Reply;
use outbox_tests::relay::Relay;
use outbox_tests::trace::now_us;
use outbox_tests::wait::{self, LONG};
use uuid::Uuid;

use crate::journal::Journal;
use crate::show::{duration, heading, say};
use crate::stage::Stage;

const EVENTS: i32 = 500;
const AGGREGATES: i32 = 50;

/// Long enough for the relay to hold a good number of events when it dies.
const ANSWER_AFTER: Duration = Duration::from_millis(30);

/// It must hold at least this many when it is killed.
const HELD: usize = 50;

pub async fn play(stage: &mut Stage) -> Result<()> {
    heading("3. A relay is killed (SIGKILL) in the middle; another one is attached");
    stage.webhook.reply(Reply::After(ANSWER_AFTER, Box::new(Reply::Accept)));
    let events = stage.publish_in_one_transaction("cart.changed", EVENTS, AGGREGATES).await?;
    let ids: Vec<Uuid> = events.iter().map(|(id, _)| *id).collect();
    say(&format!(
        "{EVENTS} events of {AGGREGATES} aggregates in one transaction; the webhook takes {ANSWER_AFTER:?} each."
    ));
    let victim = wait::until("a relay to hold many events", LONG, async || {
        Ok(stage.relays.iter().position(|relay| held(relay).len() >= HELD))
    });
    let victim = stage.relays.swap_remove(victim.await?);
    let killed = now_us();
    victim.kill().await?;
    let lost = held(&victim);
    stage.past_trace.add(&victim);
    say(&format!("killed a relay that held {} of them, unsettled.", lost.len()));
    stage.arrived(&ids, LONG).await?;
    stage.processed(&ids).await?;
    stage.webhook.reply(Reply::Accept);
    let again = claimed_since(&stage.relays, killed, &lost);
    ensure!(!again.is_empty(), "no event of the dead relay was claimed again");
    let since = |at: i64| duration(Duration::from_micros(u64::try_from(at - killed).unwrap_or(0)));
    if let (Some(first), Some(last)) = (again.values().min(), again.values().max()) {
        say(&format!("the other relay claimed {} of them again (the rest had just been settled),", again.len()));
        say(&format!("the first {} after the kill, the last {}.", since(*first), since(*last)));
    }
    summary(&stage.journal, &ids)?;
    in_order(&stage.journal, &events)?;
    say(&format!("in the order of id within each of the {AGGREGATES} aggregates, at both."));
    Ok(())
}

/// Which of the events these relays claimed after a moment, and when.
fn claimed_since(relays: &[Relay], since: i64, events: &HashSet<Uuid>) -> HashMap<Uuid, i64> {
    let mut claimed = HashMap::new();
    for line in relays.iter().flat_map(Relay::events) {
        let id = line["event_id"].as_str().and_then(|id| id.parse().ok());
        let (Some(id), Some("claimed"), Some(at)) = (id, line["step"].as_str(), line["at_us"].as_i64()) else {
            continue;
        };
        if at >= since && events.contains(&id) {
            claimed.entry(id).or_insert(at);
        }
    }
    claimed
}

/// What it claimed and has not settled.
fn held(relay: &Relay) -> HashSet<Uuid> {
    let mut held = HashSet::new();
    for line in relay.events() {
        let Some(id) = line["event_id"].as_str().and_then(|id| id.parse().ok()) else { continue };
        match line["step"].as_str() {
            Some("claimed") => _ = held.insert(id),
            Some("settled") => _ = held.remove(&id),
            _ => {}
        }
    }
    held
}

fn summary(journal: &Journal, ids: &[Uuid]) -> Result<()> {
    let count = |times: &dyn Fn(&Uuid) -> usize| {
        let each: Vec<usize> = ids.iter().map(times).collect();
        (each.iter().filter(|n| **n > 0).count(), each.iter().sum::<usize>())
    };
    for (place, (there, in_all)) in [
        ("queue", count(&|id| journal.queue_times(id).len())),
        ("webhook", count(&|id| journal.webhook_times(id).len())),
    ] {
        say(&format!(
            "at the {place:<8} {there} of {} arrived, {} of them twice (at least once is the promise)",
            ids.len(),
            in_all - there
        ));
        ensure!(there == ids.len(), "events are missing at the {place}");
    }
    Ok(())
}

/// The first arrivals of each aggregate's events follow their ids.
fn in_order(journal: &Journal, events: &[(Uuid, String)]) -> Result<()> {
    for times in [Journal::queue_times, Journal::webhook_times] {
        let mut latest: HashMap<&str, i64> = HashMap::new();
        for (id, aggregate) in events {
            let at = times(journal, id).into_iter().min().unwrap_or(i64::MAX);
            let before = latest.insert(aggregate, at);
            ensure!(before.is_none_or(|before| before <= at), "aggregate {aggregate} is out of order");
        }
    }
    Ok(())
}

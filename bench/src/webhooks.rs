//! 50 webhooks that take their time, each with a fiftieth of the events.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context, Result};
use outbox_tests::receiver::{Received, Receiver, Reply};
use outbox_tests::relay::Relay;
use outbox_tests::trace::{Micros, micros};
use outbox_tests::wait::{self, LONG};
use serde_json::json;
use uuid::Uuid;

use crate::load::{Sent, paced, producers};
use crate::sample::{percentile, percentiles, sorted};
use crate::sheet::{Must, Sheet};
use crate::stage::Outbox;

const WEBHOOKS: usize = 50;
const ANSWER_AFTER: Duration = Duration::from_millis(20);
const RATE: usize = 500;
const SESSIONS: usize = 16;
const SECONDS: usize = 60;

/// What comes before is warm-up: connections are made then.
const WARM_UP: f64 = 0.1;

pub async fn run(sheet: &mut Sheet) -> Result<()> {
    let outbox = Outbox::start(&[]).await?;
    let receiver = Receiver::start()?;
    receiver.reply(Reply::After(ANSWER_AFTER, Box::new(Reply::Accept)));
    let types: Vec<String> = (1..=WEBHOOKS).map(|number| format!("webhook.{number}")).collect();
    for name in &types {
        let add = "SELECT outbox.add_webhook($1, $2, ARRAY[$1])";
        outbox.session.execute(add, &[name, &receiver.url(name)]).await?;
    }
    let relay = Relay::start(&outbox.cluster, &outbox.database, None).await?;
    let producers = producers(&outbox, "outbox_events", SESSIONS).await?;
    let time = Duration::from_secs(sheet.turns(SECONDS) as u64);
    let sent = paced(producers, &types, RATE, time).await?.at_least(RATE)?.sent;
    let look = async || Ok((receiver.count() >= sent.len()).then_some(()));
    wait::until("all requests", LONG, look).await?;
    outbox.settled().await?;
    report(sheet, &sent, &receiver.received())?;
    let status = relay.terminate(LONG).await?;
    anyhow::ensure!(status.success(), "the relay ended with {status}: {}", relay.log());
    Ok(())
}

fn report(sheet: &mut Sheet, sent: &[Sent], received: &[Received]) -> Result<()> {
    let mut arrivals: HashMap<Uuid, Micros> = HashMap::new();
    for request in received {
        let at = micros(request.at);
        arrivals.entry(request.event_id()?).and_modify(|first| *first = at.min(*first)).or_insert(at);
    }
    let lag = |sent: &Sent| Some((arrivals.get(&sent.event_id)? - sent.at) as f64 / 1000.0);
    let lags: Vec<f64> = sent.iter().filter_map(lag).collect();
    let measured = lags.get((lags.len() as f64 * WARM_UP) as usize..).context("nothing arrived")?;
    let (first, last) = (&measured[..measured.len() / 3], &measured[measured.len() * 2 / 3..]);
    sheet.raw(
        "lag, ms",
        json!({ "all": percentiles(measured), "first": percentiles(first), "last": percentiles(last) }),
    )?;
    sheet.raw("requests", json!({ "events": sent.len(), "requests": received.len() }))?;
    let p95 = |values: &[f64]| percentile(&sorted(values), 95.0).context("nothing arrived");
    sheet.figure("delivered, of all events", lags.len() as f64 / sent.len() as f64, "", Must::AtLeast(1.0));
    sheet.figure("lag p95, last third of first third", p95(last)? / p95(first)?, "x", Must::AtMost(1.2));
    sheet.figure("lag p95, commit to request", p95(measured)?, "ms", Must::Nothing);
    Ok(())
}

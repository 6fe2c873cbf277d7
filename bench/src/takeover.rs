//! A relay that holds 1,000 events is killed while another one is attached.

use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use outbox_tests::receiver::{Receiver, Reply};
use outbox_tests::relay::Relay;
use outbox_tests::wait::LONG;

use crate::sample::Spread;
use crate::sheet::{Must, Sheet};
use crate::stage::Outbox;

const EVENTS: usize = 1000;
const TURNS: usize = 7;

pub async fn run(sheet: &mut Sheet) -> Result<()> {
    let outbox = Outbox::start(&[]).await?;
    let receiver = Receiver::start()?;
    let settings = serde_json::json!({ "concurrency": EVENTS });
    let add = "SELECT outbox.add_webhook('receiver', $1, settings => $2)";
    outbox.session.execute(add, &[&receiver.url("/"), &settings]).await?;
    let heir = relay(&outbox).await?;
    let (mut takeovers, mut deliveries, mut more) = (Vec::new(), Vec::new(), Vec::new());
    for turn in 0..=sheet.turns(TURNS) {
        let takeover = take_over(&outbox, &receiver, &heir).await?;
        let delivery = deliver(&outbox, &receiver).await?;
        if turn > 0 {
            takeovers.push(takeover);
            deliveries.push(delivery);
            more.push(takeover - delivery);
        }
    }
    sheet.raw("takeover, ms", &takeovers)?;
    sheet.raw("delivery, ms", &deliveries)?;
    sheet.spread("kill to last, more than delivering takes", Spread::of(&more), "ms", Must::AtMost(100.0))?;
    sheet.spread("delivering 1,000", Spread::of(&deliveries), "ms", Must::Nothing)
}

async fn relay(outbox: &Outbox) -> Result<Relay> {
    Relay::start(&outbox.cluster, &outbox.database, None).await
}

/// Milliseconds from the kill of the relay that holds all events to the last one's arrival from the other.
async fn take_over(outbox: &Outbox, receiver: &Receiver, heir: &Relay) -> Result<f64> {
    heir.signal(Signal::SIGSTOP);
    let holder = relay(outbox).await?;
    receiver.reply(Reply::Never);
    let before = receiver.count();
    outbox.fill(EVENTS, 200, "NULL").await?;
    receiver.wait_for(before + EVENTS, LONG).await.context("the relay that is to be killed holds too few")?;
    heir.signal(Signal::SIGCONT);
    // It has read all that was meant for both, and is idle, when it answers and a moment has passed.
    heir.ready().await?;
    tokio::time::sleep(Duration::from_millis(300)).await;
    receiver.reply(Reply::Accept);
    let killed = SystemTime::now();
    holder.kill().await?;
    last_arrival(outbox, receiver, before + 2 * EVENTS, killed).await
}

/// Milliseconds from the commit of as many events to the last one's arrival.
async fn deliver(outbox: &Outbox, receiver: &Receiver) -> Result<f64> {
    let before = receiver.count();
    outbox.fill(EVENTS, 200, "NULL").await?;
    last_arrival(outbox, receiver, before + EVENTS, SystemTime::now()).await
}

async fn last_arrival(outbox: &Outbox, receiver: &Receiver, count: usize, since: SystemTime) -> Result<f64> {
    let received = receiver.wait_for(count, LONG).await?;
    let last = received.iter().map(|request| request.at).max().context("nothing arrived")?;
    outbox.settled().await?;
    Ok(last.duration_since(since)?.as_secs_f64() * 1000.0)
}

//! What comes to the queues of RabbitMQ.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use outbox_tests::queue::Message;
use outbox_tests::trace::micros;
use outbox_tests::wait::LONG;

use crate::record::Arrival;
use crate::stage::Stage;

/// Notes what arrives, over as many connections as it takes.
pub async fn watch(stage: Arc<Stage>, queue: &'static str, destination: &'static str) {
    loop {
        let _over = consume(&stage, queue, destination).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn consume(stage: &Stage, name: &str, destination: &str) -> Result<()> {
    let mut queue = tokio::time::timeout(LONG, async { stage.broker.channel().await?.consume(name).await }).await??;
    loop {
        match queue.next(Duration::from_secs(1)).await {
            Ok(message) => note(stage, destination, &message)?,
            Err(error) if error.to_string().starts_with("no message") && queue.is_open() => {}
            Err(error) => return Err(error),
        }
    }
}

fn note(stage: &Stage, destination: &str, message: &Message) -> Result<()> {
    let event = message.event_id()?;
    if destination == "ops" {
        if message.kind.as_deref() == Some("outbox.event.dead") {
            let data = message.json()?;
            let of = data["destination"].as_str().context("no destination")?.to_owned();
            let dead = data["event_id"].as_str().context("no event_id")?.parse()?;
            stage.record.lock().told_dead.insert((of, dead));
        }
        return Ok(());
    }
    let at = micros(message.at);
    stage.record.arrived(destination, Arrival { at, event, accepted: true, redelivered: message.redelivered });
    Ok(())
}

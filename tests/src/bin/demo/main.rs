//! The main job on real servers, for someone who has never seen it. Every figure is measured in this very run.
//!
//! Each act is a file section below: single events, many events beside a dead webhook, a relay that is killed, the dead
//! webhook's return, statistics, silence. The exit code is 0 only if every event arrived everywhere.

mod journal;
mod show;
mod silence;
mod stage;
mod takeover;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use outbox_tests::wait::LONG;

use crate::show::{heading, per_event, say, steps_table};
use crate::stage::Stage;

const KINDS: [&str; 5] = ["contact.created", "contact.updated", "order.placed", "order.paid", "user.signed_up"];
const SINGLES: usize = 10;
const MANY: usize = 300;
const SESSIONS: usize = 4;

#[tokio::main]
async fn main() -> ExitCode {
    match play().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("\nFAILED: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn play() -> Result<()> {
    println!("pg_outbox: from a commit in PostgreSQL to RabbitMQ and a signed webhook\n");
    let mut stage = Stage::set().await?;
    singles(&mut stage).await?;
    many(&mut stage).await?;
    takeover::play(&mut stage).await?;
    the_dead_return(&mut stage).await?;
    statistics(&stage).await?;
    silence::play(&stage).await?;
    stage.close().await?;
    println!(
        "\nAll {} events arrived, each at the queue, at the webhook and at whom it was for.",
        stage.journal.published().len()
    );
    Ok(())
}

async fn singles(stage: &mut Stage) -> Result<()> {
    heading(&format!("1. {SINGLES} events, one at a time, on an idle system"));
    say("Milliseconds since COMMIT was sent, on one clock. 'notified' is the NOTIFY, as");
    say("a session of this program hears it; 'confirmed' and '2xx' are the answers of");
    say("RabbitMQ and of the webhook; 'processed' is the answer to the settlement.\n");
    let mut ids = Vec::new();
    for number in 0..SINGLES {
        let kind = KINDS[number % KINDS.len()];
        let id = stage.publish(kind, number).await?;
        stage.arrived(&[id], LONG).await?;
        ids.push(id);
    }
    stage.processed(&ids).await?;
    show::singles_table(&stage.journal.timelines(&ids, &stage.trace()));
    Ok(())
}

async fn many(stage: &mut Stage) -> Result<()> {
    heading(&format!("2. {MANY} events from {SESSIONS} sessions, and a webhook that is dead"));
    say("A second webhook, 'dead', wants order.* too, but nothing listens at its port.");
    say("Nothing else notices: it has its own attempts, and its own circuit breaker.\n");
    stage.add_dead_webhook("order.*").await?;
    let ids = stage.publish_many(MANY, SESSIONS).await?;
    stage.arrived(&ids, LONG).await?;
    stage.processed_but_for_the_dead(&ids).await?;
    let timelines = stage.journal.timelines(&ids, &stage.trace());
    steps_table(&timelines);
    per_event(&timelines);
    let (waiting, state) = stage.dead_webhook().await?;
    println!("\n   destination 'dead': {waiting} deliveries wait, circuit {state}");
    if waiting == 0 {
        bail!("the dead webhook's deliveries are not waiting");
    }
    Ok(())
}

async fn the_dead_return(stage: &mut Stage) -> Result<()> {
    heading("4. The dead webhook comes back");
    let (waiting, _) = stage.dead_webhook().await?;
    let (took, count) = stage.revive_dead_webhook().await?;
    say(&format!("outbox.resume('dead'): {waiting} waited, {count} arrived within {}", show::duration(took)));
    Ok(())
}

async fn statistics(stage: &Stage) -> Result<()> {
    heading("5. SELECT * FROM outbox.stats()");
    let session = stage.cluster.connect(&stage.database).await?;
    let all_settled = "SELECT pending + processing + failed = 0 FROM outbox.stats()";
    session.until(all_settled, Duration::from_secs(10)).await?;
    for (name, value) in stage.statistics(&session).await? {
        say(&format!("{name:<20} {value}"));
    }
    Ok(())
}

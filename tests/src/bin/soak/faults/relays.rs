//! Relays: killed, ended, and stopped for longer than a lease.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use outbox_tests::wait::LONG;

use crate::random::Random;
use crate::stage::{RELAYS, Stage};

pub async fn lane(stage: Arc<Stage>, mut random: Random) -> Result<()> {
    while stage.is_storming() {
        stage.pause(random.millis(2_000, 9_000)).await;
        if stage.is_storming() {
            one(&stage, &mut random).await?;
        }
    }
    Ok(())
}

async fn one(stage: &Stage, random: &mut Random) -> Result<()> {
    let number = random.below(RELAYS as u64) as usize;
    let time = random.millis(300, 9_000);
    let what = random.below(100);
    let fault = match what {
        0..40 => stage.fault(format!("kill relay {number}, which is away for {time:?}")),
        40..75 => stage.fault(format!("stop relay {number} for {time:?}")),
        _ => stage.fault(format!("end relay {number}, which is away for {time:?}")),
    };
    if (40..75).contains(&what) {
        let relay = stage.relays[number].lock().await;
        let relay = relay.as_ref().context("no relay")?;
        relay.signal(Signal::SIGSTOP);
        tokio::time::sleep(time).await;
        relay.signal(Signal::SIGCONT);
    } else {
        let relay = stage.relays[number].lock().await.take().context("no relay")?;
        if what < 40 {
            relay.kill().await?;
        } else {
            let status = relay.terminate(LONG).await?;
            ensure!(status.success(), "relay {number} ended with {status} on SIGTERM:\n{}", relay.log());
        }
        look_through(stage, number, &relay.lines());
        tokio::time::sleep(time).await;
        drop(stage.start_relay(number).await?);
    }
    stage.healed(fault);
    Ok(())
}

/// No relay may say that something is wrong with itself. The client of RabbitMQ says so of each connection that it loses.
pub fn look_through(stage: &Stage, number: usize, lines: &[String]) {
    let wrong = |line: &&String| {
        line.contains("panicked") || line.contains("\"level\":\"ERROR\"") && !line.contains("\"target\":\"lapin::")
    };
    for line in lines.iter().filter(wrong) {
        stage.record.complain(format!("relay {number}: {line}"));
    }
}

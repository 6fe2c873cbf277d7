//! PostgreSQL: its processes killed, stopped and ended, and the server as a whole.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use outbox_tests::cluster::Stop;
use outbox_tests::process::Account;
use outbox_tests::session::Session;
use outbox_tests::wait::{self, LONG};

use crate::judge::DISK_FULL;
use crate::logs::Cause;
use crate::random::Random;
use crate::stage::Stage;

/// A process of the server, chosen at random among those that the query finds.
const WORKER: &str = "backend_type LIKE 'pg_outbox worker%' AND datname = current_database()";
const LAUNCHER: &str = "backend_type LIKE 'pg_outbox launcher%'";
const SESSION: &str = "backend_type = 'client backend' AND datname = current_database() AND pid <> pg_backend_pid()";
const RELAY: &str = "backend_type = 'client backend' AND application_name LIKE 'outbox-relay%'";

pub async fn lane(stage: Arc<Stage>, mut random: Random) -> Result<()> {
    while stage.is_storming() {
        stage.pause(random.millis(4_000, 14_000)).await;
        if stage.is_storming() {
            one(&stage, &mut random).await?;
        }
    }
    Ok(())
}

async fn one(stage: &Stage, random: &mut Random) -> Result<()> {
    match random.below(100) {
        0..12 => ask(stage, random, "worker", WORKER, "terminate").await,
        12..18 => ask(stage, random, "launcher", LAUNCHER, "terminate").await,
        18..30 => ask(stage, random, "session", SESSION, "terminate").await,
        30..38 => ask(stage, random, "session", SESSION, "cancel").await,
        38..46 => stop(stage, random, "worker", WORKER).await,
        46..50 => stop(stage, random, "launcher", LAUNCHER).await,
        50..60 => stop(stage, random, "relay's backend", RELAY).await,
        60..68 => kill(stage, random, "session", SESSION).await,
        68..74 => kill(stage, random, "worker", WORKER).await,
        74..78 => kill(stage, random, "launcher", LAUNCHER).await,
        78..83 => restart(stage, random, Stop::Immediate).await,
        83..88 => restart(stage, random, Stop::Crash).await,
        88..91 => stage.explained(Cause::Standby, promote(stage, random)).await,
        91..97 => stage.explained(Cause::DiskFull, full(stage, random)).await,
        _ => restart(stage, random, Stop::Fast).await,
    }
}

async fn admin(stage: &Stage) -> Result<Session> {
    stage.session().await
}

async fn choose(session: &Session, random: &mut Random, which: &str) -> Result<Option<i32>> {
    let rows = session.query(&format!("SELECT pid FROM pg_stat_activity WHERE {which} ORDER BY pid"), &[]).await?;
    let pids: Vec<i32> = rows.iter().map(|row| row.get(0)).collect();
    Ok(random.one_of(&pids).copied())
}

/// `pg_terminate_backend` or `pg_cancel_backend`.
async fn ask(stage: &Stage, random: &mut Random, name: &str, which: &str, how: &str) -> Result<()> {
    let session = admin(stage).await?;
    let Some(pid) = choose(&session, random, which).await? else { return Ok(()) };
    let fault = stage.fault(format!("{how} {name} {pid}"));
    session.execute(&format!("SELECT pg_{how}_backend({pid})"), &[]).await?;
    stage.healed(fault);
    Ok(())
}

/// SIGSTOP, and SIGCONT after a while.
async fn stop(stage: &Stage, random: &mut Random, name: &str, which: &str) -> Result<()> {
    let session = admin(stage).await?;
    let Some(pid) = choose(&session, random, which).await? else { return Ok(()) };
    let time = random.millis(500, 8_000);
    let fault = stage.fault(format!("stop {name} {pid} for {time:?}"));
    if stage.cluster.signal(pid, Signal::SIGSTOP).is_ok() {
        tokio::time::sleep(time).await;
        // It may have been ended meanwhile, by a relay that restarts.
        let _gone = stage.cluster.signal(pid, Signal::SIGCONT);
    }
    stage.healed(fault);
    Ok(())
}

/// SIGKILL, after which the postmaster restarts all others.
async fn kill(stage: &Stage, random: &mut Random, name: &str, which: &str) -> Result<()> {
    let session = admin(stage).await?;
    let Some(pid) = choose(&session, random, which).await? else { return Ok(()) };
    let fault = stage.fault(format!("kill {name} {pid}, and with it all sessions"));
    // It may have ended by itself a moment ago.
    if stage.cluster.signal(pid, Signal::SIGKILL).is_ok() {
        wait::until("the server to notice", LONG, async || Ok(session.is_closed().then_some(()))).await?;
    }
    drop(admin(stage).await.context("after a crash")?);
    stage.healed(fault);
    Ok(())
}

async fn restart(stage: &Stage, random: &mut Random, how: Stop) -> Result<()> {
    let away = random.millis(0, 3_000);
    let fault = stage.fault(format!("{how:?} stop of the server, which is away for {away:?}"));
    stage.cluster.stop(how).await?;
    tokio::time::sleep(away).await;
    // The port of the dead server may be taken for an instant.
    stage.cluster.resume().await?;
    stage.healed(fault);
    tokio::time::sleep(Duration::from_millis(500)).await;
    Ok(())
}

/// The server comes back as a standby, which takes no event and hands out none, and becomes a primary after a while.
async fn promote(stage: &Stage, random: &mut Random) -> Result<()> {
    let time = random.millis(500, 4_000);
    let fault = stage.fault(format!("the server is a standby for {time:?}, and is promoted then"));
    stage.cluster.stop(if random.percent(50) { Stop::Fast } else { Stop::Crash }).await?;
    let file = stage.cluster.dir().join("data/standby.signal");
    fs::write(&file, "")?;
    Account::of_servers()?.give(&file)?;
    stage.cluster.resume().await?;
    tokio::time::sleep(time).await;
    admin(stage).await?.batch_execute("SELECT pg_promote()").await?;
    stage.healed(fault);
    Ok(())
}

/// Nothing fits on the disk of the database's tables any more.
async fn full(stage: &Stage, random: &mut Random) -> Result<()> {
    let Some(disk) = &stage.disk else { return Ok(()) };
    let time = random.millis(1_000, 8_000);
    let fault = stage.fault(format!("{DISK_FULL} for {time:?}"));
    disk.fill()?;
    tokio::time::sleep(time).await;
    disk.empty()?;
    stage.healed(fault);
    Ok(())
}

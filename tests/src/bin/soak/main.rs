//! Random faults under load on private servers, judged by a record that no database keeps. docs/soak.md says what is done
//! and what has to hold.
//!
//! Rounds of some minutes: a storm of faults under load, then a minute in which everything has to settle, then a load
//! without faults, then the judgment.

mod faults;
mod judge;
mod load;
mod logs;
mod queues;
mod random;
mod receiver;
mod record;
mod settle;
mod show;
mod small;
mod stage;
mod trouble;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use outbox_tests::scratch;
use outbox_tests::trace::now_us;
use tokio::task::JoinSet;

use crate::judge::judge;
use crate::judge::tampered::ALL;
use crate::load::consumer::{CONSUMERS, Consumer};
use crate::load::{CALM, Publisher};
use crate::show::say;
use crate::stage::Stage;

/// The storm of one round.
const ROUND: Duration = Duration::from_secs(240);
const PUBLISHERS: u32 = 6;

struct Arguments {
    time: Duration,
    seed: u64,
}

fn main() -> ExitCode {
    small::enter();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    runtime.block_on(run())
}

async fn run() -> ExitCode {
    let arguments = match arguments() {
        Ok(arguments) => arguments,
        Err(error) => {
            eprintln!("{error:#}\nusage: soak [--hours H | --minutes M] [--seed N]");
            return ExitCode::from(64);
        }
    };
    let seed = arguments.seed;
    println!("seed {seed}; SEED={seed} does the same again\n");
    show::begin();
    match soak(&arguments).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("\nFAILED with seed {seed}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn arguments() -> Result<Arguments> {
    let (mut time, mut seed) = (Duration::from_secs(3600), None);
    let mut given = std::env::args().skip(1);
    while let Some(name) = given.next() {
        let value = given.next().with_context(|| format!("{name} needs a value"))?;
        let number = || {
            value
                .parse::<f64>()
                .ok()
                .filter(|n| *n > 0.0 && *n < 1e5)
                .with_context(|| format!("{name} {value}: not a number that makes sense"))
        };
        match name.as_str() {
            "--hours" => time = Duration::from_secs_f64(number()? * 3600.0),
            "--minutes" => time = Duration::from_secs_f64(number()? * 60.0),
            "--seed" => seed = Some(value.parse().with_context(|| format!("{name} {value}: not a whole number"))?),
            _ => bail!("unknown argument {name}"),
        }
    }
    let seed = seed.map_or_else(|| Ok::<_, anyhow::Error>(u64::from_str_radix(&scratch::random_hex(5)?, 16)?), Ok)?;
    Ok(Arguments { time, seed })
}

async fn soak(arguments: &Arguments) -> Result<()> {
    let stage = Stage::set(arguments.seed).await?;
    say("PostgreSQL, RabbitMQ, receivers and three relays are ready");
    for (queue, destination) in [("all", "mq"), ("acme", "acme"), ("ops", "ops")] {
        tokio::spawn(queues::watch(stage.clone(), queue, destination));
    }
    let rounds = arguments.time.as_secs_f64() / ROUND.as_secs_f64();
    let rounds = rounds.ceil().max(1.0) as u32;
    let mut log = 0;
    for number in 1..=rounds {
        say(&format!("round {number} of {rounds}"));
        let done = tokio::select! {
            done = round(&stage, u64::from(number), arguments.time / rounds, &mut log) => done,
            _ = tokio::signal::ctrl_c() => bail!("interrupted"),
        };
        if let Err(error) = done {
            show::timeline(&stage.record.lock().faults);
            return Err(error.context(format!("round {number}")));
        }
    }
    for (number, relay) in stage.relays.iter().enumerate() {
        let relay = relay.lock().await.take().context("no relay")?;
        let status = relay.terminate(outbox_tests::wait::LONG).await?;
        ensure!(status.success(), "relay {number} ended with {status} on SIGTERM");
    }
    println!("\nNothing was lost, nothing was made up, nothing came out of order.");
    Ok(())
}

async fn round(stage: &Arc<Stage>, number: u64, time: Duration, log: &mut usize) -> Result<()> {
    let set = |flag: &std::sync::atomic::AtomicBool, on| flag.store(on, Ordering::Relaxed);
    let mut consumers = JoinSet::new();
    set(&stage.consuming, true);
    for consumer in 0..CONSUMERS {
        consumers.spawn(Consumer::new(stage.clone(), number, consumer).consume());
    }
    set(&stage.storming, true);
    let mut publishers = load(stage, number, false);
    let mut lanes = faults::start(stage, number);
    let storm = tokio::time::sleep(time);
    tokio::pin!(storm);
    loop {
        tokio::select! {
            Some(ended) = lanes.join_next() => ended??,
            () = &mut storm, if stage.is_storming() => set(&stage.storming, false),
            else => break,
        }
    }
    say("the last fault is over");
    // The load goes on for a moment, so that all is tried once more without faults.
    tokio::time::sleep(Duration::from_secs(1)).await;
    end_load(stage, &mut publishers).await?;
    let took = settle::settled(stage, settle::LIMIT)
        .await
        .context("not everything settled within a minute after the last fault")?;
    say(&format!("everything is settled after {:.1} s", took.as_secs_f64()));

    stage.record.lock().calm_since = Some(now_us());
    let mut publishers = load(stage, number + 500_000, true);
    tokio::time::sleep(CALM).await;
    end_load(stage, &mut publishers).await?;
    settle::settled(stage, Duration::from_secs(20)).await.context("without a fault")?;
    set(&stage.consuming, false);
    while let Some(ended) = consumers.join_next().await {
        ended?;
    }
    for (number, relay) in stage.relays.iter().enumerate() {
        let relay = relay.lock().await;
        faults::relays::look_through(stage, number, &relay.as_ref().context("no relay")?.lines());
    }
    judgment(stage)?;
    settle::figures(stage).await?;
    faults::destinations::remove_all(stage).await?;
    settle::emptied(stage).await?;
    *log = logs::look(stage, *log)?;
    stage.record.lock().next_round();
    Ok(())
}

fn load(stage: &Arc<Stage>, number: u64, plain: bool) -> JoinSet<()> {
    stage.loading.store(true, Ordering::Relaxed);
    let mut publishers = JoinSet::new();
    // Aggregates of the calm are others.
    let first = if plain { PUBLISHERS } else { 0 };
    for publisher in first..first + PUBLISHERS {
        publishers.spawn(Publisher::new(stage.clone(), number, publisher, plain).publish());
    }
    publishers.spawn(load::prepared::decide(stage.clone()));
    publishers
}

async fn end_load(stage: &Arc<Stage>, publishers: &mut JoinSet<()>) -> Result<()> {
    stage.loading.store(false, Ordering::Relaxed);
    while let Some(ended) = publishers.join_next().await {
        ended?;
    }
    // Prepared after the decider had seen the last one.
    load::prepared::decide(stage.clone()).await;
    Ok(())
}

/// The record is judged, and then the judge: each rule has to notice a record that was tampered with.
fn judgment(stage: &Stage) -> Result<()> {
    let record = stage.record.lock().clone();
    let violations = judge(&record);
    if !violations.is_empty() {
        println!("\n{} violations:", violations.len());
        violations.iter().take(25).for_each(|violation| println!("  {violation}"));
        bail!("{} violations", violations.len());
    }
    let committed = record.events.values().filter(|event| record.is_committed(event)).count();
    let arrivals: usize = record.arrivals.values().map(Vec::len).sum();
    let (holds, dead) = (record.holds.len(), record.dead.len());
    let rolled_back = record.events.len() - committed;
    say(&format!(
        "{committed} events committed and {rolled_back} rolled back, {arrivals} arrivals, {holds} claims of single events, {dead} dead letters, {} faults: no violation",
        record.faults.len()
    ));
    ensure!(committed > 0 && arrivals >= committed && holds > 0, "nothing happened");
    let (mut tried, mut impossible) = (0, Vec::new());
    for tampering in &ALL {
        let mut tampered = record.clone();
        if !(tampering.with)(&mut tampered) {
            impossible.push(tampering.what);
            continue;
        }
        let noticed = judge(&tampered).iter().any(|violation| violation.rule == tampering.rule);
        ensure!(noticed, "the judge did not notice that {}", tampering.what);
        tried += 1;
    }
    let left_out =
        if impossible.is_empty() { String::new() } else { format!("; nothing to try here: {}", impossible.join(", ")) };
    say(&format!("the judge noticed each of {tried} records that were tampered with{left_out}"));
    Ok(())
}

//! Receivers: some have outages, others answer as they should not.

use std::sync::Arc;

use anyhow::Result;

use crate::random::Random;
use crate::receiver::{Host, Mood};
use crate::stage::Stage;

pub async fn lane(stage: Arc<Stage>, mut random: Random) -> Result<()> {
    while stage.is_storming() {
        stage.pause(random.millis(1_500, 6_000)).await;
        if stage.is_storming() {
            one(&stage, &mut random).await?;
        }
    }
    Ok(())
}

async fn one(stage: &Stage, random: &mut Random) -> Result<()> {
    let is_rough = random.percent(55);
    let (host, name) = if is_rough { (&stage.rough, "rough") } else { (&stage.outages, "hook") };
    let outage = |random: &mut Random| match random.below(6) {
        0 => Mood::Status(429, Some(1 + random.below(2))),
        1 => Mood::Status(503, None),
        2 => Mood::Status(503, Some(1)),
        3 => Mood::Status(502, None),
        4 => Mood::Status(504, None),
        _ => Mood::Slow(random.millis(50, 400)),
    };
    let mood = match random.below(8) {
        0 if is_rough => Some(Mood::Hang),
        1 | 2 if is_rough => Some(Mood::Status(500, None)),
        3 if is_rough => Some(Mood::Garbage),
        4 if is_rough => Some(Mood::Close),
        0 | 1 => None,
        _ => Some(outage(random)),
    };
    let time = random.millis(200, 5_000);
    let what = mood.map_or_else(|| "refuses connections".to_owned(), |mood| format!("answers with {mood:?}"));
    let fault = stage.fault(format!("receiver '{name}' {what} for {time:?}"));
    troubled(host, mood, stage.pause(time)).await?;
    stage.healed(fault);
    Ok(())
}

async fn troubled(host: &Host, mood: Option<Mood>, while_this: impl Future<Output = ()>) -> Result<()> {
    match mood {
        Some(mood) => {
            host.set(mood);
            while_this.await;
            host.set(Mood::Well);
            Ok(())
        }
        None => {
            host.down();
            while_this.await;
            host.up().await
        }
    }
}

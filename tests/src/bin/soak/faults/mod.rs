//! What is done to the servers, the relays, the receivers and the tables while the load goes on. Each lane does one thing
//! after the other and mends what it did before the next one; the lanes go on beside each other.

mod application;
mod broker;
pub mod destinations;
mod receivers;
pub mod relays;
mod second;
mod server;

use std::sync::Arc;

use anyhow::{Context, Result};
use tokio::task::JoinSet;

use crate::random::Random;
use crate::stage::Stage;

/// Starts all lanes. They end by themselves when the storm is over, with everything mended.
pub fn start(stage: &Arc<Stage>, round: u64) -> JoinSet<Result<()>> {
    let mut lanes = JoinSet::new();
    let random = |lane: u64| Random::stream(stage.seed, round * 1000 + 900 + lane);
    lanes.spawn(named("server", server::lane(stage.clone(), random(1))));
    lanes.spawn(named("relays", relays::lane(stage.clone(), random(2))));
    lanes.spawn(named("broker", broker::lane(stage.clone(), random(3))));
    lanes.spawn(named("receivers", receivers::lane(stage.clone(), random(4))));
    lanes.spawn(named("application", application::lane(stage.clone(), random(5))));
    lanes.spawn(named("destinations", destinations::lane(stage.clone(), random(6))));
    lanes.spawn(named("second database", second::lane(stage.clone(), random(7))));
    lanes
}

async fn named(lane: &'static str, work: impl Future<Output = Result<()>>) -> Result<()> {
    work.await.with_context(|| format!("in the lane of faults '{lane}'"))
}

//! RabbitMQ: killed, restarted, stopped, alarmed, its connections closed.

use std::sync::Arc;

use anyhow::Result;

use crate::random::Random;
use crate::stage::Stage;

const CLOSE: &str = r#"[rabbit_networking:close_connection(P, "soak") || P <- rabbit_networking:connections()]."#;

pub async fn lane(stage: Arc<Stage>, mut random: Random) -> Result<()> {
    while stage.is_storming() {
        stage.pause(random.millis(6_000, 20_000)).await;
        if stage.is_storming() {
            one(&stage, &mut random).await?;
        }
    }
    Ok(())
}

async fn one(stage: &Stage, random: &mut Random) -> Result<()> {
    let (broker, time) = (&stage.broker, random.millis(200, 5_000));
    let fault;
    match random.below(100) {
        0..35 => {
            fault = stage.fault("close the connections of the broker");
            broker.evaluate(CLOSE).await?;
        }
        35..55 => {
            fault = stage.fault(format!("memory alarm of the broker for {time:?}"));
            broker.ctl(&["set_vm_memory_high_watermark", "absolute", "1"]).await?;
            tokio::time::sleep(time).await;
            broker.ctl(&["set_vm_memory_high_watermark", "0.4"]).await?;
        }
        55..70 => {
            fault = stage.fault(format!("the broker stands still for {time:?}"));
            broker.freeze();
            tokio::time::sleep(time).await;
            broker.thaw();
        }
        70..80 => {
            fault = stage.fault(format!("the broker takes no connections for {time:?}"));
            broker.stop_app().await?;
            tokio::time::sleep(time).await;
            broker.start_app().await?;
        }
        what => {
            let cleanly = what < 86;
            fault =
                stage.fault(format!("{} the broker, which is away for {time:?}", if cleanly { "end" } else { "kill" }));
            broker.stop(cleanly).await?;
            tokio::time::sleep(time).await;
            broker.resume().await?;
        }
    }
    stage.healed(fault);
    Ok(())
}

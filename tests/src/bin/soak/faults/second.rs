//! A second database, in which the extension is dropped and made again while events are published there.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use outbox_tests::session::Session;
use outbox_tests::wait::{self, LONG};

use crate::random::Random;
use crate::stage::Stage;

pub async fn lane(stage: Arc<Stage>, mut random: Random) -> Result<()> {
    while stage.is_storming() {
        stage.pause(random.millis(3_000, 12_000)).await;
        if !stage.is_storming() {
            break;
        }
        let fault = stage.fault("the extension is dropped and made again in another database");
        insist(&stage, "DROP EXTENSION IF EXISTS pg_outbox CASCADE").await?;
        insist(&stage, "CREATE EXTENSION IF NOT EXISTS pg_outbox").await?;
        stage.healed(fault);
        let count = 1 + random.below(20);
        let publish = format!(
            "SELECT outbox.publish('second', '{{}}') FROM generate_series(1, {count}) WHERE NOT EXISTS (SELECT FROM outbox_events)"
        );
        insist(&stage, &publish).await?;
        // All of them can be claimed and acknowledged, in however many tries.
        let drained = async || {
            let session = Session::open(&stage.cluster.url(&stage.second)).await?;
            let claim = "SELECT count(outbox.ack(c.claim_token, ARRAY[c.id])) FROM outbox.claim(1000) c";
            session.one::<i64>(claim).await?;
            let row = session
                .query_one("SELECT count(*), count(*) FILTER (WHERE status = 'processed') FROM outbox_events", &[])
                .await?;
            let (all, processed): (i64, i64) = (row.get(0), row.get(1));
            ensure!(all == count as i64, "{all} of {count} events are there");
            Ok((processed == all).then_some(()))
        };
        wait::until("the second database's events", LONG, drained).await?;
    }
    Ok(())
}

async fn insist(stage: &Stage, sql: &str) -> Result<()> {
    let look = async || {
        let session = Session::open(&stage.cluster.url(&stage.second)).await?;
        session.batch_execute(sql).await?;
        Ok(Some(()))
    };
    wait::until(sql, LONG + Duration::from_secs(30), look).await
}

//! What the application, its operators and its DBA do to the tables: long snapshots, locks, `VACUUM FULL`, new columns, new
//! indexes, other settings.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use outbox_tests::session::Session;

use crate::random::Random;
use crate::stage::Stage;
use crate::trouble::{Trouble, connected};

pub async fn lane(stage: Arc<Stage>, mut random: Random) -> Result<()> {
    while stage.is_storming() {
        stage.pause(random.millis(1_500, 8_000)).await;
        if stage.is_storming() {
            one(&stage, &mut random).await?;
        }
    }
    stage.without_prepared(mend(&stage)).await
}

async fn mend(stage: &Stage) -> Result<()> {
    stage.insist("ALTER SYSTEM RESET ALL").await?;
    stage.insist("SELECT pg_reload_conf()").await?;
    stage.insist("SET lock_timeout = '500ms'; ALTER TABLE outbox_events DROP COLUMN IF EXISTS soak").await?;
    drop_invalid(stage).await
}

async fn one(stage: &Stage, random: &mut Random) -> Result<()> {
    let time = random.millis(500, 6_000);
    match random.below(100) {
        0..16 => {
            let read = "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1 FROM outbox_events LIMIT 1";
            hold(stage, format!("a snapshot is held for {time:?}"), read, time).await
        }
        16..32 => {
            let lock = "BEGIN; SELECT id FROM outbox_events WHERE status <> 'processed' ORDER BY id DESC LIMIT 30 FOR UPDATE SKIP LOCKED";
            hold(stage, format!("rows are locked for {time:?}"), lock, time).await
        }
        32..76 => stage.without_prepared(definition(stage, random, time)).await,
        _ => settings(stage, random).await,
    }
}

async fn definition(stage: &Stage, random: &mut Random, time: Duration) -> Result<()> {
    match random.below(44) {
        0..12 => {
            let table =
                random.one_of(&["outbox_events", "outbox.delivery", "outbox.destination", "outbox.claims"]).copied();
            briefly(stage, &format!("VACUUM FULL {}", table.unwrap_or("outbox_events"))).await
        }
        12..20 => briefly(stage, "VACUUM ANALYZE outbox_events, outbox.delivery").await,
        20..30 => {
            let table = random.one_of(&["outbox_events", "outbox.delivery"]).copied().unwrap_or("outbox_events");
            briefly(stage, &format!("REINDEX TABLE CONCURRENTLY {table}")).await?;
            drop_invalid(stage).await
        }
        _ => {
            briefly(stage, "ALTER TABLE outbox_events ADD COLUMN IF NOT EXISTS soak text DEFAULT 'x'").await?;
            stage.pause(time).await;
            briefly(stage, "ALTER TABLE outbox_events DROP COLUMN IF EXISTS soak").await
        }
    }
}

/// A transaction that stays open for a while.
async fn hold(stage: &Stage, what: String, sql: &str, time: Duration) -> Result<()> {
    let Some(session) = connected(&stage.url()).await else { return Ok(()) };
    if let Err(error) = session.batch_execute(sql).await {
        return note(stage, &what, error);
    }
    let fault = stage.fault(what);
    stage.pause(time).await;
    stage.healed(fault);
    Ok(())
}

/// A command that takes strong locks and waits for none of them for long.
async fn briefly(stage: &Stage, sql: &str) -> Result<()> {
    let Some(session) = connected(&stage.url()).await else { return Ok(()) };
    let fault = stage.fault(sql);
    let done = async {
        session.batch_execute("SET lock_timeout = '1s'; SET statement_timeout = '20s'").await?;
        session.batch_execute(sql).await
    };
    let done = done.await;
    stage.healed(fault);
    done.or_else(|error| note(stage, sql, error))
}

fn note(stage: &Stage, what: &str, error: tokio_postgres::Error) -> Result<()> {
    if let Trouble::Strange(error) = Trouble::from(error) {
        stage.record.complain(format!("{what}: {error}"));
    }
    Ok(())
}

async fn settings(stage: &Stage, random: &mut Random) -> Result<()> {
    let retention = format!("outbox.retention = '{}s'", 2 + random.below(60));
    let payload = random.one_of(&["id", "metadata", "full"]).copied().unwrap_or("full");
    let payload = format!("outbox.notify_payload = '{payload}'");
    let all = [retention.as_str(), payload.as_str(), "outbox.inbox_retention = '1min'", "outbox.retention = -1"];
    let setting = random.one_of(&all).copied().unwrap_or(all[0]);
    let Some(session) = connected(&stage.url()).await else { return Ok(()) };
    let fault = stage.fault(format!("ALTER SYSTEM SET {setting}"));
    let done = set(&session, setting).await;
    stage.healed(fault);
    done.or_else(|error| note(stage, setting, error))
}

async fn set(session: &Session, setting: &str) -> Result<(), tokio_postgres::Error> {
    session.batch_execute(&format!("ALTER SYSTEM SET {setting}")).await?;
    session.batch_execute("SELECT pg_reload_conf()").await
}

/// What a `REINDEX CONCURRENTLY` that was interrupted leaves behind.
async fn drop_invalid(stage: &Stage) -> Result<()> {
    stage
        .insist(
            r"DO $$
            DECLARE v_index regclass;
            BEGIN
                SET LOCAL lock_timeout = '500ms';
                FOR v_index IN SELECT i.indexrelid FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
                                WHERE NOT i.indisvalid AND c.relname ~ '_cc(new|old)\d*$' AND c.relnamespace <> 'pg_toast'::regnamespace LOOP
                    EXECUTE format('DROP INDEX %s', v_index);
                END LOOP;
            END $$",
        )
        .await
}

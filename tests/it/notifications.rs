//! What is announced, when, and in what form.

use std::fs;

use anyhow::{Context, Result};
use outbox_tests::session::Session;
use outbox_tests::wait::LONG;
use outbox_tests::world::World;
use serde_json::{Value, json};

/// A payload's most bytes.
const MOST: usize = 7999;

struct Stage {
    session: Session,
    listener: Session,
}

impl Stage {
    async fn set(payload: &str) -> Result<Self> {
        let world = World::new().await?;
        let World { database, session, .. } = &world;
        // The worker takes a setting of the database when it starts.
        session.batch_execute(&format!("ALTER DATABASE {database} SET outbox.notify_payload = '{payload}'")).await?;
        let old: i32 = session.one("SELECT worker_pid FROM outbox.stats()").await?;
        session.execute("SELECT pg_terminate_backend($1)", &[&old]).await?;
        session
            .until(&format!("SELECT worker_pid <> {old} AND worker_state = 'idle' FROM outbox.stats()"), LONG)
            .await?;
        let listener = world.listener().await?;
        Ok(Stage { session: world.session, listener })
    }

    async fn payload(&mut self) -> Result<String> {
        Ok(self.listener.notification(LONG).await?.payload().to_owned())
    }

    /// Ids announced until that many were, and the payloads that named them.
    async fn announced(&mut self, count: usize) -> Result<(Vec<i64>, Vec<String>)> {
        let (mut ids, mut payloads) = (Vec::new(), Vec::new());
        while ids.len() < count {
            let payload = self.payload().await?;
            let json: Value = serde_json::from_str(&payload)?;
            for event in json["events"].as_array().context("no events")? {
                ids.push(event["id"].as_i64().context("no id")?);
            }
            payloads.push(payload);
        }
        Ok((ids, payloads))
    }

    /// The only event of the next payload, and the payload's bytes.
    async fn single(&mut self) -> Result<(Value, usize)> {
        let payload = self.payload().await?;
        let json: Value = serde_json::from_str(&payload)?;
        assert_eq!(json["v"], 1);
        let events = json["events"].as_array().context("no events")?;
        assert_eq!(events.len(), 1, "{payload}");
        Ok((events[0].clone(), payload.len()))
    }
}

async fn insert(session: &Session, kind: &str, data: &Value) -> Result<i64> {
    let query = "INSERT INTO outbox_events (event_type, event_data) VALUES ($1, $2) RETURNING id";
    Ok(session.query_one(query, &[&kind, data]).await?.get(0))
}

#[tokio::test]
async fn a_notification_describes_the_event() -> Result<()> {
    let mut stage = Stage::set("metadata").await?;
    let row = stage
        .session
        .query_one(
            "INSERT INTO outbox_events (event_type, aggregate_type, aggregate_id, event_data, metadata)
             VALUES ('contact.created', 'contact', '42', '{\"secret\": 1}', '{\"trace\": 2}')
             RETURNING id, event_id::text, to_char(created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')",
            &[],
        )
        .await?;
    let (id, event_id, created_at): (i64, String, String) = (row.get(0), row.get(1), row.get(2));
    let expected = format!(
        r#"{{"v":1,"events":[{{"id":{id},"event_id":"{event_id}","event_type":"contact.created","event_version":"v1","aggregate_type":"contact","aggregate_id":"42","tenant_id":null,"created_at":"{created_at}"}}]}}"#
    );
    assert_eq!(stage.payload().await?, expected);
    Ok(())
}

#[tokio::test]
async fn a_notification_may_name_ids_alone_or_everything() -> Result<()> {
    let mut ids = Stage::set("id").await?;
    insert(&ids.session, "a.b", &json!({})).await?;
    let (event, _) = ids.single().await?;
    assert_eq!(event.as_object().map(|e| e.keys().collect::<Vec<_>>()), Some(vec![&"event_id".into(), &"id".into()]));

    let mut full = Stage::set("full").await?;
    insert(&full.session, "a.b", &json!({"text": "é\"\\\n\u{1f600}"})).await?;
    let (event, _) = full.single().await?;
    assert_eq!(event["event_data"], json!({"text": "é\"\\\n\u{1f600}"}));
    assert_eq!(event["metadata"], json!({}));
    assert_eq!(event["truncated"], Value::Null);
    Ok(())
}

#[tokio::test]
async fn a_payload_is_full_at_7999_bytes_and_not_before() -> Result<()> {
    let mut stage = Stage::set("full").await?;
    // Two bytes a character, three of them in the last ones, so that bytes and characters differ.
    for filler in ["x", "é", "€"] {
        insert(&stage.session, "a.b", &json!({"d": ""})).await?;
        let (_, empty) = stage.single().await?;
        // Ids of one length: the next two are as long as the one before.
        let room = MOST - empty;
        let text = |bytes: usize| filler.repeat(bytes / filler.len()) + &"y".repeat(bytes % filler.len());
        insert(&stage.session, "a.b", &json!({"d": text(room)})).await?;
        let (fits, bytes) = stage.single().await?;
        assert_eq!((bytes, &fits["truncated"]), (MOST, &Value::Null));
        assert_eq!(fits["event_data"]["d"], text(room));
        insert(&stage.session, "a.b", &json!({"d": text(room + 1)})).await?;
        let (cut, _) = stage.single().await?;
        assert_eq!((&cut["truncated"], &cut["event_data"]), (&json!(true), &Value::Null));
        assert_eq!(cut["event_type"], "a.b");
    }
    Ok(())
}

#[tokio::test]
async fn events_of_any_size_are_announced_and_disturb_no_one() -> Result<()> {
    let mut stage = Stage::set("full").await?;
    let id = insert(&stage.session, "big.data", &json!({"d": "é".repeat(500_000)})).await?;
    let (event, bytes) = stage.single().await?;
    assert_eq!((event["id"].as_i64(), &event["truncated"]), (Some(id), &json!(true)));
    assert!(bytes <= MOST);
    let long = "é".repeat(5_000);
    let id = insert(&stage.session, &long, &json!({})).await?;
    let (event, bytes) = stage.single().await?;
    assert_eq!((event["id"].as_i64(), &event["truncated"]), (Some(id), &json!(true)));
    assert!(bytes <= MOST);
    Ok(())
}

#[tokio::test]
async fn many_events_are_packed_into_few_payloads() -> Result<()> {
    let mut stage = Stage::set("metadata").await?;
    stage
        .session
        .batch_execute(
            "INSERT INTO outbox_events (event_type, event_data) SELECT 'a.b', '{}' FROM generate_series(1, 200)",
        )
        .await?;
    let (ids, payloads) = stage.announced(200).await?;
    assert_eq!(ids.len(), 200);
    assert!(payloads.len() < 10, "{} payloads", payloads.len());
    assert!(payloads.iter().all(|payload| payload.len() <= MOST));
    assert!(payloads[0].len() > MOST - 300, "the first is not full: {} bytes", payloads[0].len());
    Ok(())
}

#[tokio::test]
async fn what_was_rolled_back_is_not_announced() -> Result<()> {
    let mut stage = Stage::set("metadata").await?;
    stage
        .session
        .batch_execute(
            "BEGIN; SELECT outbox.publish('gone.all', '{}'); ROLLBACK;
             BEGIN;
             SELECT outbox.publish('kept.1', '{}');
             SAVEPOINT a; SELECT outbox.publish('gone.a', '{}'); SAVEPOINT b; SELECT outbox.publish('gone.b', '{}');
             RELEASE b; ROLLBACK TO a; SELECT outbox.publish('kept.2', '{}'); RELEASE a;
             SAVEPOINT c; SELECT outbox.publish('kept.3', '{}'); RELEASE c;
             DO $$ BEGIN PERFORM outbox.publish('gone.c', '{}'); RAISE EXCEPTION 'no'; EXCEPTION WHEN OTHERS THEN NULL; END $$;
             COMMIT;
             SELECT outbox.publish('last', '{}');",
        )
        .await?;
    let mut kinds = Vec::new();
    while kinds.last().is_none_or(|kind| kind != "last") {
        let json: Value = serde_json::from_str(&stage.payload().await?)?;
        let events = json["events"].as_array().context("no events")?;
        kinds.extend(events.iter().map(|event| event["event_type"].as_str().unwrap_or_default().to_owned()));
    }
    assert_eq!(kinds, ["kept.1", "kept.2", "kept.3", "last"]);
    Ok(())
}

#[tokio::test]
async fn a_million_events_in_one_transaction_wake_consumers_and_need_little_memory() -> Result<()> {
    let mut stage = Stage::set("metadata").await?;
    let pid: i32 = stage.session.one("SELECT pg_backend_pid()").await?;
    let before = own_memory(pid)?;
    stage
        .session
        .batch_execute(
            "INSERT INTO outbox_events (event_type, event_data) SELECT 'a.b', '{}' FROM generate_series(1, 1000000)",
        )
        .await?;
    assert_eq!(stage.payload().await?, r#"{"v":1,"events":[],"reason":"overflow"}"#);
    // PostgreSQL's own queue of row triggers takes most of it.
    let grown = own_memory(pid)? - before;
    assert!(grown < 64 << 20, "the session grew by {grown} bytes");
    assert_eq!(stage.session.one::<i64>("SELECT pending FROM outbox.stats()").await?, 1_000_000);
    assert_eq!(stage.session.one::<i64>("SELECT count(*) FROM outbox.claim(10)").await?, 10);
    Ok(())
}

/// Bytes of a process that it shares with nobody.
fn own_memory(pid: i32) -> Result<i64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("no RssAnon")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<i64>()? * 1024)
}

#[tokio::test]
async fn rows_that_are_inserted_as_settled_are_counted_and_not_announced() -> Result<()> {
    let mut stage = Stage::set("metadata").await?;
    stage
        .session
        .batch_execute(
            "INSERT INTO outbox_events (event_type, event_data, status, processed_at) VALUES ('old', '{}', 'processed', now());
             SELECT outbox.publish('new', '{}');",
        )
        .await?;
    let (ids, _) = stage.announced(1).await?;
    assert_eq!(ids, [stage.session.one::<i64>("SELECT id FROM outbox_events WHERE event_type = 'new'").await?]);
    stage.session.until("SELECT processed = 1 AND pending = 1 FROM outbox.stats()", LONG).await?;
    Ok(())
}

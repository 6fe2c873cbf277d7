//! Edits by hand: each means what it says, or is refused with a hint. A row never lies.

use anyhow::Result;
use outbox_tests::session::Session;
use outbox_tests::world::World;
use tokio_postgres::error::SqlState;

use crate::claims::{NONE, claim, insert};

/// With a hint, or by a constraint whose name says what holds.
async fn refused(session: &Session, statement: &str, code: SqlState) -> Result<()> {
    let error = session.batch_execute(statement).await.expect_err(statement);
    let error = error.as_db_error().expect("an error of the server");
    let hinted = error.code() == &code && error.hint().is_some();
    assert!(
        hinted || error.constraint().is_some_and(|name| name.starts_with("outbox_events_")),
        "{statement}: {error:?}"
    );
    Ok(())
}

#[tokio::test]
async fn a_status_set_by_hand_is_what_happens() -> Result<()> {
    let World { session, .. } = World::new().await?;
    let ids = insert(&session, &["a", "b"]).await?;
    session.batch_execute("UPDATE outbox_events SET status = 'processed' WHERE aggregate_id = 'a'").await?;
    let (claimed, token) = claim(&session, "10").await?;
    assert_eq!(claimed, ids[1..], "what was taken as delivered is not delivered");
    refused(&session, "UPDATE outbox_events SET status = 'pending' WHERE aggregate_id = 'b'", not_now()).await?;
    session.execute(&format!("SELECT outbox.ack({token})"), &[]).await?;
    session.batch_execute("UPDATE outbox_events SET status = 'pending'").await?;
    assert_eq!(claim(&session, "10").await?.0, ids, "owed again");
    Ok(())
}

fn not_now() -> SqlState {
    SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE
}

#[tokio::test]
async fn what_claims_and_settlements_know_can_not_be_edited() -> Result<()> {
    let World { session, .. } = World::new().await?;
    session.batch_execute("SELECT outbox.add_rabbitmq('q')").await?;
    let ids = insert(&session, &["a"]).await?;
    for column in ["id = 99", "event_id = gen_random_uuid()", "claim_token = 1", "listed = true", "routed = true"] {
        refused(&session, &format!("UPDATE outbox_events SET {column}"), not_now()).await?;
    }
    session.batch_execute("UPDATE outbox_events SET aggregate_id = 'b', available_at = NULL").await?;
    let (_, token) = claim(&session, "10").await?;
    session.execute(&format!("SELECT outbox.reject({token}, {}, 'no good')", ids[0]), &[]).await?;
    for change in ["status = 'pending'", "status = 'processed'", "available_at = now()", "event_type = 'x'"] {
        refused(&session, &format!("UPDATE outbox_events SET {change}"), not_now()).await?;
    }
    session.batch_execute("UPDATE outbox_events SET event_data = '{\"mended\": true}', last_error = NULL").await?;
    session.execute("SELECT outbox.replay(event_id) FROM outbox_events", &[]).await?;
    let row = session.query_one("SELECT event_data::text FROM outbox.claim(10)", &[]).await?;
    assert_eq!(row.get::<_, String>(0), r#"{"mended": true}"#);
    Ok(())
}

#[tokio::test]
async fn names_that_the_functions_rely_on_stay() -> Result<()> {
    let World { session, .. } = World::new().await?;
    let held = SqlState::DEPENDENT_OBJECTS_STILL_EXIST;
    session.batch_execute("CREATE SCHEMA elsewhere").await?;
    for statement in [
        "ALTER TABLE outbox_events RENAME TO events",
        "ALTER TABLE outbox_events SET SCHEMA elsewhere",
        "ALTER SCHEMA public RENAME TO private",
        "ALTER SCHEMA outbox RENAME TO inbox",
        "ALTER TABLE outbox_events RENAME COLUMN metadata TO headers",
        "ALTER TABLE outbox_events DROP COLUMN tenant_id",
        "ALTER TABLE outbox_events ALTER COLUMN event_version TYPE varchar(10)",
    ] {
        refused(&session, statement, held.clone()).await?;
    }
    session
        .batch_execute("ALTER TABLE outbox_events ADD COLUMN own text; ALTER SCHEMA elsewhere RENAME TO away")
        .await?;
    insert(&session, &["a"]).await?;
    assert_ne!(claim(&session, "10").await?.0, NONE);
    Ok(())
}

//! Retention removes what it may, passes what it may not, and holds up no announcement.

use anyhow::Result;
use outbox_tests::cluster::Cluster;
use outbox_tests::session::Session;
use outbox_tests::wait::LONG;
use outbox_tests::world::World;

use crate::housekeeping::{events_are_announced, listener, worker};

/// Processed events, 40 days old.
async fn old_events(session: &Session, count: i32) -> Result<()> {
    let insert = format!(
        "INSERT INTO outbox_events (event_type, event_data, status, created_at, processed_at)
         SELECT 'old', '{{}}', 'processed', now() - interval '40 days', now() - interval '40 days' FROM generate_series(1, {count})"
    );
    Ok(session.batch_execute(&insert).await?)
}

const LEFT: &str = "SELECT count(*) FROM outbox_events WHERE event_type = 'old'";

fn left(count: i64) -> String {
    LEFT.replace("count(*)", &format!("count(*) = {count}"))
}

#[tokio::test]
async fn retention_passes_what_is_referenced_and_removes_the_rest() -> Result<()> {
    let cluster = Cluster::start().await?;
    let database = cluster.database().await?;
    let (session, mut listener) = (cluster.connect(&database).await?, listener(&cluster, &database).await?);
    let pid = worker(&session).await?;
    session
        .batch_execute(
            "CREATE TABLE child (event uuid REFERENCES outbox_events (event_id) DEFERRABLE INITIALLY DEFERRED)",
        )
        .await?;
    // More than a step and a window of them in front.
    session
        .batch_execute(
            "INSERT INTO outbox_events (event_type, event_data) SELECT 'old', '{}' FROM generate_series(1, 3000);
             INSERT INTO child SELECT event_id FROM outbox_events ORDER BY id LIMIT 1500;
             UPDATE outbox_events SET status = 'processed', processed_at = now() - interval '40 days';",
        )
        .await?;
    session.until(&left(1500), LONG).await?;
    events_are_announced(&session, &mut listener).await?;
    assert_eq!(worker(&session).await?, pid, "the worker was started anew");
    let lines: Vec<String> = cluster.log().lines().filter(|l| l.contains("23503")).map(str::to_owned).collect();
    assert!((1..10).contains(&lines.len()), "{lines:#?}");
    assert!(!cluster.log().contains("ERROR"), "{}", cluster.log());
    session.batch_execute("DROP TABLE child").await?;
    session.until(&left(0), LONG).await?;
    Ok(())
}

#[tokio::test]
async fn retention_passes_what_is_locked_and_comes_back_to_it() -> Result<()> {
    let World { cluster, database, session } = World::new().await?;
    let mut listener = listener(cluster, &database).await?;
    let child = cluster.connect(&database).await?;
    session.batch_execute("CREATE TABLE child (event uuid REFERENCES outbox_events (event_id))").await?;
    session
        .batch_execute(
            "INSERT INTO outbox_events (event_type, event_data) SELECT 'old', '{}' FROM generate_series(1, 20)",
        )
        .await?;
    // Two ways to hold a row: by its lock, and by a row that references it and is not committed.
    let holder = cluster.connect(&database).await?;
    holder.batch_execute("BEGIN; SELECT FROM outbox_events ORDER BY id LIMIT 1 FOR UPDATE").await?;
    child
        .batch_execute("BEGIN; INSERT INTO child SELECT event_id FROM outbox_events ORDER BY id OFFSET 1 LIMIT 1")
        .await?;
    session
        .batch_execute(
            "UPDATE outbox_events SET status = 'processed', processed_at = now() - interval '40 days'
              WHERE id > (SELECT id FROM outbox_events ORDER BY id OFFSET 1 LIMIT 1)",
        )
        .await?;
    session.until(&left(2), LONG).await?;
    holder.batch_execute("UPDATE outbox_events SET status = 'processed', processed_at = now() - interval '40 days' WHERE id = (SELECT min(id) FROM outbox_events)").await?;
    events_are_announced(&session, &mut listener).await?;
    holder.batch_execute("COMMIT; BEGIN; SELECT FROM outbox_events ORDER BY id LIMIT 1 FOR UPDATE").await?;
    old_events(&session, 20).await?;
    session.until(&left(2), LONG).await?;
    events_are_announced(&session, &mut listener).await?;
    holder.batch_execute("ROLLBACK").await?;
    session.until(&left(1), LONG).await?;
    child.batch_execute("ROLLBACK").await?;
    Ok(())
}

#[tokio::test]
async fn a_trigger_of_the_application_that_refuses_or_dawdles_stops_no_announcement() -> Result<()> {
    let World { cluster, database, session } = World::new().await?;
    let mut listener = listener(cluster, &database).await?;
    session
        .batch_execute(
            "CREATE FUNCTION meddle() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN
                 IF OLD.event_version = 'refuse' THEN RAISE EXCEPTION E'not\\nthis one'; END IF;
                 IF OLD.event_version = 'keep' THEN RETURN NULL; END IF;
                 IF OLD.event_version = 'dawdle' THEN PERFORM pg_sleep(3600); END IF;
                 RETURN OLD;
             END $$;
             CREATE TRIGGER meddle BEFORE DELETE ON outbox_events FOR EACH ROW EXECUTE FUNCTION meddle();",
        )
        .await?;
    session
        .batch_execute(
            "INSERT INTO outbox_events (event_type, event_version, event_data, status, processed_at)
             SELECT 'old', CASE n WHEN 3 THEN 'dawdle' WHEN 5 THEN 'refuse' WHEN 7 THEN 'keep' ELSE 'v1' END, '{}',
                    'processed', now() - interval '40 days' FROM generate_series(1, 50) AS n",
        )
        .await?;
    session.until(&left(3), LONG).await?;
    events_are_announced(&session, &mut listener).await?;
    session.batch_execute("DROP TRIGGER meddle ON outbox_events").await?;
    session.until(&left(0), LONG).await?;
    Ok(())
}

#[tokio::test]
async fn nothing_that_is_old_enough_is_no_error_while_the_table_is_locked() -> Result<()> {
    let world = World::new().await?;
    world.execute("INSERT INTO outbox_events (event_type, event_data, status, processed_at) VALUES ('young', '{}', 'processed', now())").await?;
    let locker = world.cluster.connect(&world.database).await?;
    locker.batch_execute("BEGIN; LOCK TABLE outbox_events IN EXCLUSIVE MODE").await?;
    world.execute("SET lock_timeout = '50 ms'").await?;
    let step = "SELECT last IS NULL AND skipped IS NULL AND error IS NULL FROM outbox._retain(0, 100)";
    assert!(world.session.one::<bool>(step).await?);
    Ok(())
}

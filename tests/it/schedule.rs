//! Scheduled events: they cost others nothing before their time, and take their place in their aggregate when it comes.

use anyhow::Result;
use outbox_tests::session::Session;
use outbox_tests::wait::LONG;
use outbox_tests::world::World;

use crate::claims::{NONE, claim, insert};

async fn schedule(session: &Session, count: usize, at: &str) -> Result<()> {
    let insert = format!(
        "INSERT INTO outbox_events (event_type, event_data, aggregate_type, aggregate_id, available_at)
         SELECT 'test.scheduled', '{{}}', 'test', n::text, {at} FROM generate_series(1, {count}) AS n"
    );
    session.execute(&insert, &[]).await?;
    Ok(())
}

#[tokio::test]
async fn an_event_behind_many_scheduled_ones_goes_at_once() -> Result<()> {
    let World { session, .. } = World::new().await?;
    session.batch_execute("BEGIN").await?;
    schedule(&session, 20_000, "now() + interval '1 day'").await?;
    let ids = insert(&session, &["x"]).await?;
    session.batch_execute("COMMIT").await?;
    assert_eq!(claim(&session, "100").await?.0, ids);
    assert_eq!(session.one::<i64>("SELECT count(*) FROM outbox.deliveries WHERE status = 'scheduled'").await?, 20_000);
    assert_eq!(
        session.one::<i64>("SELECT count(*) FROM outbox.delivery").await?,
        0,
        "they cost nothing before their time"
    );
    Ok(())
}

/// 3,000 fall due at once, far more than one claim takes; then one fresh event of each aggregate.
#[tokio::test]
async fn a_fresh_event_does_not_pass_a_scheduled_one_that_is_due() -> Result<()> {
    for destination in [true, false] {
        let World { session, .. } = World::new().await?;
        if destination {
            session.batch_execute("SELECT outbox.add_rabbitmq('q')").await?;
        }
        schedule(&session, 3000, "now() + interval '50 milliseconds'").await?;
        session.until("SELECT bool_and(available_at < clock_timestamp()) FROM outbox_events", LONG).await?;
        let fresh: Vec<String> = (1..=3000).map(|n| n.to_string()).collect();
        insert(&session, &fresh.iter().map(String::as_str).collect::<Vec<_>>()).await?;
        let mut order = Vec::new();
        while order.len() < 6000 {
            let (ids, token) = claim(&session, "200").await?;
            session.execute(&format!("SELECT outbox.ack({token})"), &[]).await?;
            order.extend(ids);
        }
        let line = |id: &i64| (id - 1) % 3000;
        let mut last = vec![0; 3000];
        for id in &order {
            let place = &mut last[line(id) as usize];
            assert!(*place < *id, "event {id} came after event {place} of its aggregate");
            *place = *id;
        }
    }
    Ok(())
}

#[tokio::test]
async fn what_waited_for_the_first_destination_comes_before_later_events() -> Result<()> {
    let World { session, .. } = World::new().await?;
    let aggregates: Vec<String> = (0..600).map(|n| n.to_string()).collect();
    let aggregates: Vec<&str> = aggregates.iter().map(String::as_str).collect();
    let first = insert(&session, &aggregates).await?;
    let (_, token) = claim(&session, "1000").await?;
    session.execute(&format!("SELECT outbox.fail({token}, id, 'not yet', '1 hour') FROM outbox_events"), &[]).await?;
    session.batch_execute("SELECT outbox.add_rabbitmq('q')").await?;
    insert(&session, &aggregates).await?;
    assert_eq!(claim(&session, "1000").await?.0, NONE, "each waits behind the retry of its aggregate");
    let later = insert(&session, &["other"]).await?;
    assert_eq!(claim(&session, "1000").await?.0, later);
    session.execute(&format!("DELETE FROM outbox_events WHERE id <= {}", first[599]), &[]).await?;
    session.until("SELECT count(*) = 600 FROM outbox.delivery WHERE next_attempt_at IS NOT NULL", LONG).await?;
    assert_eq!(claim(&session, "1000").await?.0.len(), 600);
    Ok(())
}

#[tokio::test]
async fn a_new_time_for_a_scheduled_event_counts() -> Result<()> {
    let World { session, .. } = World::new().await?;
    schedule(&session, 2, "now() + interval '1 day'").await?;
    assert_eq!(claim(&session, "10").await?.0, NONE);
    session.batch_execute("UPDATE outbox_events SET available_at = NULL WHERE aggregate_id = '1'").await?;
    assert_eq!(claim(&session, "10").await?.0.len(), 1);
    session.batch_execute("UPDATE outbox_events SET available_at = now() WHERE aggregate_id = '2'").await?;
    assert_eq!(claim(&session, "10").await?.0.len(), 1);
    insert(&session, &["3"]).await?;
    session
        .batch_execute("UPDATE outbox_events SET available_at = now() + interval '1 day' WHERE aggregate_id = '3'")
        .await?;
    assert_eq!(claim(&session, "10").await?.0, NONE);
    Ok(())
}

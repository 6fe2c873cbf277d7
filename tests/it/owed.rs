//! To whom an event is owed, when its destinations are settled apart, replayed, removed, or the event is deleted.

use anyhow::Result;
use outbox_tests::session::Session;
use outbox_tests::world::World;

use crate::claims::{NONE, claim, due, insert};

/// The destinations that an event is outstanding or dead at.
const OWED: &str = "SELECT string_agg(destination || ' ' || status, ', ' ORDER BY destination) FROM outbox.deliveries";

async fn add(session: &Session, names: &[&str]) -> Result<()> {
    for name in names {
        session.execute("SELECT outbox.add_rabbitmq($1)", &[name]).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_destination_that_was_served_is_not_owed_the_event_again() -> Result<()> {
    for way in ["fail({t}, {i}, 'no luck', '1 hour', 'A')", "fail({t}, {i}, 'no luck', '1 hour')", "release({t})"] {
        let World { cluster, database, session } = World::new().await?;
        let other = cluster.connect(&database).await?;
        add(&session, &["A", "B"]).await?;
        let ids = insert(&session, &[""]).await?;
        let (first, token) = claim(&session, "10, '{A}'").await?;
        let (second, served) = claim(&other, "10, '{B}'").await?;
        assert_eq!((&first, &second), (&ids, &ids));
        assert_eq!(other.one::<i64>(&format!("SELECT outbox.ack({served})")).await?, 1);
        let call = way.replace("{t}", &token.to_string()).replace("{i}", &ids[0].to_string());
        session.execute(&format!("SELECT outbox.{call}"), &[]).await?;
        assert_eq!(session.one::<String>(OWED).await?, "A pending", "{way}");
    }
    Ok(())
}

#[tokio::test]
async fn an_event_that_is_claimed_for_a_destination_that_is_removed_ends() -> Result<()> {
    let World { cluster, database, mut session } = World::new().await?;
    let operator = cluster.connect(&database).await?;
    session
        .batch_execute("LISTEN outbox_events; SELECT outbox.add_rabbitmq('other', event_types => '{other.*}')")
        .await?;
    add(&operator, &["A"]).await?;
    let ids = insert(&session, &["a"]).await?;
    let (claimed, token) = claim(&session, "10").await?;
    assert_eq!(claimed, ids);
    operator.batch_execute("SELECT outbox.remove_destination('A')").await?;
    assert!(session.one::<bool>(&format!("SELECT outbox.fail({token}, {}, 'no luck')", ids[0])).await?);
    while session.one::<String>("SELECT status FROM outbox_events").await? != "processed" {
        due(&mut session).await?;
        assert_eq!(claim(&session, "10").await?.0, NONE);
    }
    Ok(())
}

#[tokio::test]
async fn an_event_stays_owed_to_others_when_the_destination_that_holds_it_is_removed() -> Result<()> {
    let World { session, .. } = World::new().await?;
    add(&session, &["A", "B"]).await?;
    let ids = insert(&session, &["a"]).await?;
    let (claimed, token) = claim(&session, "10, '{A}'").await?;
    assert_eq!(claimed, ids);
    session.batch_execute("SELECT outbox.remove_destination('A')").await?;
    session.execute(&format!("SELECT outbox.fail({token}, {}, 'no luck')", ids[0]), &[]).await?;
    assert_eq!(session.one::<String>("SELECT status FROM outbox_events").await?, "pending");
    let (again, token) = claim(&session, "10, '{B}'").await?;
    assert_eq!(again, ids);
    assert_eq!(session.one::<i64>(&format!("SELECT outbox.ack({token})")).await?, 1);
    assert_eq!(session.one::<String>("SELECT status FROM outbox_events").await?, "processed");
    Ok(())
}

#[tokio::test]
async fn an_event_is_replayed_to_a_destination_that_has_it_while_another_gave_it_up() -> Result<()> {
    let World { session, .. } = World::new().await?;
    add(&session, &["A", "B"]).await?;
    let ids = insert(&session, &[""]).await?;
    let (_, token) = claim(&session, "10").await?;
    assert!(session.one::<bool>(&format!("SELECT outbox.reject({token}, {}, 'no', 'B')", ids[0])).await?);
    assert_eq!(session.one::<i64>(&format!("SELECT outbox.ack({token})")).await?, 1);
    assert_eq!(session.one::<String>(OWED).await?, "B failed");
    assert!(session.one::<bool>("SELECT outbox.replay(event_id, 'A') FROM outbox_events").await?);
    assert_eq!(session.one::<Vec<String>>("SELECT destinations FROM outbox.claim()").await?, ["A"]);
    assert_eq!(session.one::<String>(OWED).await?, "A processing, B failed");
    Ok(())
}

#[tokio::test]
async fn a_deleted_dead_letter_does_not_keep_its_line_waiting() -> Result<()> {
    let World { session, .. } = World::new().await?;
    session.batch_execute(r#"SELECT outbox.add_rabbitmq('A', settings => '{"on_failure": "block"}')"#).await?;
    let ids = insert(&session, &["a", "a"]).await?;
    let (claimed, token) = claim(&session, "10").await?;
    assert_eq!(claimed, ids);
    assert!(session.one::<bool>(&format!("SELECT outbox.reject({token}, {}, 'no')", ids[0])).await?);
    assert_eq!(claim(&session, "10").await?.0, NONE);
    assert_eq!(session.execute("DELETE FROM outbox_events WHERE status = 'failed'", &[]).await?, 1);
    assert_eq!(claim(&session, "10").await?.0, ids[1..]);
    Ok(())
}

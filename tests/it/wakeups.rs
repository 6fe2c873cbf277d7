//! Wake-ups: whatever becomes due is announced at its moment, to all that may serve it.

use anyhow::Result;
use outbox_tests::cluster::Cluster;
use outbox_tests::session::Session;
use outbox_tests::wait::LONG;
use outbox_tests::world::World;

use crate::claims::{NONE, claim, due, insert};

const WORKER: &str = "SELECT worker_pid FROM outbox.stats()";

/// A session that listens, when the worker has nothing left to announce, in a database with destinations A and B.
async fn stage() -> Result<(&'static Cluster, Session, Session)> {
    let world = World::new().await?;
    world.execute("SELECT outbox.add_rabbitmq('A'), outbox.add_rabbitmq('B')").await?;
    let listener = world.listener().await?;
    Ok((world.cluster, world.session, listener))
}

/// Waits until all that happened so far has been announced, and forgets it.
async fn forget(listener: &mut Session) -> Result<()> {
    listener.until("SELECT worker_state = 'idle' FROM outbox.stats()", LONG).await?;
    // What the worker sent before it fell idle comes with the next answer at the latest.
    listener.batch_execute("SELECT").await?;
    while listener.heard().is_some() {}
    Ok(())
}

/// Claims for B, at each wake-up, until there is something.
async fn claim_for_b(session: &Session, listener: &mut Session) -> Result<Vec<i64>> {
    loop {
        let ids = claim(session, "10, '{B}'").await?.0;
        if !ids.is_empty() {
            return Ok(ids);
        }
        due(listener).await?;
    }
}

#[tokio::test]
async fn others_are_woken_for_what_a_claim_parked_for_them() -> Result<()> {
    let (_, session, mut listener) = stage().await?;
    let ids = insert(&session, &[""]).await?;
    forget(&mut listener).await?;
    assert_eq!(claim(&session, "10, '{A}'").await?.0, ids);
    due(&mut listener).await?;
    assert_eq!(claim(&listener, "10, '{B}'").await?.0, ids);
    Ok(())
}

#[tokio::test]
async fn a_retry_is_not_forgotten_behind_an_event_that_is_claimed_whole() -> Result<()> {
    let (_, session, mut listener) = stage().await?;
    let first = insert(&session, &["a"]).await?;
    let (claimed, token) = claim(&session, "10").await?;
    assert_eq!(claimed, first);
    let exceptions = format!(
        r#"[{{"token":{token},"id":{0},"destination":"A","outcome":"delivered"}},
            {{"token":{token},"id":{0},"destination":"B","outcome":"failed","error":"no luck","retry_in":0}}]"#,
        first[0]
    );
    let settle = format!("SELECT settled FROM outbox.settle('{{}}', '{{}}', '{exceptions}')");
    assert_eq!(session.one::<i64>(&settle).await?, 2);
    let second = insert(&session, &["a"]).await?;
    assert_eq!(claim(&session, "10, '{A}'").await?.0, second);
    forget(&mut listener).await?;
    assert_eq!(claim_for_b(&session, &mut listener).await?, [first[0], second[0]]);
    let held = "SELECT status = 'processing' FROM outbox.deliveries WHERE destination = 'A'";
    assert!(session.one::<bool>(held).await?, "A's event is in flight still");
    Ok(())
}

#[tokio::test]
async fn a_retry_keeps_its_moment_across_a_pause() -> Result<()> {
    let (_, session, mut listener) = stage().await?;
    let ids = insert(&session, &[""]).await?;
    let (_, token) = claim(&session, "10, '{B}'").await?;
    assert!(session.one::<bool>(&format!("SELECT outbox.fail({token}, {}, 'no luck', '3 s')", ids[0])).await?);
    session.batch_execute("SELECT outbox.pause('B')").await?;
    // The worker looks at what is due when.
    assert_eq!(claim(&session, "10, '{A}', '100 ms'").await?.0, ids);
    session.until("SELECT bool_and(status = 'pending') FROM outbox.deliveries", LONG).await?;
    forget(&mut listener).await?;
    session.batch_execute("SELECT outbox.resume('B')").await?;
    let moment: String =
        session.one("SELECT next_attempt_at::text FROM outbox.deliveries WHERE destination = 'B'").await?;
    assert_eq!(claim_for_b(&session, &mut listener).await?, ids);
    assert!(session.one::<bool>(&format!("SELECT clock_timestamp() >= '{moment}'")).await?, "too early");
    Ok(())
}

#[tokio::test]
async fn a_scheduled_event_is_announced_though_nobody_claimed_before() -> Result<()> {
    let (_, session, mut listener) = stage().await?;
    forget(&mut listener).await?;
    session
        .batch_execute("SELECT outbox.publish('later', '{}', available_at => clock_timestamp() + interval '1.5 s')")
        .await?;
    let mut early = 0;
    loop {
        due(&mut listener).await?;
        if session.one("SELECT available_at <= clock_timestamp() FROM outbox_events").await? {
            break;
        }
        early += 1;
    }
    assert!(early <= 1, "woken {early} times before its moment");
    assert_eq!(claim(&session, "10").await?.0.len(), 1);
    Ok(())
}

#[tokio::test]
async fn an_event_for_the_end_of_time_does_no_harm_to_others() -> Result<()> {
    let cluster = Cluster::with(&[("outbox.retention", "-1")]).await?;
    let session = cluster.connect(&cluster.database().await?).await?;
    let worker: i32 = session.one(WORKER).await?;
    session.batch_execute("SELECT outbox.publish('never', '{}', available_at => 'infinity')").await?;
    assert_eq!(claim(&session, "10").await?.0, NONE);
    let ids = insert(&session, &[""]).await?;
    assert_eq!(claim(&session, "10, NULL, '100 ms'").await?.0, ids);
    session.until("SELECT bool_and(status = 'pending') FROM outbox_events", LONG).await?;
    assert_eq!(claim(&session, "10").await?.0, ids);
    assert_eq!(session.one::<i32>(WORKER).await?, worker);
    Ok(())
}

#[tokio::test]
async fn an_event_is_created_at_some_moment() -> Result<()> {
    let World { session, .. } = World::new().await?;
    for moment in ["infinity", "-infinity"] {
        let insert =
            format!("INSERT INTO outbox_events (event_type, event_data, created_at) VALUES ('a', '{{}}', '{moment}')");
        let error = session.batch_execute(&insert).await.expect_err(moment);
        assert_eq!(error.code().map(|code| code.code()), Some("23514"), "{moment}: {error}");
    }
    Ok(())
}

/// The worker looks at the first moment alone as long as something of the destination is due.
#[tokio::test]
async fn each_retry_of_a_destination_has_its_wake_up() -> Result<()> {
    let (_, session, mut listener) = stage().await?;
    let ids = insert(&session, &["", ""]).await?;
    let (_, token) = claim(&session, "10, '{A}'").await?;
    for (id, wait) in ids.iter().zip(["1 second", "2 seconds"]) {
        session.execute(&format!("SELECT outbox.fail($1, $2, 'no', '{wait}', 'A')"), &[&token, id]).await?;
    }
    forget(&mut listener).await?;
    for id in ids {
        due(&mut listener).await?;
        let (claimed, token) = claim(&session, "10, '{A}'").await?;
        assert_eq!(claimed, [id]);
        session.execute("SELECT outbox.ack($1)", &[&token]).await?;
    }
    Ok(())
}

/// What it owes again has no id of its own to announce.
#[tokio::test]
async fn a_replay_in_a_prepared_transaction_wakes_consumers_when_it_commits() -> Result<()> {
    let (_, session, mut listener) = stage().await?;
    let gid: String = session.one("SELECT current_database() || '_replay'").await?;
    insert(&session, &[""]).await?;
    let (_, token) = claim(&session, "10").await?;
    session.execute("SELECT outbox.ack($1)", &[&token]).await?;
    forget(&mut listener).await?;
    session.batch_execute("BEGIN; SELECT outbox.replay(event_id) FROM outbox_events").await?;
    session.batch_execute(&format!("PREPARE TRANSACTION '{gid}'")).await?;
    session.batch_execute(&format!("COMMIT PREPARED '{gid}'")).await?;
    due(&mut listener).await?;
    assert_eq!(claim(&session, "10").await?.0.len(), 1);
    Ok(())
}

#[tokio::test]
async fn a_prepared_transaction_is_announced_when_it_commits_and_only_then() -> Result<()> {
    let (_, session, mut listener) = stage().await?;
    let gid: String = session.one("SELECT current_database()::text").await?;
    for end in ["ROLLBACK", "COMMIT"] {
        forget(&mut listener).await?;
        session.batch_execute("BEGIN").await?;
        let prepared = insert(&session, &[""]).await?[0];
        session.batch_execute(&format!("PREPARE TRANSACTION '{gid}'")).await?;
        session.batch_execute(&format!("{end} PREPARED '{gid}'")).await?;
        let named = |payload: &str, id: i64| payload.contains(&format!(r#""id":{id},"#));
        if end == "COMMIT" {
            let payload = listener.notification(LONG).await?.payload().to_owned();
            assert!(named(&payload, prepared), "{payload}");
        }
        let mark = insert(&session, &[""]).await?[0];
        let payload = listener.notification(LONG).await?.payload().to_owned();
        assert!(named(&payload, mark) && !named(&payload, prepared), "{end}: {payload}");
    }
    Ok(())
}

//! Receivers that ask for rest, and how long an event and a destination are given.

use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use anyhow::Result;
use outbox_tests::receiver::{Receiver, Reply};
use outbox_tests::wait::LONG;
use outbox_tests::world::World;

/// Takes so many requests in a second of its clock, else 429.
fn limited(allowed: usize, retry_after: &'static str) -> impl Fn(SystemTime) -> Reply + Send + Sync {
    let window = Mutex::new((0, 0));
    move |at| {
        let second = at.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let mut window = window.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if window.0 != second {
            *window = (second, 0);
        }
        window.1 += 1;
        match window.1 <= allowed {
            true => Reply::Accept,
            false => Reply::With(429, vec![("retry-after", retry_after.into())], Vec::new()),
        }
    }
}

#[tokio::test]
async fn a_receiver_that_throttles_gets_everything_and_is_not_flooded() -> Result<()> {
    const EVENTS: usize = 200;
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    let reply = limited(10, "1");
    receiver.reply_with(move |_, request| reply(request.at));
    world.add_webhook("hook", &receiver.url("hook"), r#"{"max_attempts": 2}"#).await?;
    let _relay = world.relay().await?;
    world.execute(&format!(
        "SELECT outbox.publish('contact.created', '{{}}', 'contact', (n % 20)::text) FROM generate_series(1, {EVENTS}) n"
    ))
    .await?;
    // Hundreds of events at the receiver's pace.
    let all = "SELECT bool_and(status = 'processed') FROM outbox_events";
    world.session.until(all, 3 * LONG).await?;
    assert_eq!(world.session.one::<i32>("SELECT max(retry_count) FROM outbox_events").await?, 0, "no attempt was used");
    assert!(receiver.count() < EVENTS * 13 / 10, "{} requests for {EVENTS} events", receiver.count());
    Ok(())
}

#[tokio::test]
async fn while_a_receiver_rests_nothing_is_sent_and_what_succeeds_late_does_not_end_the_rest() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    receiver.reply_with(|before, _| match before {
        0 => Reply::After(Duration::from_millis(300), Box::new(Reply::Accept)),
        1 => Reply::With(503, vec![("retry-after", "2".into())], Vec::new()),
        _ => Reply::Accept,
    });
    world.add_webhook("hook", &receiver.url("hook"), "{}").await?;
    let _relay = world.relay().await?;
    for n in 0..2 {
        world.publish(&n.to_string()).await?;
    }
    let requests = receiver.wait_for(3, LONG).await?;
    assert!(requests[2].at.duration_since(requests[1].at)? >= Duration::from_millis(1900));
    world.processed().await
}

#[tokio::test]
async fn an_event_owed_for_too_long_is_a_dead_letter_at_its_next_failure() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    receiver.reply(Reply::Status(503));
    world.add_webhook("hook", &receiver.url("hook"), r#"{"give_up_after": "1 hour"}"#).await?;
    world
        .add_webhook("patient", &receiver.url("hook"), r#"{"give_up_after": "never", "disable_after": "never"}"#)
        .await?;
    let _relay = world.relay().await?;
    world.publish("1").await?;
    world.until("SELECT count(last_error) = 2 FROM outbox.deliveries").await?;
    world.execute("UPDATE outbox.delivery SET owed_since = owed_since - interval '4 days'").await?;
    world.until("SELECT bool_and((status = 'failed') = (destination = 'hook')) FROM outbox.deliveries").await?;
    world.until("SELECT bool_and(attempts = 0) FROM outbox.deliveries").await?;
    // Replayed, it is owed anew.
    world.execute("SELECT outbox.replay_failed(); SELECT outbox.resume('hook')").await?;
    receiver.reply(Reply::Accept);
    world.processed().await
}

#[tokio::test]
async fn a_destination_that_never_answers_is_disabled_in_the_end() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    receiver.reply(Reply::Status(500));
    let settings = r#"{"disable_after": "2 days", "base": 0.05, "cap": 0.05, "max_attempts": 100000}"#;
    world.add_webhook("hook", &receiver.url("hook"), settings).await?;
    let _relay = world.relay().await?;
    world.publish("1").await?;
    world.until("SELECT failing_since IS NOT NULL FROM outbox.destination").await?;
    // A success in between begins the count anew.
    receiver.reply(Reply::Accept);
    world.processed().await?;
    world.until("SELECT failing_since IS NULL AND last_success_at IS NOT NULL FROM outbox.destination").await?;
    receiver.reply(Reply::Status(500));
    world.publish("1").await?;
    world.until("SELECT failing_since IS NOT NULL FROM outbox.destination").await?;
    world
        .execute("UPDATE outbox_events SET processed_at = processed_at - interval '30 days' WHERE status = 'processed'")
        .await?;
    world.execute("UPDATE outbox.destination SET failing_since = failing_since - interval '3 days'").await?;
    world.until(
        "SELECT state = 'disabled' AND last_error LIKE 'no success since %: 500 Internal Server Error' FROM outbox.destinations",
    )
    .await?;
    assert_eq!(world.session.one::<i64>("SELECT count(*) FROM outbox_events WHERE status = 'failed'").await?, 0);
    receiver.reply(Reply::Accept);
    world.execute("SELECT outbox.resume('hook')").await?;
    world.processed().await
}

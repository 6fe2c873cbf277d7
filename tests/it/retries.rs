//! When a failed delivery is tried again, and when no more.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use outbox_tests::receiver::{Receiver, Reply};
use outbox_tests::wait::LONG;
use outbox_tests::world::World;

#[tokio::test]
async fn a_schedule_says_when_each_attempt_comes_and_which_is_the_last() -> Result<()> {
    let world = World::new().await?;
    // The other settings have no say.
    let settings = r#"{"schedule": ["5 s", 300, "2 h"], "max_attempts": 1, "base": 1, "cap": 1}"#;
    world.execute(&format!("SELECT outbox.add_rabbitmq('mq', settings => '{settings}')")).await?;
    world.publish("1").await?;
    let fail = "SELECT outbox.fail(claim_token, id, 'no') FROM outbox.claim(1)";
    for wait in ["5 seconds", "5 minutes", "2 hours"] {
        ensure!(world.session.one::<bool>(fail).await?);
        let due = format!(
            "SELECT next_attempt_at - clock_timestamp() BETWEEN interval '{wait}' - interval '3 seconds' AND interval '{wait}'
               FROM outbox.deliveries"
        );
        ensure!(world.session.one::<bool>(&due).await?, "the wait is not {wait}");
        world.execute("UPDATE outbox.delivery SET next_attempt_at = now()").await?;
    }
    ensure!(world.session.one::<bool>(fail).await?);
    world.until("SELECT status = 'failed' AND retry_count = 4 FROM outbox_events").await
}

#[tokio::test]
async fn the_relay_keeps_to_a_schedule() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    receiver.reply(Reply::Status(500));
    world.add_webhook("hook", &receiver.url("hook"), r#"{"schedule": ["200 ms", 0.6]}"#).await?;
    let _relay = world.relay().await?;
    world.publish("1").await?;
    world.until("SELECT status = 'failed' AND retry_count = 3 FROM outbox_events").await?;
    let requests = receiver.wait_for(3, LONG).await?;
    assert_eq!(requests.len(), 3);
    for (pair, wait) in requests.windows(2).zip([200, 600]) {
        let waited = pair[1].at.duration_since(pair[0].at)?;
        ensure!(waited >= Duration::from_millis(wait), "{waited:?} instead of {wait} ms");
    }
    Ok(())
}

#[tokio::test]
async fn a_schedule_that_no_timer_could_keep_is_refused() -> Result<()> {
    let world = World::new().await?;
    for (schedule, code) in [
        (r#""5 s""#, "22023"),
        (r#"[0]"#, "22023"),
        (r#"["-1 s"]"#, "22023"),
        (r#"["367 days"]"#, "22023"),
        (r#"[null]"#, "22023"),
        (r#"[["5 s"]]"#, "22023"),
        (r#"["soon"]"#, "22007"),
        (r#"["never"]"#, "22007"),
    ] {
        let settings = format!(r#"{{"schedule": {schedule}}}"#);
        let call = "SELECT outbox.add_rabbitmq('mq', settings => $1::text::jsonb)";
        let error = world.session.execute(call, &[&settings]).await.err().context(schedule)?;
        assert_eq!(error.code().map(|code| code.code()), Some(code), "{schedule}: {error:?}");
    }
    // Without any wait there is one attempt.
    world.execute(r#"SELECT outbox.add_rabbitmq('mq', settings => '{"schedule": []}')"#).await?;
    world.publish("1").await?;
    world.execute("SELECT outbox.fail(claim_token, id, 'no') FROM outbox.claim(1)").await?;
    world.until("SELECT status = 'failed' FROM outbox_events").await
}

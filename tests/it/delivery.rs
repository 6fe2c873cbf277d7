//! What each destination gets: in order, as often as needed, whatever happens to the others.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use outbox_tests::cluster::Cluster;
use outbox_tests::receiver::{Received, Receiver, Reply};
use outbox_tests::relay::Relay;
use outbox_tests::scratch;
use outbox_tests::session::Session;
use outbox_tests::wait::{self, LONG};
use outbox_tests::world::World;

const ALL_PROCESSED: &str = "SELECT bool_and(status = 'processed') FROM outbox_events";
const QUICK: &str = r#"{"base": 0.02, "max_attempts": 3}"#;

struct Stage {
    session: Session,
    receiver: Receiver,
    _relay: Relay,
}

impl Stage {
    /// A relay without RabbitMQ, and a server for webhooks.
    async fn set() -> Result<Self> {
        let world = World::new().await?;
        let relay = world.relay().await?;
        Ok(Stage { session: world.session, receiver: Receiver::start()?, _relay: relay })
    }

    /// A webhook of that name, at that path, for all events.
    async fn hook(&self, name: &str, settings: &str) -> Result<()> {
        let query = format!("SELECT outbox.add_webhook('{name}', $1, settings => '{settings}')");
        self.session.execute(&query, &[&self.receiver.url(name)]).await?;
        Ok(())
    }

    /// Events whose data is `{"n": "a1"}`, of the aggregate that the first letter names.
    async fn publish(&self, names: &[&str]) -> Result<()> {
        self.session
            .execute(
                "INSERT INTO outbox_events (event_type, aggregate_type, aggregate_id, event_data)
                 SELECT 'test.' || n, 'test', left(n, 1), jsonb_build_object('n', n) FROM unnest($1::text[]) n",
                &[&names],
            )
            .await?;
        Ok(())
    }

    async fn processed(&self) -> Result<()> {
        self.session.until(ALL_PROCESSED, LONG).await
    }

    /// The requests to a path, by the names of their events.
    fn requests(&self, path: &str) -> Vec<String> {
        self.receiver.received().iter().filter(|request| request.path == path).map(name).collect()
    }
}

fn name(request: &Received) -> String {
    request.json().ok().and_then(|json| Some(json["data"]["n"].as_str()?.to_owned())).unwrap_or_default()
}

/// Refuses the first so many tries of an event, and takes all else.
fn refuse(event: &'static str, tries: usize) -> impl Fn(usize, &Received) -> Reply + Send + Sync {
    let seen = std::sync::Mutex::new(0);
    move |_, request| {
        let Ok(mut seen) = seen.lock() else { return Reply::Status(500) };
        if name(request) == event && *seen < tries {
            *seen += 1;
            return Reply::Status(500);
        }
        Reply::Accept
    }
}

fn position(requests: &[String], name: &str) -> Option<usize> {
    requests.iter().rposition(|request| request == name)
}

#[tokio::test]
async fn a_retry_holds_back_its_aggregate_alone() -> Result<()> {
    let stage = Stage::set().await?;
    stage.receiver.reply_with(refuse("a1", 2));
    stage.hook("hook", QUICK).await?;
    stage.publish(&["a1", "a2", "a3", "b1", "b2"]).await?;
    stage.processed().await?;
    let requests = stage.requests("/hook");
    assert_eq!(requests.iter().filter(|name| *name == "a1").count(), 3, "{requests:?}");
    let order: Vec<_> = ["a1", "a2", "a3"].iter().map(|name| position(&requests, name)).collect();
    assert!(order.is_sorted() && order.iter().all(Option::is_some), "{requests:?}");
    assert_eq!(requests.len(), 7, "{requests:?}");
    assert!(position(&requests, "b2") < position(&requests, "a1"), "the other aggregate waited: {requests:?}");
    assert_eq!(
        stage.session.one::<i32>("SELECT retry_count FROM outbox_events WHERE event_type = 'test.a1'").await?,
        2
    );
    Ok(())
}

#[tokio::test]
async fn after_a_dead_letter_the_aggregate_goes_on() -> Result<()> {
    let stage = Stage::set().await?;
    stage.receiver.reply_with(refuse("a1", 99));
    stage.hook("hook", QUICK).await?;
    stage.publish(&["a1", "a2"]).await?;
    stage.session.until("SELECT array_agg(status ORDER BY id) = '{failed,processed}' FROM outbox_events", LONG).await?;
    assert_eq!(stage.requests("/hook"), ["a1", "a1", "a1", "a2"]);
    let row =
        stage.session.query_one("SELECT status, attempts, last_error, destination FROM outbox.deliveries", &[]).await?;
    assert_eq!((row.get(0), row.get(1), row.get(3)), ("failed", 3, "hook"));
    assert!(row.get::<_, &str>(2).contains("500"));
    Ok(())
}

#[tokio::test]
async fn a_blocked_aggregate_waits_for_the_operator() -> Result<()> {
    for way_out in ["replay", "replay_failed", "purge_failed"] {
        let stage = Stage::set().await?;
        stage.receiver.reply_with(refuse("a1", 3));
        stage.hook("hook", r#"{"base": 0.02, "max_attempts": 3, "on_failure": "block"}"#).await?;
        stage.publish(&["a1", "a2", "b1"]).await?;
        stage
            .session
            .until("SELECT array_agg(status ORDER BY id) = '{failed,pending,processed}' FROM outbox_events", LONG)
            .await?;
        stage.publish(&["a3", "b2"]).await?;
        stage.session.until("SELECT count(*) = 2 FROM outbox_events WHERE status = 'processed'", LONG).await?;
        assert!(!stage.requests("/hook").iter().any(|name| name == "a2" || name == "a3"));
        let call = match way_out {
            "replay" => "SELECT outbox.replay(event_id) FROM outbox_events WHERE event_type = 'test.a1'",
            "replay_failed" => "SELECT outbox.replay_failed('test.*', 'hook') = 1",
            _ => "SELECT outbox.purge_failed() = 1",
        };
        assert!(stage.session.one::<bool>(call).await?, "{call}");
        stage.processed().await?;
        let requests = stage.requests("/hook");
        let tries = if way_out == "purge_failed" { 3 } else { 4 };
        assert_eq!(requests.iter().filter(|name| *name == "a1").count(), tries, "{way_out}: {requests:?}");
        let order: Vec<_> = ["a1", "a2", "a3"].iter().map(|name| position(&requests, name)).collect();
        assert!(order.is_sorted(), "{way_out}: {requests:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_retry_goes_only_to_the_destination_still_owed() -> Result<()> {
    let stage = Stage::set().await?;
    stage.receiver.reply_with(|number, request| match request.path.as_str() {
        "/bad" if number < 4 => Reply::Status(503),
        _ => Reply::Accept,
    });
    for (name, settings) in [("good", "{}"), ("bad", r#"{"base": 0.02, "max_attempts": 20}"#), ("fine", "{}")] {
        stage.hook(name, settings).await?;
    }
    stage.publish(&["a1"]).await?;
    stage.processed().await?;
    assert_eq!((stage.requests("/good").len(), stage.requests("/fine").len()), (1, 1));
    assert!(stage.requests("/bad").len() > 1);
    assert_eq!(stage.session.one::<i64>("SELECT count(*) FROM outbox.deliveries").await?, 0);
    Ok(())
}

#[tokio::test]
async fn a_destination_that_is_down_uses_no_attempts_and_drains_in_order() -> Result<()> {
    let stage = Stage::set().await?;
    let port = scratch::free_port()?;
    let url = format!("http://127.0.0.1:{port}/");
    stage.session.execute("SELECT outbox.add_webhook('down', $1)", &[&url]).await?;
    let names: Vec<String> = (0..60).map(|n| format!("{}{n}", ["a", "b", "c"][n % 3])).collect();
    stage.publish(&names.iter().map(String::as_str).collect::<Vec<_>>()).await?;
    stage.session.until("SELECT circuit_failures >= 2 FROM outbox.destinations", LONG).await?;
    let row = stage.session.query_one("SELECT state, last_error FROM outbox.destinations", &[]).await?;
    assert!(["open", "half-open"].contains(&row.get(0)), "{row:?}");
    assert!(row.get::<_, Option<&str>>(1).is_some_and(|error| error.contains("refused")), "{row:?}");
    assert_eq!(stage.session.one::<i64>("SELECT sum(attempts) FROM outbox.deliveries").await?, 0);
    assert_eq!(stage.session.one::<i64>("SELECT sum(retry_count) FROM outbox_events").await?, 0);

    let back = Receiver::on(port)?;
    stage.processed().await?;
    let requests: Vec<String> = back.received().iter().map(name).collect();
    assert_eq!(requests.len(), 60);
    let mut latest: HashMap<&str, usize> = HashMap::new();
    for request in &requests {
        let (aggregate, number) = request.split_at(1);
        let number: usize = number.parse()?;
        assert!(latest.insert(aggregate, number).is_none_or(|before| before < number), "{requests:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_scheduled_event_is_delivered_at_its_moment() -> Result<()> {
    let stage = Stage::set().await?;
    stage.hook("hook", "{}").await?;
    let wait = Duration::from_millis(700);
    let due = SystemTime::now() + wait;
    stage
        .session
        .execute(
            "SELECT outbox.publish('later', '{\"n\": \"later\"}', available_at => clock_timestamp() + $1::text::interval)",
            &[&"0.7 s"],
        )
        .await?;
    stage.publish(&["a1"]).await?;
    stage.processed().await?;
    let received = stage.receiver.received();
    assert_eq!(received.iter().map(name).collect::<Vec<_>>(), ["a1", "later"]);
    assert!(received[1].at >= due, "too early");
    assert_eq!(stage.session.one::<i64>("SELECT count(*) FROM outbox.deliveries").await?, 0);
    Ok(())
}

#[tokio::test]
async fn a_transaction_that_commits_late_is_delivered_at_once() -> Result<()> {
    let stage = Stage::set().await?;
    stage.hook("hook", "{}").await?;
    let database: String = stage.session.one("SELECT current_database()::text").await?;
    let late = Cluster::shared().await?.connect(&database).await?;
    late.batch_execute("BEGIN; SELECT outbox.publish('late', '{\"n\": \"late\"}')").await?;
    for _ in 0..3 {
        stage.publish(&["a1", "b1"]).await?;
        stage.processed().await?;
    }
    late.batch_execute("COMMIT").await?;
    stage.processed().await?;
    assert_eq!(stage.requests("/hook").last().map(String::as_str), Some("late"));
    Ok(())
}

#[tokio::test]
async fn operators_pause_resume_change_and_remove_destinations() -> Result<()> {
    let stage = Stage::set().await?;
    stage.hook("one", "{}").await?;
    stage.hook("two", "{}").await?;
    stage.session.execute("SELECT outbox.pause('two')", &[]).await?;
    stage.publish(&["a1"]).await?;
    stage.receiver.wait_for(1, LONG).await?;
    stage.session.until("SELECT count(*) = 1 FROM outbox.deliveries WHERE destination = 'two'", LONG).await?;
    assert_eq!(stage.requests("/two"), [""; 0]);
    stage.session.execute("SELECT outbox.resume('two')", &[]).await?;
    stage.processed().await?;
    assert_eq!(stage.requests("/two"), ["a1"]);

    // A new address for the same name.
    let moved = stage.receiver.url("moved");
    stage.session.execute("SELECT outbox.add_webhook('two', $1)", &[&moved]).await?;
    stage.publish(&["a2"]).await?;
    stage.processed().await?;
    assert_eq!((stage.requests("/two").len(), stage.requests("/moved")), (1, vec!["a2".to_owned()]));

    stage.session.execute("SELECT outbox.pause('two')", &[]).await?;
    stage.publish(&["a3"]).await?;
    stage.session.until("SELECT count(*) = 1 FROM outbox.deliveries WHERE destination = 'two'", LONG).await?;
    stage.session.execute("SELECT outbox.remove_destination('two')", &[]).await?;
    stage.processed().await?;
    let error = stage.session.execute("SELECT outbox.resume('two')", &[]).await.err().context("no error")?;
    assert_eq!(error.code().map(|code| code.code()), Some("42704"));
    Ok(())
}

#[tokio::test]
async fn replay_delivers_again() -> Result<()> {
    let stage = Stage::set().await?;
    stage.hook("one", "{}").await?;
    stage.hook("two", "{}").await?;
    stage.publish(&["a1"]).await?;
    stage.processed().await?;
    let replay = |arguments: &str| format!("SELECT outbox.replay(event_id{arguments}) FROM outbox_events");
    assert!(stage.session.one::<bool>(&replay(", 'two'")).await?);
    stage.receiver.wait_for(3, LONG).await?;
    stage.processed().await?;
    assert_eq!((stage.requests("/one").len(), stage.requests("/two").len()), (1, 2));
    assert!(stage.session.one::<bool>(&replay("")).await?);
    stage.receiver.wait_for(5, LONG).await?;
    stage.processed().await?;
    assert!(!stage.session.one::<bool>("SELECT outbox.replay(gen_random_uuid())").await?);
    let ids: Vec<_> = stage.receiver.received().iter().map(Received::event_id).collect::<Result<_>>()?;
    assert!(ids.iter().all(|id| *id == ids[0]), "the identity stays");
    Ok(())
}

#[tokio::test]
async fn events_nobody_wants_are_processed_and_counted() -> Result<()> {
    let stage = Stage::set().await?;
    // Without any destination they wait for the first.
    stage.publish(&["a1", "b1"]).await?;
    let url = stage.receiver.url("hook");
    stage.session.execute("SELECT outbox.add_webhook('hook', $1, '{test.a*,*.c1}')", &[&url]).await?;
    stage.publish(&["c1", "d1"]).await?;
    stage.processed().await?;
    let mut requests = stage.requests("/hook");
    requests.sort();
    assert_eq!(requests, ["a1", "c1"]);
    stage.session.until("SELECT total_unrouted = 2 FROM outbox.stats()", LONG).await
}

#[tokio::test]
async fn retention_removes_what_was_processed_and_nothing_else() -> Result<()> {
    let cluster = Cluster::with(&[("outbox.retention", "1s")]).await?;
    let database = cluster.database().await?;
    let session = cluster.connect(&database).await?;
    session
        .batch_execute(
            "INSERT INTO outbox_events (event_type, event_data) SELECT 'a.b', '{}' FROM generate_series(1, 2500)",
        )
        .await?;
    let token: i64 = session.one("SELECT DISTINCT claim_token FROM outbox.claim(2498)").await?;
    assert!(session.one::<bool>(&format!("SELECT outbox.reject({token}, min(id), 'no') FROM outbox_events")).await?);
    assert_eq!(session.one::<i64>(&format!("SELECT outbox.ack({token})")).await?, 2497);
    let left = "SELECT string_agg(status, ' ' ORDER BY id) = 'failed pending pending' FROM outbox_events";
    session.until(left, LONG).await?;
    session.until("SELECT pending = 2 AND failed = 1 AND processed = 0 FROM outbox.stats()", LONG).await?;
    assert_eq!(session.one::<i64>("SELECT outbox.purge_failed('1 hour')").await?, 0);
    assert_eq!(session.one::<i64>("SELECT outbox.purge_failed()").await?, 1);
    Ok(())
}

#[tokio::test]
async fn retention_goes_past_what_stays_and_then_rests() -> Result<()> {
    let cluster = Cluster::with(&[("outbox.retention", "1s")]).await?;
    let database = cluster.database().await?;
    let session = cluster.connect(&database).await?;
    // More than one step looks at, in front and behind.
    session
        .batch_execute(
            "INSERT INTO outbox_events (event_type, event_data, available_at)
             SELECT 'stays', '{}', now() + interval '1 day' FROM generate_series(1, 12000);
             INSERT INTO outbox_events (event_type, event_data) SELECT 'goes', '{}' FROM generate_series(1, 30);
             INSERT INTO outbox_events (event_type, event_data, available_at)
             SELECT 'stays', '{}', now() + interval '1 day' FROM generate_series(1, 12000);",
        )
        .await?;
    let mut settled = 0;
    while settled < 30 {
        let token: Option<i64> = session.one("SELECT max(claim_token) FROM outbox.claim(1000)").await?;
        if let Some(token) = token {
            settled += session.one::<i64>(&format!("SELECT outbox.ack({token})")).await?;
        }
    }
    session.until("SELECT count(*) = 24000 AND bool_and(event_type = 'stays') FROM outbox_events", LONG).await?;
    drop(session);
    cluster.falls_silent(&database).await
}

#[tokio::test]
async fn retries_wait_longer_each_time_and_no_longer_than_the_cap() -> Result<()> {
    let cluster = Cluster::shared().await?;
    let session = cluster.connect(&cluster.database().await?).await?;
    session
        .batch_execute(
            "SELECT outbox.add_webhook('hook', 'https://example.com/', settings => '{\"base\": 60, \"cap\": \"5 minutes\"}');
             SELECT outbox.publish('a', '{}');",
        )
        .await?;
    for most in [60.0, 120.0, 240.0, 300.0, 300.0] {
        let (id, token) = {
            let row = session.query_one("SELECT id, claim_token FROM outbox.claim()", &[]).await?;
            (row.get::<_, i64>(0), row.get::<_, i64>(1))
        };
        assert!(session.one::<bool>(&format!("SELECT outbox.fail({token}, {id}, 'no')")).await?);
        let wait: f64 = session
            .one("SELECT extract(epoch FROM next_attempt_at - clock_timestamp())::float8 FROM outbox.deliveries")
            .await?;
        assert!(wait <= most, "{wait} s, where {most} s are the most");
        session.batch_execute("UPDATE outbox.delivery SET next_attempt_at = clock_timestamp()").await?;
    }
    let look = async || Ok((session.one::<i32>("SELECT attempts FROM outbox.deliveries").await? == 5).then_some(()));
    wait::until("five attempts", LONG, look).await
}

//! Webhooks: signatures as the reference library verifies them, what is sent, and that secrets are shown nowhere.

use anyhow::{Context, Result};
use outbox_tests::broker::Broker;
use outbox_tests::receiver::{Received, Receiver, Reply};
use outbox_tests::reference::verifies;
use outbox_tests::relay::Relay;
use outbox_tests::wait::{self, LONG};
use outbox_tests::world::World;
use uuid::Uuid;

pub fn text(status: u16, body: &str) -> Reply {
    Reply::With(status, Vec::new(), body.as_bytes().to_vec())
}

fn signatures(request: &Received) -> usize {
    request.header("webhook-signature").unwrap_or_default().split(' ').filter(|part| part.starts_with("v1,")).count()
}

#[tokio::test]
async fn the_reference_library_verifies_what_is_sent() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    let secret = world.add_webhook("hook", &receiver.url("hook"), "{}").await?;
    assert!(secret.starts_with("whsec_"), "a signing secret");
    let _relay = world.relay().await?;
    world.execute(
        r#"SELECT outbox.publish('contact.created', '{"name": "Zoë 😀", "amount": 12345678901234567890.10}', 'contact', '42',
                  '{"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}', tenant_id => 'acme')"#,
    )
    .await?;
    let mut request = receiver.wait_for(1, LONG).await?.remove(0);
    assert!(verifies(&secret, &request)?);
    assert_eq!(signatures(&request), 1);
    assert!(!verifies("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", &request)?);

    let event: Uuid = world.session.one("SELECT event_id FROM outbox_events").await?;
    assert_eq!((request.event_id()?, request.method.as_str(), request.path.as_str()), (event, "POST", "/hook"));
    assert_eq!(request.header("content-type"), Some("application/json"));
    assert_eq!(request.header("traceparent"), Some("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"));
    let body = request.json()?;
    assert_eq!(body["type"], "contact.created");
    assert_eq!(body["data"]["name"], "Zoë 😀");
    assert_eq!(body["id"], event.to_string());
    let same = "SELECT created_at = $1::text::timestamptz AND $1 LIKE '%T%Z' FROM outbox_events";
    assert!(world.session.query_one(same, &[&body["timestamp"].as_str()]).await?.get::<_, bool>(0), "{body}");
    assert_eq!(
        (&body["aggregate_type"], &body["aggregate_id"], &body["tenant_id"], &body["version"]),
        (&"contact".into(), &"42".into(), &"acme".into(), &"v1".into())
    );
    assert!(String::from_utf8_lossy(&request.body).contains("12345678901234567890.10"));

    request.body.push(b' ');
    assert!(!verifies(&secret, &request)?);
    world.processed().await
}

#[tokio::test]
async fn while_a_secret_is_rotated_the_old_and_the_new_one_verify() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    let old = world.add_webhook("hook", &receiver.url("hook"), "{}").await?;
    let relay = world.relay().await?;
    relay.logged(r#""message":"served""#, LONG).await?;
    let new: String = world.session.one("SELECT outbox.rotate_secret('hook')").await?;
    relay.logged(r#""message":"changed""#, LONG).await?;
    assert_ne!(old, new);
    assert!(world.session.one::<bool>("SELECT rotating FROM outbox.destinations").await?);
    world.publish("1").await?;
    let request = receiver.wait_for(1, LONG).await?.remove(0);
    assert_eq!(signatures(&request), 2);
    assert!(verifies(&old, &request)? && verifies(&new, &request)?);

    // The grace of the one before last is over at once, that of the last one by itself.
    let newest: String = world.session.one("SELECT outbox.rotate_secret('hook', '300 ms')").await?;
    let only_one = async || {
        world.publish("1").await?;
        world.processed().await?;
        Ok(receiver.received().pop().filter(|request| signatures(request) == 1))
    };
    let request = wait::until("the end of the grace", LONG, only_one).await?;
    assert!(verifies(&newest, &request)? && !verifies(&new, &request)? && !verifies(&old, &request)?);
    world.until("SELECT NOT rotating FROM outbox.destinations").await
}

#[tokio::test]
async fn every_attempt_has_the_same_id_and_a_signature_of_its_own() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    receiver.reply_with(|before, _| if before < 2 { Reply::Status(500) } else { Reply::Accept });
    let secret = world.add_webhook("hook", &receiver.url("hook"), r#"{"base": 0.01}"#).await?;
    let _relay = world.relay().await?;
    let event = world.publish("1").await?;
    for request in receiver.wait_for(3, LONG).await? {
        assert_eq!(request.event_id()?, event);
        assert!(verifies(&secret, &request)?);
    }
    world.processed().await?;
    assert_eq!(world.session.one::<i32>("SELECT retry_count FROM outbox_events").await?, 2);
    Ok(())
}

#[tokio::test]
async fn own_headers_are_sent_and_not_shown() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    let settings = r#"{"headers": {"X-Api-Key": "key-of-the-receiver", "authorization": "Bearer abc"}}"#;
    world.add_webhook("hook", &receiver.url("hook"), settings).await?;
    let relay = world.relay().await?;
    world.publish("1").await?;
    let request = receiver.wait_for(1, LONG).await?.remove(0);
    assert_eq!(request.header("x-api-key"), Some("key-of-the-receiver"));
    assert_eq!(request.header("authorization"), Some("Bearer abc"));
    let shown: String = world.session.one("SELECT d::text FROM outbox.destinations d").await?;
    assert!(shown.contains("X-Api-Key") && !shown.contains("key-of-the-receiver") && !shown.contains("abc"), "{shown}");
    world.processed().await?;

    // What is signed can't be replaced.
    for headers in [r#"{"Webhook-Id": "x"}"#, r#"{"a b": "x"}"#, r#"{"x": "hidden\nword"}"#, r#"["x"]"#] {
        let settings = format!(r#"{{"headers": {headers}}}"#);
        let refused = world.add_webhook("hook", &receiver.url("hook"), &settings).await.err().context("not refused")?;
        let refused = format!("{refused:#}");
        assert!(refused.contains("settings.headers") && !refused.contains("hidden"), "{headers}: {refused}");
    }
    assert_eq!(relay.terminate(LONG).await?.code(), Some(0));
    Ok(())
}

#[tokio::test]
async fn cloudevents_are_in_structured_mode() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    let secret = world.add_webhook("hook", &receiver.url("hook"), r#"{"format": "cloudevents"}"#).await?;
    let _relay = world.relay().await?;
    let event = world.publish("42").await?;
    let request = receiver.wait_for(1, LONG).await?.remove(0);
    assert_eq!(request.header("content-type"), Some("application/cloudevents+json"));
    let body = request.json()?;
    assert_eq!((&body["specversion"], &body["type"]), (&"1.0".into(), &"contact.created".into()));
    assert_eq!((&body["id"], &body["subject"]), (&event.to_string().into(), &"42".into()));
    assert_eq!((&body["data"]["name"], &body["datacontenttype"]), (&"Ada".into(), &"application/json".into()));
    assert!(body["source"].as_str().is_some_and(|source| !source.is_empty()), "{body}");
    let same = "SELECT created_at = $1::text::timestamptz FROM outbox_events";
    assert!(world.session.query_one(same, &[&body["time"].as_str()]).await?.get::<_, bool>(0), "{body}");
    let name_is_valid = |name: &String| name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    let names: Vec<&String> = body.as_object().context("an object")?.keys().collect();
    assert!(names.iter().all(|name| name_is_valid(name)), "{names:?}");
    assert!(verifies(&secret, &request)?);
    world.processed().await
}

#[tokio::test]
async fn a_body_of_many_megabytes_arrives_whole() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    let secret = world.add_webhook("hook", &receiver.url("hook"), "{}").await?;
    let _relay = world.relay().await?;
    world.execute("SELECT outbox.publish('contact.grown', to_jsonb(repeat('x', 20 * 1024 * 1024)))").await?;
    let request = receiver.wait_for(1, LONG).await?.remove(0);
    assert_eq!(request.json()?["data"].as_str().map(str::len), Some(20 * 1024 * 1024));
    assert_eq!(request.header("content-length"), Some(request.body.len().to_string().as_str()));
    assert!(verifies(&secret, &request)?);
    world.processed().await
}

#[tokio::test]
async fn secrets_are_shown_nowhere() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    receiver.reply_with(|before, _| match before {
        0 => text(500, "no"),
        1 => Reply::Never,
        _ => Reply::Accept,
    });
    let settings = r#"{"base": 0.01, "timeout": 0.5, "max_attempts": 3, "headers": {"x-api-key": "value-of-header"}}"#;
    let first = world.add_webhook("hook", &receiver.url("hook?token=token-of-url"), settings).await?;
    let dead = format!("http://127.0.0.1:{}/x?token=token-of-url", outbox_tests::scratch::free_port()?);
    let second = world.add_webhook("dead", &dead, settings).await?;
    let relay = Relay::with(&world.cluster.url(&world.database), None, &[("OUTBOX_LOG_LEVEL", "trace")]).await?;
    let third: String = world.session.one("SELECT outbox.rotate_secret('hook')").await?;
    world.publish("1").await?;
    receiver.wait_for(3, LONG).await?;
    world.until("SELECT NOT bool_or(destination = 'hook') FROM outbox.deliveries").await?;
    world.until("SELECT count(*) = 1 AND bool_and(last_error IS NOT NULL) FROM outbox.deliveries").await?;

    let mut shown = relay.log();
    for page in ["/metrics", "/readyz", "/healthz"] {
        shown += &relay.get(page).await?.1;
    }
    let everything = "SELECT concat((SELECT string_agg(d::text, ' ') FROM outbox.destinations d),
                                    (SELECT string_agg(d::text, ' ') FROM outbox.deliveries d),
                                    (SELECT string_agg(e::text, ' ') FROM outbox_events e),
                                    (SELECT string_agg(h::text, ' ') FROM outbox.health() h),
                                    (SELECT string_agg(s::text, ' ') FROM outbox.stats() s))";
    shown += &world.session.one::<String>(everything).await?;
    assert!(shown.contains("can't connect") && shown.contains("500 Internal Server Error"), "{shown}");
    for secret in [&first, &second, &third] {
        let bare = secret.trim_start_matches("whsec_").trim_end_matches('=');
        assert!(!shown.contains(bare), "a signing secret is shown");
    }
    for other in ["token-of-url", "value-of-header"] {
        let found = shown.find(other).map(|at| shown[at.saturating_sub(300)..].chars().take(400).collect::<String>());
        assert_eq!(found, None);
    }
    assert!(relay.terminate(LONG).await?.success());
    Ok(())
}

#[tokio::test]
async fn a_dead_webhook_delays_no_other_destination() -> Result<()> {
    const EVENTS: usize = 300;
    let world = World::new().await?;
    let broker = Broker::shared().await?;
    let channel = broker.channel().await?;
    channel.bind("outbox_events", "#", "all").await?;
    let mut queue = channel.consume("all").await?;
    let (dead, alive) = (Receiver::start()?, Receiver::start()?);
    dead.reply(Reply::Never);
    world
        .add_webhook("dead", &dead.url("hook"), r#"{"timeout": 3, "base": 0.1, "cap": 0.1, "max_attempts": 1000}"#)
        .await?;
    world.add_webhook("alive", &alive.url("hook"), "{}").await?;
    world.execute("SELECT outbox.add_rabbitmq('queue')").await?;
    let _relay = Relay::start(world.cluster, &world.database, Some(&broker)).await?;
    world.execute(&format!(
        "SELECT outbox.publish('contact.created', '{{}}', 'contact', (n % 50)::text) FROM generate_series(1, {EVENTS}) n"
    ))
    .await?;
    queue.take(EVENTS, LONG).await?;
    alive.wait_for(EVENTS, LONG).await?;
    world
        .until(&format!("SELECT count(*) = {EVENTS} AND bool_and(destination = 'dead') FROM outbox.deliveries"))
        .await?;
    world.until("SELECT NOT bool_or(status IN ('processed', 'failed')) FROM outbox_events").await?;

    dead.reply(Reply::Accept);
    world.processed().await?;
    // The order of each aggregate held where nothing was sent twice.
    let ids: Vec<Uuid> = alive.received().iter().map(Received::event_id).collect::<Result<_>>()?;
    let sql = "SELECT bool_and(o) FROM (SELECT e.id > lag(e.id, 1, 0::bigint) OVER (PARTITION BY e.aggregate_id ORDER BY u.n) AS o
                 FROM unnest($1::uuid[]) WITH ORDINALITY AS u (event_id, n) JOIN outbox_events e USING (event_id)) x";
    assert_eq!((ids.len(), world.session.query_one(sql, &[&ids]).await?.get::<_, bool>(0)), (EVENTS, true));
    Ok(())
}

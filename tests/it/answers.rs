//! What a receiver answers, or does not: each answer has an outcome of its own.

use std::time::Duration;

use anyhow::{Context, Result};
use outbox_tests::receiver::{Receiver, Reply};
use outbox_tests::wait::LONG;
use outbox_tests::world::World;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::webhooks::text;

#[tokio::test]
async fn a_redirect_is_not_followed() -> Result<()> {
    let world = World::new().await?;
    let (receiver, elsewhere) = (Receiver::start()?, Receiver::start()?);
    let target = elsewhere.url("stolen");
    receiver.reply_with(move |before, _| match [301, 302, 303, 307, 308].get(before) {
        Some(status) => Reply::With(*status, vec![("location", target.clone())], Vec::new()),
        None => Reply::Accept,
    });
    world.add_webhook("hook", &receiver.url("hook"), r#"{"base": 0.1, "cap": 0.1, "max_attempts": 5}"#).await?;
    let _relay = world.relay().await?;
    world.publish("1").await?;
    world.until("SELECT status = 'failed' AND retry_count = 5 FROM outbox_events").await?;
    world.error("308 Permanent Redirect: redirects are not followed").await?;
    assert_eq!((receiver.count(), elsewhere.count()), (5, 0));
    world.execute("SELECT outbox.replay_failed()").await?;
    world.processed().await
}

#[tokio::test]
async fn gone_disables_the_destination_until_it_is_resumed() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    receiver.reply(text(410, "we moved"));
    world.add_webhook("hook", &receiver.url("hook"), "{}").await?;
    let relay = world.relay().await?;
    world.publish("1").await?;
    world.until("SELECT state = 'disabled' AND last_error = '410 Gone: we moved' FROM outbox.destinations").await?;
    world.until("SELECT status = 'failed' AND last_error = '410 Gone: we moved' FROM outbox_events").await?;
    relay.logged("no longer served", LONG).await?;
    world.publish("2").await?;
    assert_eq!(world.session.one::<i64>("SELECT count(*) FROM outbox_events WHERE status = 'pending'").await?, 1);
    assert_eq!(receiver.count(), 1);

    receiver.reply(Reply::Accept);
    world.execute("SELECT outbox.resume('hook')").await?;
    world.until("SELECT count(*) = 1 FROM outbox_events WHERE status = 'processed'").await?;
    world.execute("SELECT outbox.replay_failed()").await?;
    world.processed().await?;
    assert_eq!(receiver.count(), 3);
    Ok(())
}

#[tokio::test]
async fn retry_after_is_honoured() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    let date: String = world
        .session
        .one(r#"SELECT to_char(now() AT TIME ZONE 'UTC' + interval '2 hours', 'Dy, DD Mon YYYY HH24:MI:SS "GMT"')"#)
        .await?;
    let after = |status: u16, value: &str| Reply::With(status, vec![("retry-after", value.to_owned())], Vec::new());
    let replies = [
        ("429", after(429, "3600"), 3600),
        ("503", after(503, "5400"), 5400),
        ("date", after(429, &date), 7200),
        ("capped", after(503, "999999999"), 86_400),
    ];
    for (name, ..) in &replies {
        world.add_webhook(name, &receiver.url(name), "{}").await?;
    }
    let by_path = replies.clone();
    receiver.reply_with(move |_, request| {
        let found = by_path.iter().find(|(name, ..)| request.path.ends_with(name));
        found.map(|(_, reply, _)| reply.clone()).unwrap_or_default()
    });
    let _relay = world.relay().await?;
    world.publish("1").await?;
    world
        .until("SELECT count(*) = 4 AND bool_and(attempts = 0 AND last_error IS NOT NULL) FROM outbox.deliveries")
        .await?;
    world.until("SELECT bool_and(state = 'open') FROM outbox.destinations").await?;
    for (name, _, seconds) in &replies {
        let wait: f64 = world
            .session
            .query_one(
                "SELECT extract(epoch FROM circuit_open_until - now())::float8 FROM outbox.destinations WHERE name = $1",
                &[name],
            )
            .await?
            .get(0);
        assert!((f64::from(*seconds) - 120.0..=f64::from(*seconds)).contains(&wait), "{name}: {wait} s");
    }
    // It holds for all that is owed to them.
    world.publish("2").await?;
    world.until("SELECT count(*) = 2 AND bool_and(status = 'pending') FROM outbox_events").await?;
    assert_eq!(receiver.count(), 4);
    let errors = "SELECT string_agg(last_error, '; ' ORDER BY last_error) FROM outbox.destinations";
    let (many, away) = ("429 Too Many Requests", "503 Service Unavailable");
    assert_eq!(world.session.one::<String>(errors).await?, [many, many, away, away].join("; "));
    Ok(())
}

#[tokio::test]
async fn after_the_time_that_the_receiver_asked_for_it_is_tried_again() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    receiver.reply_with(|before, _| match before {
        0 => Reply::With(503, vec![("retry-after", "2".into())], b"busy".to_vec()),
        _ => Reply::Accept,
    });
    world.add_webhook("hook", &receiver.url("hook"), r#"{"base": 0.001}"#).await?;
    let _relay = world.relay().await?;
    world.publish("1").await?;
    let requests = receiver.wait_for(2, LONG).await?;
    assert!(requests[1].at.duration_since(requests[0].at)? >= Duration::from_millis(1900));
    world.processed().await?;
    assert_eq!(
        world.session.one::<String>("SELECT last_error FROM outbox_events").await?,
        "503 Service Unavailable: busy"
    );
    Ok(())
}

#[tokio::test]
async fn what_the_receiver_refuses_is_tried_again_and_then_a_dead_letter() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    receiver.reply_with(|before, _| match before {
        0 => text(500, "first"),
        1 => text(404, "second\nline\u{7}"),
        2 => text(422, "third"),
        3 => text(400, &"x".repeat(100_000)),
        _ => Reply::Accept,
    });
    world.add_webhook("hook", &receiver.url("hook"), r#"{"base": 1e6, "cap": 1e6, "max_attempts": 4}"#).await?;
    let _relay = world.relay().await?;
    let event = world.publish("1").await?;
    for (attempts, error) in [
        (1, "500 Internal Server Error: first"),
        (2, "404 Not Found: second line"),
        (3, "422 Unprocessable Entity: third"),
    ] {
        world.until(&format!("SELECT attempts = {attempts} AND last_error = '{error}' FROM outbox.deliveries")).await?;
        // In two transactions: claims lock in another order.
        world.execute("UPDATE outbox.delivery SET next_attempt_at = now()").await?;
        world.execute("SELECT outbox.resume('hook')").await?;
    }
    world.until("SELECT status = 'failed' AND retry_count = 4 FROM outbox_events").await?;
    let error: String = world.session.one("SELECT last_error FROM outbox_events").await?;
    assert!(error.starts_with("400 Bad Request: xxx") && error.len() < 300, "{error}");
    assert_eq!(world.session.one::<String>("SELECT state FROM outbox.destinations").await?, "active");
    assert!(world.session.query_one("SELECT outbox.replay($1)", &[&event]).await?.get::<_, bool>(0));
    world.processed().await
}

#[tokio::test]
async fn a_body_too_large_for_the_receiver_is_a_dead_letter_at_once() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    receiver.reply(text(413, "1 MB at most"));
    world.add_webhook("hook", &receiver.url("hook"), "{}").await?;
    let _relay = world.relay().await?;
    world.publish("1").await?;
    world.until("SELECT status = 'failed' AND retry_count = 1 FROM outbox_events").await?;
    world.error("too large for the receiver: 413 Payload Too Large: 1 MB at most").await
}

#[tokio::test]
async fn an_answer_without_end_is_read_to_a_limit() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    receiver.reply_with(|before, _| Reply::EndlessBody(if before < 20 { 500 } else { 200 }));
    world
        .add_webhook(
            "hook",
            &receiver.url("hook"),
            r#"{"base": 0.01, "cap": 0.01, "max_attempts": 1000, "timeout": 300}"#,
        )
        .await?;
    let relay = world.relay().await?;
    for n in 0..10 {
        world.publish(&n.to_string()).await?;
    }
    world.processed().await?;
    assert!(receiver.count() >= 30, "{} requests", receiver.count());
    let error: String =
        world.session.one("SELECT last_error FROM outbox_events WHERE last_error IS NOT NULL LIMIT 1").await?;
    assert!(error.starts_with("500 Internal Server Error: xxx") && error.len() < 300, "{error}");
    let status = std::fs::read_to_string(format!("/proc/{}/status", relay.pid()))?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    let kilobytes: u64 = peak.trim().trim_end_matches(" kB").parse()?;
    assert!(kilobytes < 256 * 1024, "the relay took {kilobytes} kB");
    Ok(())
}

#[tokio::test]
async fn no_answer_has_an_end() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    receiver.reply_with(|before, _| if before < 2 { Reply::Never } else { Reply::Accept });
    world.add_webhook("hook", &receiver.url("hook"), r#"{"timeout": 0.5, "base": 0.1, "cap": 0.1}"#).await?;
    let _relay = world.relay().await?;
    world.publish("1").await?;
    world.processed().await?;
    assert_eq!(world.session.one::<String>("SELECT last_error FROM outbox_events").await?, "no answer within 0.5 s");
    assert_eq!(world.session.one::<i32>("SELECT retry_count FROM outbox_events").await?, 2);
    Ok(())
}

/// Reads a request's head, answers with this text, and then says nothing more while the connection stays open.
async fn stall(listener: TcpListener, answer: &'static str) -> Result<()> {
    let mut open: Vec<TcpStream> = Vec::new();
    loop {
        let (mut stream, _) = listener.accept().await?;
        let mut buffer = [0; 65_536];
        let _read = stream.read(&mut buffer).await?;
        stream.write_all(answer.as_bytes()).await?;
        open.push(stream);
    }
}

#[tokio::test]
async fn an_answer_that_stops_midway_has_an_end() -> Result<()> {
    let world = World::new().await?;
    for (name, answer) in [
        ("accepted", "HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nthank you"),
        ("refused", "HTTP/1.1 500 Oops\r\ncontent-length: 1000\r\n\r\nwell"),
        ("nothing", ""),
        ("half", "HTTP/1.1 20"),
        ("other", "SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n\r\n"),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("http://{}/", listener.local_addr()?);
        tokio::spawn(stall(listener, answer));
        world.add_webhook(name, &url, r#"{"timeout": 0.5, "max_attempts": 1}"#).await?;
    }
    let _relay = world.relay().await?;
    world.publish("1").await?;
    world.until("SELECT status = 'failed' FROM outbox_events").await?;
    for (name, error) in [
        ("refused", "500 Internal Server Error: well"),
        ("nothing", "no answer within 0.5 s"),
        ("half", "no answer within 0.5 s"),
        ("other", "no answer: "),
    ] {
        let sql = "SELECT status || ': ' || last_error FROM outbox.deliveries WHERE destination = $1";
        let shown: String = world.session.query_one(sql, &[&name]).await?.get(0);
        assert!(shown.starts_with(&format!("failed: {error}")), "{name}: {shown}");
    }
    assert_eq!(world.session.one::<i64>("SELECT count(*) FROM outbox.deliveries").await?, 4);
    Ok(())
}

//! Webhooks: signatures as the reference library verifies them, every answer's own outcome, and which addresses are
//! reached.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use outbox_tests::broker::Broker;
use outbox_tests::cluster::Cluster;
use outbox_tests::receiver::{Received, Receiver, Reply};
use outbox_tests::reference::verifies;
use outbox_tests::relay::Relay;
use outbox_tests::session::Session;
use outbox_tests::wait::{self, LONG};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use uuid::Uuid;

pub struct Site {
    pub cluster: &'static Cluster,
    pub database: String,
    pub session: Session,
}

impl Site {
    pub async fn new() -> Result<Self> {
        let cluster = Cluster::shared().await?;
        let database = cluster.database().await?;
        let session = cluster.connect(&database).await?;
        Ok(Site { cluster, database, session })
    }

    /// Adds a webhook and returns its secret.
    pub async fn add(&self, name: &str, url: &str, settings: &str) -> Result<String> {
        let sql = "SELECT outbox.add_webhook($1, $2, settings => $3::text::jsonb)";
        Ok(self.session.query_one(sql, &[&name, &url, &settings]).await?.get(0))
    }

    pub async fn relay(&self) -> Result<Relay> {
        Relay::start(self.cluster, &self.database, None).await
    }

    pub async fn publish(&self, aggregate: &str) -> Result<Uuid> {
        let sql = "SELECT outbox.publish('contact.created', '{\"name\": \"Ada\"}', 'contact', $1)";
        Ok(self.session.query_one(sql, &[&aggregate]).await?.get(0))
    }

    pub async fn until(&self, condition: &str) -> Result<()> {
        self.session.until(condition, LONG).await
    }

    pub async fn execute(&self, sql: &str) -> Result<()> {
        Ok(self.session.batch_execute(sql).await?)
    }

    /// Waits for an error that holds this text, both in a delivery and in its event, which does not count as processed.
    async fn error(&self, text: &str) -> Result<()> {
        let like = format!("'%{}%'", text.replace('\'', "''"));
        self.until(&format!("SELECT bool_or(last_error LIKE {like}) FROM outbox.deliveries")).await?;
        let statuses =
            format!("SELECT string_agg(DISTINCT status, ' ') FROM outbox_events WHERE last_error LIKE {like}");
        let statuses: Option<String> = self.session.one(&statuses).await?;
        ensure!(statuses.as_ref().is_some_and(|s| !s.contains("processed")), "{text:?} is shown for {statuses:?}");
        Ok(())
    }

    pub async fn processed(&self) -> Result<()> {
        self.until("SELECT bool_and(status = 'processed') FROM outbox_events").await
    }
}

fn text(status: u16, body: &str) -> Reply {
    Reply::With(status, Vec::new(), body.as_bytes().to_vec())
}

fn signatures(request: &Received) -> usize {
    request.header("webhook-signature").unwrap_or_default().split(' ').filter(|part| part.starts_with("v1,")).count()
}

#[tokio::test]
async fn the_reference_library_verifies_what_is_sent() -> Result<()> {
    let site = Site::new().await?;
    let receiver = Receiver::start()?;
    let secret = site.add("hook", &receiver.url("hook"), "{}").await?;
    assert!(secret.starts_with("whsec_"), "a signing secret");
    let _relay = site.relay().await?;
    site.execute(
        r#"SELECT outbox.publish('contact.created', '{"name": "Zoë 😀", "amount": 12345678901234567890.10}', 'contact', '42',
                  '{"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}', tenant_id => 'acme')"#,
    )
    .await?;
    let mut request = receiver.wait_for(1, LONG).await?.remove(0);
    assert!(verifies(&secret, &request)?);
    assert_eq!(signatures(&request), 1);
    assert!(!verifies("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", &request)?);

    let event: Uuid = site.session.one("SELECT event_id FROM outbox_events").await?;
    assert_eq!((request.event_id()?, request.method.as_str(), request.path.as_str()), (event, "POST", "/hook"));
    assert_eq!(request.header("content-type"), Some("application/json"));
    assert_eq!(request.header("traceparent"), Some("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"));
    let body = request.json()?;
    assert_eq!(body["type"], "contact.created");
    assert_eq!(body["data"]["name"], "Zoë 😀");
    assert_eq!(body["id"], event.to_string());
    let same = "SELECT created_at = $1::text::timestamptz AND $1 LIKE '%T%Z' FROM outbox_events";
    assert!(site.session.query_one(same, &[&body["timestamp"].as_str()]).await?.get::<_, bool>(0), "{body}");
    assert_eq!(
        (&body["aggregate_type"], &body["aggregate_id"], &body["tenant_id"], &body["version"]),
        (&"contact".into(), &"42".into(), &"acme".into(), &"v1".into())
    );
    assert!(String::from_utf8_lossy(&request.body).contains("12345678901234567890.10"));

    request.body.push(b' ');
    assert!(!verifies(&secret, &request)?);
    site.processed().await
}

#[tokio::test]
async fn while_a_secret_is_rotated_the_old_and_the_new_one_verify() -> Result<()> {
    let site = Site::new().await?;
    let receiver = Receiver::start()?;
    let old = site.add("hook", &receiver.url("hook"), "{}").await?;
    let relay = site.relay().await?;
    relay.logged(r#""message":"served""#, LONG).await?;
    let new: String = site.session.one("SELECT outbox.rotate_secret('hook')").await?;
    relay.logged(r#""message":"changed""#, LONG).await?;
    assert_ne!(old, new);
    assert!(site.session.one::<bool>("SELECT rotating FROM outbox.destinations").await?);
    site.publish("1").await?;
    let request = receiver.wait_for(1, LONG).await?.remove(0);
    assert_eq!(signatures(&request), 2);
    assert!(verifies(&old, &request)? && verifies(&new, &request)?);

    // The grace of the one before last is over at once, that of the last one by itself.
    let newest: String = site.session.one("SELECT outbox.rotate_secret('hook', '300 ms')").await?;
    let only_one = async || {
        site.publish("1").await?;
        site.processed().await?;
        Ok(receiver.received().pop().filter(|request| signatures(request) == 1))
    };
    let request = wait::until("the end of the grace", LONG, only_one).await?;
    assert!(verifies(&newest, &request)? && !verifies(&new, &request)? && !verifies(&old, &request)?);
    site.until("SELECT NOT rotating FROM outbox.destinations").await
}

#[tokio::test]
async fn every_attempt_has_the_same_id_and_a_signature_of_its_own() -> Result<()> {
    let site = Site::new().await?;
    let receiver = Receiver::start()?;
    receiver.reply_with(|before, _| if before < 2 { Reply::Status(500) } else { Reply::Accept });
    let secret = site.add("hook", &receiver.url("hook"), r#"{"base": 0.01}"#).await?;
    let _relay = site.relay().await?;
    let event = site.publish("1").await?;
    for request in receiver.wait_for(3, LONG).await? {
        assert_eq!(request.event_id()?, event);
        assert!(verifies(&secret, &request)?);
    }
    site.processed().await?;
    assert_eq!(site.session.one::<i32>("SELECT retry_count FROM outbox_events").await?, 2);
    Ok(())
}

#[tokio::test]
async fn own_headers_are_sent_and_not_shown() -> Result<()> {
    let site = Site::new().await?;
    let receiver = Receiver::start()?;
    let settings = r#"{"headers": {"X-Api-Key": "key-of-the-receiver", "authorization": "Bearer abc"}}"#;
    site.add("hook", &receiver.url("hook"), settings).await?;
    let relay = site.relay().await?;
    site.publish("1").await?;
    let request = receiver.wait_for(1, LONG).await?.remove(0);
    assert_eq!(request.header("x-api-key"), Some("key-of-the-receiver"));
    assert_eq!(request.header("authorization"), Some("Bearer abc"));
    let shown: String = site.session.one("SELECT d::text FROM outbox.destinations d").await?;
    assert!(shown.contains("X-Api-Key") && !shown.contains("key-of-the-receiver") && !shown.contains("abc"), "{shown}");
    site.processed().await?;

    // What is signed can't be replaced.
    for headers in [r#"{"Webhook-Id": "x"}"#, r#"{"a b": "x"}"#, r#"{"x": "hidden\nword"}"#, r#"["x"]"#] {
        let settings = format!(r#"{{"headers": {headers}}}"#);
        let refused = site.add("hook", &receiver.url("hook"), &settings).await.err().context("not refused")?;
        let refused = format!("{refused:#}");
        assert!(refused.contains("settings.headers") && !refused.contains("hidden"), "{headers}: {refused}");
    }
    assert_eq!(relay.terminate(LONG).await?.code(), Some(0));
    Ok(())
}

#[tokio::test]
async fn cloudevents_are_in_structured_mode() -> Result<()> {
    let site = Site::new().await?;
    let receiver = Receiver::start()?;
    let secret = site.add("hook", &receiver.url("hook"), r#"{"format": "cloudevents"}"#).await?;
    let _relay = site.relay().await?;
    let event = site.publish("42").await?;
    let request = receiver.wait_for(1, LONG).await?.remove(0);
    assert_eq!(request.header("content-type"), Some("application/cloudevents+json"));
    let body = request.json()?;
    assert_eq!((&body["specversion"], &body["type"]), (&"1.0".into(), &"contact.created".into()));
    assert_eq!((&body["id"], &body["subject"]), (&event.to_string().into(), &"42".into()));
    assert_eq!((&body["data"]["name"], &body["datacontenttype"]), (&"Ada".into(), &"application/json".into()));
    assert!(body["source"].as_str().is_some_and(|source| !source.is_empty()), "{body}");
    let same = "SELECT created_at = $1::text::timestamptz FROM outbox_events";
    assert!(site.session.query_one(same, &[&body["time"].as_str()]).await?.get::<_, bool>(0), "{body}");
    let name_is_valid = |name: &String| name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    let names: Vec<&String> = body.as_object().context("an object")?.keys().collect();
    assert!(names.iter().all(|name| name_is_valid(name)), "{names:?}");
    assert!(verifies(&secret, &request)?);
    site.processed().await
}

#[tokio::test]
async fn a_redirect_is_not_followed() -> Result<()> {
    let site = Site::new().await?;
    let (receiver, elsewhere) = (Receiver::start()?, Receiver::start()?);
    let target = elsewhere.url("stolen");
    receiver.reply_with(move |before, _| match [301, 302, 303, 307, 308].get(before) {
        Some(status) => Reply::With(*status, vec![("location", target.clone())], Vec::new()),
        None => Reply::Accept,
    });
    site.add("hook", &receiver.url("hook"), r#"{"base": 0.1, "cap": 0.1, "max_attempts": 5}"#).await?;
    let _relay = site.relay().await?;
    site.publish("1").await?;
    site.until("SELECT status = 'failed' AND retry_count = 5 FROM outbox_events").await?;
    site.error("308 Permanent Redirect: redirects are not followed").await?;
    assert_eq!((receiver.count(), elsewhere.count()), (5, 0));
    site.execute("SELECT outbox.replay_failed()").await?;
    site.processed().await
}

#[tokio::test]
async fn gone_disables_the_destination_until_it_is_resumed() -> Result<()> {
    let site = Site::new().await?;
    let receiver = Receiver::start()?;
    receiver.reply(text(410, "we moved"));
    site.add("hook", &receiver.url("hook"), "{}").await?;
    let relay = site.relay().await?;
    site.publish("1").await?;
    site.until("SELECT state = 'disabled' AND last_error = '410 Gone: we moved' FROM outbox.destinations").await?;
    site.until("SELECT status = 'failed' AND last_error = '410 Gone: we moved' FROM outbox_events").await?;
    relay.logged("no longer served", LONG).await?;
    site.publish("2").await?;
    assert_eq!(site.session.one::<i64>("SELECT count(*) FROM outbox_events WHERE status = 'pending'").await?, 1);
    assert_eq!(receiver.count(), 1);

    receiver.reply(Reply::Accept);
    site.execute("SELECT outbox.resume('hook')").await?;
    site.until("SELECT count(*) = 1 FROM outbox_events WHERE status = 'processed'").await?;
    site.execute("SELECT outbox.replay_failed()").await?;
    site.processed().await?;
    assert_eq!(receiver.count(), 3);
    Ok(())
}

#[tokio::test]
async fn retry_after_is_honoured() -> Result<()> {
    let site = Site::new().await?;
    let receiver = Receiver::start()?;
    let date: String = site
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
        site.add(name, &receiver.url(name), "{}").await?;
    }
    let by_path = replies.clone();
    receiver.reply_with(move |_, request| {
        let found = by_path.iter().find(|(name, ..)| request.path.ends_with(name));
        found.map(|(_, reply, _)| reply.clone()).unwrap_or_default()
    });
    let _relay = site.relay().await?;
    site.publish("1").await?;
    site.until("SELECT count(*) = 4 AND bool_and(attempts = 0 AND last_error IS NOT NULL) FROM outbox.deliveries")
        .await?;
    site.until("SELECT bool_and(state = 'open') FROM outbox.destinations").await?;
    for (name, _, seconds) in &replies {
        let wait: f64 = site
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
    site.publish("2").await?;
    site.until("SELECT count(*) = 2 AND bool_and(status = 'pending') FROM outbox_events").await?;
    assert_eq!(receiver.count(), 4);
    let errors = "SELECT string_agg(last_error, '; ' ORDER BY last_error) FROM outbox.destinations";
    let (many, away) = ("429 Too Many Requests", "503 Service Unavailable");
    assert_eq!(site.session.one::<String>(errors).await?, [many, many, away, away].join("; "));
    Ok(())
}

#[tokio::test]
async fn after_the_time_that_the_receiver_asked_for_it_is_tried_again() -> Result<()> {
    let site = Site::new().await?;
    let receiver = Receiver::start()?;
    receiver.reply_with(|before, _| match before {
        0 => Reply::With(503, vec![("retry-after", "2".into())], b"busy".to_vec()),
        _ => Reply::Accept,
    });
    site.add("hook", &receiver.url("hook"), r#"{"base": 0.001}"#).await?;
    let _relay = site.relay().await?;
    site.publish("1").await?;
    let requests = receiver.wait_for(2, LONG).await?;
    assert!(requests[1].at.duration_since(requests[0].at)? >= Duration::from_millis(1900));
    site.processed().await?;
    assert_eq!(
        site.session.one::<String>("SELECT last_error FROM outbox_events").await?,
        "503 Service Unavailable: busy"
    );
    Ok(())
}

#[tokio::test]
async fn what_the_receiver_refuses_is_tried_again_and_then_a_dead_letter() -> Result<()> {
    let site = Site::new().await?;
    let receiver = Receiver::start()?;
    receiver.reply_with(|before, _| match before {
        0 => text(500, "first"),
        1 => text(404, "second\nline\u{7}"),
        2 => text(422, "third"),
        3 => text(400, &"x".repeat(100_000)),
        _ => Reply::Accept,
    });
    site.add("hook", &receiver.url("hook"), r#"{"base": 1e6, "cap": 1e6, "max_attempts": 4}"#).await?;
    let _relay = site.relay().await?;
    let event = site.publish("1").await?;
    for (attempts, error) in [
        (1, "500 Internal Server Error: first"),
        (2, "404 Not Found: second line"),
        (3, "422 Unprocessable Entity: third"),
    ] {
        site.until(&format!("SELECT attempts = {attempts} AND last_error = '{error}' FROM outbox.deliveries")).await?;
        // In two transactions: claims lock in another order.
        site.execute("UPDATE outbox.delivery SET next_attempt_at = now()").await?;
        site.execute("SELECT outbox.resume('hook')").await?;
    }
    site.until("SELECT status = 'failed' AND retry_count = 4 FROM outbox_events").await?;
    let error: String = site.session.one("SELECT last_error FROM outbox_events").await?;
    assert!(error.starts_with("400 Bad Request: xxx") && error.len() < 300, "{error}");
    assert_eq!(site.session.one::<String>("SELECT state FROM outbox.destinations").await?, "active");
    assert!(site.session.query_one("SELECT outbox.replay($1)", &[&event]).await?.get::<_, bool>(0));
    site.processed().await
}

#[tokio::test]
async fn a_body_too_large_for_the_receiver_is_a_dead_letter_at_once() -> Result<()> {
    let site = Site::new().await?;
    let receiver = Receiver::start()?;
    receiver.reply(text(413, "1 MB at most"));
    site.add("hook", &receiver.url("hook"), "{}").await?;
    let _relay = site.relay().await?;
    site.publish("1").await?;
    site.until("SELECT status = 'failed' AND retry_count = 1 FROM outbox_events").await?;
    site.error("too large for the receiver: 413 Payload Too Large: 1 MB at most").await
}

#[tokio::test]
async fn an_answer_without_end_is_read_to_a_limit() -> Result<()> {
    let site = Site::new().await?;
    let receiver = Receiver::start()?;
    receiver.reply_with(|before, _| Reply::EndlessBody(if before < 20 { 500 } else { 200 }));
    site.add("hook", &receiver.url("hook"), r#"{"base": 0.01, "cap": 0.01, "max_attempts": 1000, "timeout": 300}"#)
        .await?;
    let relay = site.relay().await?;
    for n in 0..10 {
        site.publish(&n.to_string()).await?;
    }
    site.processed().await?;
    assert!(receiver.count() >= 30, "{} requests", receiver.count());
    let error: String =
        site.session.one("SELECT last_error FROM outbox_events WHERE last_error IS NOT NULL LIMIT 1").await?;
    assert!(error.starts_with("500 Internal Server Error: xxx") && error.len() < 300, "{error}");
    let status = std::fs::read_to_string(format!("/proc/{}/status", relay.pid()))?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    let kilobytes: u64 = peak.trim().trim_end_matches(" kB").parse()?;
    assert!(kilobytes < 256 * 1024, "the relay took {kilobytes} kB");
    Ok(())
}

#[tokio::test]
async fn no_answer_has_an_end() -> Result<()> {
    let site = Site::new().await?;
    let receiver = Receiver::start()?;
    receiver.reply_with(|before, _| if before < 2 { Reply::Never } else { Reply::Accept });
    site.add("hook", &receiver.url("hook"), r#"{"timeout": 0.5, "base": 0.1, "cap": 0.1}"#).await?;
    let _relay = site.relay().await?;
    site.publish("1").await?;
    site.processed().await?;
    assert_eq!(site.session.one::<String>("SELECT last_error FROM outbox_events").await?, "no answer within 0.5 s");
    assert_eq!(site.session.one::<i32>("SELECT retry_count FROM outbox_events").await?, 2);
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
    let site = Site::new().await?;
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
        site.add(name, &url, r#"{"timeout": 0.5, "max_attempts": 1}"#).await?;
    }
    let _relay = site.relay().await?;
    site.publish("1").await?;
    site.until("SELECT status = 'failed' FROM outbox_events").await?;
    for (name, error) in [
        ("refused", "500 Internal Server Error: well"),
        ("nothing", "no answer within 0.5 s"),
        ("half", "no answer within 0.5 s"),
        ("other", "no answer: "),
    ] {
        let sql = "SELECT status || ': ' || last_error FROM outbox.deliveries WHERE destination = $1";
        let shown: String = site.session.query_one(sql, &[&name]).await?.get(0);
        assert!(shown.starts_with(&format!("failed: {error}")), "{name}: {shown}");
    }
    assert_eq!(site.session.one::<i64>("SELECT count(*) FROM outbox.deliveries").await?, 4);
    Ok(())
}

#[tokio::test]
async fn a_host_that_lets_nobody_connect_opens_the_circuit() -> Result<()> {
    let site = Site::new().await?;
    // When the queue of a listener that accepts nothing is full, the kernel drops what else comes.
    let socket = TcpSocket::new_v4()?;
    socket.bind("127.0.0.1:0".parse()?)?;
    let listener = socket.listen(1)?;
    let address = listener.local_addr()?;
    let mut queued = Vec::new();
    while let Ok(stream) = tokio::time::timeout(Duration::from_millis(500), TcpStream::connect(address)).await {
        queued.push(stream?);
        ensure!(queued.len() < 100, "the queue does not fill");
    }
    site.add("hook", &format!("http://{address}/"), r#"{"connect_timeout": "300 ms"}"#).await?;
    let _relay = site.relay().await?;
    site.publish("1").await?;
    site.error("can't connect: ").await?;
    site.until("SELECT state IN ('open', 'half-open') AND circuit_failures >= 2 FROM outbox.destinations").await?;
    site.until("SELECT bool_and(attempts = 0) FROM outbox.deliveries").await?;

    drop((listener, queued));
    let receiver = Receiver::on(address.port())?;
    receiver.wait_for(1, LONG).await?;
    site.processed().await?;
    assert_eq!(site.session.one::<i32>("SELECT retry_count FROM outbox_events").await?, 0);
    Ok(())
}

#[tokio::test]
async fn a_receiver_that_is_away_uses_no_attempt() -> Result<()> {
    let site = Site::new().await?;
    let receiver = Receiver::start()?;
    let (port, url) = (receiver.port(), receiver.url("hook"));
    drop(receiver);
    site.add("hook", &url, "{}").await?;
    let _relay = site.relay().await?;
    let events = [site.publish("1").await?, site.publish("1").await?, site.publish("1").await?];
    site.error("can't connect: Connection refused").await?;
    site.until("SELECT state IN ('open', 'half-open') FROM outbox.destinations").await?;
    let receiver = Receiver::on(port)?;
    let arrived: Vec<Uuid> = receiver.wait_for(3, LONG).await?.iter().map(Received::event_id).collect::<Result<_>>()?;
    assert_eq!(arrived, events);
    site.processed().await?;
    assert_eq!(site.session.one::<i32>("SELECT max(retry_count) FROM outbox_events").await?, 0);
    Ok(())
}

#[tokio::test]
async fn a_receiver_that_does_not_speak_tls_is_not_spoken_to() -> Result<()> {
    let site = Site::new().await?;
    let receiver = Receiver::start()?;
    site.add("hook", &receiver.url("hook").replace("http://", "https://"), r#"{"timeout": "00:00:05"}"#).await?;
    let _relay = site.relay().await?;
    site.publish("1").await?;
    site.error("can't connect: ").await?;
    assert_eq!(receiver.count(), 0);
    site.add("hook", &receiver.url("hook"), r#"{"timeout": "1 minute 30 seconds"}"#).await?;
    site.processed().await?;
    assert_eq!(site.session.one::<i32>("SELECT retry_count FROM outbox_events").await?, 0);
    Ok(())
}

#[tokio::test]
async fn a_body_of_many_megabytes_arrives_whole() -> Result<()> {
    let site = Site::new().await?;
    let receiver = Receiver::start()?;
    let secret = site.add("hook", &receiver.url("hook"), "{}").await?;
    let _relay = site.relay().await?;
    site.execute("SELECT outbox.publish('contact.grown', to_jsonb(repeat('x', 20 * 1024 * 1024)))").await?;
    let request = receiver.wait_for(1, LONG).await?.remove(0);
    assert_eq!(request.json()?["data"].as_str().map(str::len), Some(20 * 1024 * 1024));
    assert_eq!(request.header("content-length"), Some(request.body.len().to_string().as_str()));
    assert!(verifies(&secret, &request)?);
    site.processed().await
}

#[tokio::test]
async fn addresses_that_are_not_public_are_refused() -> Result<()> {
    let site = Site::new().await?;
    let receiver = Receiver::start()?;
    let port = receiver.port();
    let hosts = [
        "127.0.0.1",
        "127.1",
        "127.0.0.1.",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "017700000001",
        "localhost",
        "LOCALHOST",
        "①②⑦.0.0.1",
        "0.0.0.0",
        "0",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[fe80::1]",
        "[fd00:ec2::254]",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "100.64.0.1",
        "169.254.169.254",
        "255.255.255.255",
    ];
    for (n, host) in hosts.iter().enumerate() {
        let settings = r#"{"max_attempts": 1, "timeout": 5}"#;
        site.add(&format!("hook{n}"), &format!("http://{host}:{port}/"), settings).await?;
    }
    let url = site.cluster.url(&site.database);
    let _relay = Relay::with(&url, None, &[("OUTBOX_WEBHOOK_ALLOW_NETWORKS", "")]).await?;
    site.publish("1").await?;
    // Another relay may be allowed to: the event waits, and the operator sees why.
    let all = format!("SELECT count(last_error) = {} FROM outbox.deliveries", hosts.len());
    site.until(&all).await?;
    for (n, host) in hosts.iter().enumerate() {
        let sql = "SELECT attempts::text || ' ' || last_error FROM outbox.deliveries WHERE destination = $1";
        let shown: String = site.session.query_one(sql, &[&format!("hook{n}")]).await?.get(0);
        assert!(
            shown.starts_with("0 address ") && shown.contains("is not public; an operator can allow its network"),
            "{host}: {shown}"
        );
    }
    site.until("SELECT bool_and(state = 'open' AND last_error LIKE 'address %') FROM outbox.destinations").await?;
    assert_eq!(receiver.count(), 0);
    Ok(())
}

#[tokio::test]
async fn urls_with_a_user_or_of_another_scheme_are_not_taken() -> Result<()> {
    let site = Site::new().await?;
    for url in [
        "http://user:hunter2@127.0.0.1/",
        "http://user@127.0.0.1/",
        "http://127.0.0.1\\@example.com/",
        "ftp://example.com/",
        "file:///etc/passwd",
        "example.com/hook",
        "http://",
        "http://1.2.3.4.5/",
        "http://1.2.3.256/",
        "http://a%41/",
        "",
    ] {
        let error = site.add("hook", url, "{}").await.err().with_context(|| format!("{url:?} was taken"))?;
        let error = format!("{error:#} {error:?}");
        assert!(error.contains("malformed webhook URL") && !error.contains("hunter2"), "{error}");
    }
    Ok(())
}

#[tokio::test]
async fn a_network_can_be_opened_in_the_database() -> Result<()> {
    let cluster = Cluster::start().await?;
    let database = cluster.database().await?;
    let session = cluster.connect(&database).await?;
    let receiver = Receiver::start()?;
    let url = receiver.url("hook").replace("127.0.0.1", "localhost");
    session.execute("SELECT outbox.add_webhook('hook', $1, settings => '{\"max_attempts\": 1}')", &[&url]).await?;
    let _relay = Relay::with(&cluster.url(&database), None, &[("OUTBOX_WEBHOOK_ALLOW_NETWORKS", "")]).await?;
    let event: Uuid = session.one("SELECT outbox.publish('contact.created', '{}')").await?;
    session.until("SELECT last_error LIKE 'address %' AND status = 'pending' FROM outbox_events", LONG).await?;
    assert_eq!(receiver.count(), 0);

    session.batch_execute("ALTER SYSTEM SET outbox.webhook_allow_networks = '10.9.8.0/24, 127.0.0.0/8'").await?;
    session.batch_execute("SELECT pg_reload_conf()").await?;
    session.until("SELECT current_setting('outbox.webhook_allow_networks') <> ''", LONG).await?;
    let delivered = async || {
        session.batch_execute("SELECT outbox.resume('hook')").await?;
        Ok((receiver.count() > 0).then_some(()))
    };
    wait::until("the network to be open", LONG, delivered).await?;
    assert_eq!(receiver.received()[0].event_id()?, event);
    session.until("SELECT status = 'processed' FROM outbox_events", LONG).await
}

#[tokio::test]
async fn secrets_are_shown_nowhere() -> Result<()> {
    let site = Site::new().await?;
    let receiver = Receiver::start()?;
    receiver.reply_with(|before, _| match before {
        0 => text(500, "no"),
        1 => Reply::Never,
        _ => Reply::Accept,
    });
    let settings = r#"{"base": 0.01, "timeout": 0.5, "max_attempts": 3, "headers": {"x-api-key": "value-of-header"}}"#;
    let first = site.add("hook", &receiver.url("hook?token=token-of-url"), settings).await?;
    let dead = format!("http://127.0.0.1:{}/x?token=token-of-url", outbox_tests::scratch::free_port()?);
    let second = site.add("dead", &dead, settings).await?;
    let relay = Relay::with(&site.cluster.url(&site.database), None, &[("OUTBOX_LOG_LEVEL", "trace")]).await?;
    let third: String = site.session.one("SELECT outbox.rotate_secret('hook')").await?;
    site.publish("1").await?;
    receiver.wait_for(3, LONG).await?;
    site.until("SELECT NOT bool_or(destination = 'hook') FROM outbox.deliveries").await?;
    site.until("SELECT count(*) = 1 AND bool_and(last_error IS NOT NULL) FROM outbox.deliveries").await?;

    let mut shown = relay.log();
    for page in ["/metrics", "/readyz", "/healthz"] {
        shown += &relay.get(page).await?.1;
    }
    let everything = "SELECT concat((SELECT string_agg(d::text, ' ') FROM outbox.destinations d),
                                    (SELECT string_agg(d::text, ' ') FROM outbox.deliveries d),
                                    (SELECT string_agg(e::text, ' ') FROM outbox_events e),
                                    (SELECT string_agg(h::text, ' ') FROM outbox.health() h),
                                    (SELECT string_agg(s::text, ' ') FROM outbox.stats() s))";
    shown += &site.session.one::<String>(everything).await?;
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
    let site = Site::new().await?;
    let broker = Broker::shared().await?;
    let channel = broker.channel().await?;
    channel.bind("outbox_events", "#", "all").await?;
    let mut queue = channel.consume("all").await?;
    let (dead, alive) = (Receiver::start()?, Receiver::start()?);
    dead.reply(Reply::Never);
    site.add("dead", &dead.url("hook"), r#"{"timeout": 3, "base": 0.1, "cap": 0.1, "max_attempts": 1000}"#).await?;
    site.add("alive", &alive.url("hook"), "{}").await?;
    site.execute("SELECT outbox.add_rabbitmq('queue')").await?;
    let _relay = Relay::start(site.cluster, &site.database, Some(&broker)).await?;
    site.execute(&format!(
        "SELECT outbox.publish('contact.created', '{{}}', 'contact', (n % 50)::text) FROM generate_series(1, {EVENTS}) n"
    ))
    .await?;
    queue.take(EVENTS, LONG).await?;
    alive.wait_for(EVENTS, LONG).await?;
    site.until(&format!("SELECT count(*) = {EVENTS} AND bool_and(destination = 'dead') FROM outbox.deliveries"))
        .await?;
    site.until("SELECT NOT bool_or(status IN ('processed', 'failed')) FROM outbox_events").await?;

    dead.reply(Reply::Accept);
    site.processed().await?;
    // The order of each aggregate held where nothing was sent twice.
    let ids: Vec<Uuid> = alive.received().iter().map(Received::event_id).collect::<Result<_>>()?;
    let sql = "SELECT bool_and(o) FROM (SELECT e.id > lag(e.id, 1, 0::bigint) OVER (PARTITION BY e.aggregate_id ORDER BY u.n) AS o
                 FROM unnest($1::uuid[]) WITH ORDINALITY AS u (event_id, n) JOIN outbox_events e USING (event_id)) x";
    assert_eq!((ids.len(), site.session.query_one(sql, &[&ids]).await?.get::<_, bool>(0)), (EVENTS, true));
    Ok(())
}

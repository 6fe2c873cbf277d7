//! The page for operators, as HTTP: who gets in, what a request needs, what it costs, and that its actions do what they say.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use outbox_tests::cluster::Cluster;
use outbox_tests::http::{self, Answer};
use outbox_tests::receiver::{Receiver, Reply};
use outbox_tests::relay::Relay;
use outbox_tests::session::Session;
use outbox_tests::wait::{self, LONG};
use outbox_tests::world::World;
use serde_json::{Value, json};

pub const PASSWORD: &str = "correct horse";

/// A relay with a page, for a role with the grants of a relay and perhaps those of an operator.
pub struct Scene {
    pub world: World<'static>,
    pub relay: Relay,
    cookie: String,
}

impl Scene {
    pub async fn start(operator: bool) -> Result<Self> {
        let world = World::new().await?;
        let role = format!("relay_{}", world.database);
        world.execute(&format!("CREATE ROLE {role} LOGIN PASSWORD 'pw'; SELECT outbox.grant_relay('{role}')")).await?;
        if operator {
            world.execute(&format!("SELECT outbox.grant_operator('{role}')")).await?;
        }
        let url = world.cluster.url_as(&role, "pw", &world.database);
        let relay = Relay::with(&url, None, &[("OUTBOX_UI_PASSWORD", PASSWORD)]).await?;
        let mut scene = Scene { world, relay, cookie: String::new() };
        scene.cookie = scene.log_in(PASSWORD).await?.context("refused")?;
        Ok(scene)
    }

    /// The cookie, as a browser would send it; none if the password was wrong.
    async fn log_in(&self, password: &str) -> Result<Option<String>> {
        let answer = log_in(&self.relay, password, &[]).await?;
        ensure!([303, 401].contains(&answer.status), "{answer:?}");
        let cookie = answer.header("set-cookie").and_then(|cookie| cookie.split(';').next()).map(str::to_owned);
        ensure!(cookie.is_some() == (answer.status == 303), "{answer:?}");
        Ok(cookie)
    }

    /// As a browser sends it.
    pub fn cookie(&self) -> &str {
        &self.cookie
    }

    async fn get(&self, path: &str) -> Result<Answer> {
        http::request(self.relay.port(), "GET", path, &[("Cookie", &self.cookie)], "").await
    }

    async fn read(&self, path: &str) -> Result<Value> {
        let answer = self.get(&format!("/ui/api/{path}")).await?;
        ensure!(answer.status == 200, "{path}: {answer:?}");
        answer.json()
    }

    /// As the page's own script asks.
    async fn act(&self, action: &str, asked: Value) -> Result<Answer> {
        let origin = format!("http://localhost:{}", self.relay.port());
        let headers = [("Cookie", self.cookie.as_str()), ("X-Outbox-Request", "1"), ("Origin", &origin)];
        http::request(self.relay.port(), "POST", &format!("/ui/api/{action}"), &headers, &asked.to_string()).await
    }

    async fn done(&self, action: &str, asked: Value) -> Result<Value> {
        let answer = self.act(action, asked).await?;
        ensure!(answer.status == 200, "{action}: {answer:?}");
        Ok(answer.json()?["result"].clone())
    }

    /// A webhook whose first failure is a dead letter, and that many of them.
    pub async fn dead_letters(&self, receiver: &Receiver, name: &str, types: &[&str]) -> Result<()> {
        receiver.reply(Reply::Status(500));
        let settings = r#"{"max_attempts": 1}"#;
        self.world.add_webhook(name, &receiver.url(name), settings).await?;
        self.more_dead_letters(name, types, types.len()).await
    }

    /// Further ones for a destination that fails, until it has so many.
    pub async fn more_dead_letters(&self, name: &str, types: &[&str], count: usize) -> Result<()> {
        for event_type in types {
            let sql = "SELECT outbox.publish($1, '{\"big\": 12345678901234567890.12345678901234567890}', 'order', '7')";
            self.world.session.query_one(sql, &[event_type]).await?;
        }
        let dead = format!(
            "SELECT count(*) = {count} FROM outbox.deliveries WHERE status = 'failed' AND destination = '{name}'"
        );
        self.world.until(&dead).await
    }

    async fn one<T: for<'a> tokio_postgres::types::FromSql<'a>>(&self, query: &str) -> Result<T> {
        self.world.session.one(query).await
    }
}

async fn log_in(relay: &Relay, password: &str, headers: &[(&str, &str)]) -> Result<Answer> {
    let body = format!("password={}", password.replace(' ', "+"));
    http::request(relay.port(), "POST", "/ui/", headers, &body).await
}

#[tokio::test]
async fn without_a_password_there_is_no_page() -> Result<()> {
    let world = World::new().await?;
    let relay = world.relay().await?;
    for path in ["/ui", "/ui/", "/ui/dead", "/ui/stream", "/ui/api/stats", "/ui/assets/app.js", "/ui/login"] {
        assert_eq!(relay.get(path).await?.0, 404, "{path}");
    }
    Ok(())
}

#[tokio::test]
async fn the_password_may_be_in_a_file_and_a_flag_and_is_never_logged() -> Result<()> {
    let world = World::new().await?;
    let file = outbox_tests::scratch::dir("password")?.join("password");
    std::fs::write(&file, format!("{PASSWORD}\n"))?;
    let relay = Relay::with(
        &world.cluster.url(&world.database),
        None,
        &[("OUTBOX_UI_PASSWORD_FILE", file.to_str().context("a path")?)],
    )
    .await?;
    assert_eq!(log_in(&relay, "wrong", &[]).await?.status, 401);
    assert_eq!(log_in(&relay, PASSWORD, &[]).await?.status, 303);
    assert!(!relay.log().contains(PASSWORD) && !relay.log().contains("wrong\""), "{}", relay.log());
    Ok(())
}

#[tokio::test]
async fn nobody_sees_anything_before_the_login() -> Result<()> {
    let scene = Scene::start(true).await?;
    let port = scene.relay.port();
    for path in ["/ui/", "/ui/destinations", "/ui/dead", "/ui/waiting", "/ui/tail", "/ui/events/x"] {
        let answer = http::request(port, "GET", path, &[], "").await?;
        ensure!(answer.body.contains("name=\"password\"") && !answer.body.contains("app.js"), "{path}: {answer:?}");
        ensure!(scene.get(path).await?.body.contains("app.js"), "{path}");
    }
    for path in
        ["stream", "api/me", "api/stats", "api/overview", "api/destinations", "api/dead", "api/waiting", "api/tail"]
    {
        for cookie in ["", "outbox_session=x", &format!("outbox_session_{port}=guess")] {
            let answer = http::request(port, "GET", &format!("/ui/{path}"), &[("Cookie", cookie)], "").await?;
            assert_eq!(answer.status, 401, "{path}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn the_cookie_is_for_the_page_alone_and_ends_with_the_session() -> Result<()> {
    let scene = Scene::start(false).await?;
    let answer = log_in(&scene.relay, PASSWORD, &[]).await?;
    let cookie = answer.header("set-cookie").context("no cookie")?;
    ensure!(
        cookie.contains("HttpOnly") && cookie.contains("SameSite=Strict") && cookie.contains("Path=/ui"),
        "{cookie}"
    );
    ensure!(!cookie.contains("Secure"), "{cookie}");
    let secure = log_in(&scene.relay, PASSWORD, &[("X-Forwarded-Proto", "https")]).await?;
    ensure!(secure.header("set-cookie").is_some_and(|cookie| cookie.contains("; Secure")), "{secure:?}");
    let foreign = log_in(&scene.relay, PASSWORD, &[("Origin", "https://evil.example")]).await?;
    assert_eq!(foreign.status, 403);

    scene.read("stats").await?;
    let mut stream = http::open(scene.relay.port(), "GET", "/ui/stream", &[("Cookie", &scene.cookie)], "").await?;
    let mut heard = String::new();
    http::event_with(&mut stream, &mut heard, "event: hello", LONG).await?;
    let origin = format!("http://localhost:{}", scene.relay.port());
    let headers = [("Cookie", scene.cookie.as_str()), ("X-Outbox-Request", "1"), ("Origin", &origin)];
    assert_eq!(http::request(scene.relay.port(), "POST", "/ui/logout", &headers, "{}").await?.status, 200);
    assert_eq!(scene.get("/ui/api/stats").await?.status, 401);
    let end = http::event_with(&mut stream, &mut heard, "no such event", LONG).await.expect_err("an end");
    ensure!(end.to_string().contains("has ended"), "{end:#}");
    Ok(())
}

#[tokio::test]
async fn wrong_passwords_are_slowed_down_for_everybody() -> Result<()> {
    let scene = Scene::start(false).await?;
    let began = Instant::now();
    let tries = (0..20).map(|n| scene.log_in(if n == 7 { PASSWORD } else { "wrong" }));
    let right = futures_util::future::try_join_all(tries).await?.into_iter().flatten().count();
    assert_eq!(right, 1);
    ensure!(began.elapsed() > Duration::from_millis(1800), "{:?}", began.elapsed());
    Ok(())
}

#[tokio::test]
async fn every_answer_forbids_what_the_page_does_not_need() -> Result<()> {
    let scene = Scene::start(false).await?;
    for path in ["/ui/", "/ui/api/stats", "/ui/assets/app.js", "/ui/assets/nothing", "/ui/login"] {
        let answer = scene.get(path).await?;
        let policy = answer.header("content-security-policy").context("no policy")?;
        ensure!(policy.starts_with("default-src 'self';") && policy.contains("frame-ancestors 'none'"), "{policy}");
        ensure!(!policy.contains("unsafe"), "{policy}");
        assert_eq!(answer.header("x-content-type-options"), Some("nosniff"), "{path}");
        assert_eq!(answer.header("access-control-allow-origin"), None, "{path}");
        let kept = if path.ends_with(".js") { "no-cache" } else { "no-store" };
        assert_eq!(answer.header("cache-control"), Some(kept), "{path}");
    }
    let page = scene.get("/ui/").await?.body + &http::get(scene.relay.port(), "/ui/").await?.1;
    ensure!(!page.contains("http://") && !page.contains("https://") && !page.contains("style="), "{page}");
    let script = scene.get("/ui/assets/app.js").await?;
    let tag = script.header("etag").context("no tag")?;
    let again = http::request(scene.relay.port(), "GET", "/ui/assets/app.js", &[("If-None-Match", tag)], "").await?;
    assert_eq!((again.status, again.body.as_str()), (304, ""));
    Ok(())
}

#[tokio::test]
async fn a_change_needs_the_header_and_the_pages_own_origin() -> Result<()> {
    let scene = Scene::start(true).await?;
    let receiver = Receiver::start()?;
    scene.world.add_webhook("hook", &receiver.url("/"), "{}").await?;
    let port = scene.relay.port();
    let (own, cookie) = (format!("http://localhost:{port}"), scene.cookie.as_str());
    let asked = json!({ "destination": "hook" }).to_string();
    for headers in [
        vec![("Cookie", cookie)],
        vec![("Cookie", cookie), ("Origin", own.as_str())],
        vec![("Cookie", cookie), ("X-Outbox-Request", "1")],
        vec![("Cookie", cookie), ("X-Outbox-Request", "0"), ("Origin", &own)],
        vec![("Cookie", cookie), ("X-Outbox-Request", "1"), ("Origin", "https://evil.example")],
        vec![("Cookie", cookie), ("X-Outbox-Request", "1"), ("Origin", "null")],
        vec![("Cookie", cookie), ("X-Outbox-Request", "1"), ("Origin", &own), ("Sec-Fetch-Site", "cross-site")],
        vec![
            ("Cookie", cookie),
            ("X-Outbox-Request", "1"),
            ("Origin", "http://evil.example"),
            ("Host", "evil.example"),
        ],
    ] {
        for path in ["/ui/api/pause", "/ui/logout"] {
            let answer = http::request(port, "POST", path, &headers, &asked).await?;
            assert_eq!(answer.status, 403, "{path} {headers:?}");
        }
    }
    let anonymous = [("X-Outbox-Request", "1"), ("Origin", own.as_str())];
    assert_eq!(http::request(port, "POST", "/ui/api/pause", &anonymous, &asked).await?.status, 401);
    assert_eq!(scene.one::<String>("SELECT state FROM outbox.destinations").await?, "active");
    scene.done("pause", json!({ "destination": "hook" })).await?;
    assert_eq!(scene.one::<String>("SELECT state FROM outbox.destinations").await?, "paused");
    for (asked, status) in [(json!({ "destination": "none" }), 404), (json!({ "dest": "hook" }), 400), (json!(7), 400)]
    {
        assert_eq!(scene.act("resume", asked.clone()).await?.status, status, "{asked}");
    }
    assert_eq!(scene.act("drop", json!({})).await?.status, 404);
    Ok(())
}

/// What a page of another name that leads here could read (DNS rebinding).
#[tokio::test]
async fn only_names_that_cannot_be_somebody_elses_are_answered() -> Result<()> {
    let world = World::new().await?;
    let variables = [("OUTBOX_UI_PASSWORD", PASSWORD), ("OUTBOX_UI_HOSTS", "outbox.example.com, other.example.com")];
    let relay = Relay::with(&world.cluster.url(&world.database), None, &variables).await?;
    for (host, status) in [
        ("localhost", 200),
        ("127.0.0.1:1", 200),
        ("[::1]", 200),
        ("outbox.example.com", 200),
        ("other.example.com:443", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
    ] {
        let answer = http::request(relay.port(), "GET", "/ui/", &[("Host", host)], "").await?;
        assert_eq!(answer.status, status, "{host}");
        assert_eq!(http::request(relay.port(), "GET", "/healthz", &[("Host", host)], "").await?.status, 200, "{host}");
    }
    Ok(())
}

/// What everybody but the watcher has asked the server so far.
async fn transactions(watcher: &Session, database: &str) -> Result<i64> {
    let count = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname";
    watcher.one(&format!("{count} = '{database}'")).await
}

#[tokio::test]
async fn an_open_page_on_an_idle_system_asks_nothing() -> Result<()> {
    // A server of its own, so that nobody else does anything in this database.
    let cluster = Cluster::with(&[("autovacuum", "off")]).await?;
    let database = cluster.database().await?;
    let session = cluster.connect(&database).await?;
    let relay = Relay::with(&cluster.url(&database), None, &[("OUTBOX_UI_PASSWORD", PASSWORD)]).await?;
    let cookie = log_in(&relay, PASSWORD, &[]).await?;
    let cookie =
        cookie.header("set-cookie").and_then(|cookie| cookie.split(';').next()).context("no cookie")?.to_owned();
    let receiver = Receiver::start()?;
    session.execute("SELECT outbox.add_webhook('hook', $1)", &[&receiver.url("/")]).await?;
    session.batch_execute("SELECT outbox.publish('a', '{}')").await?;
    receiver.wait_for(1, LONG).await?;
    drop(session);
    let mut stream = http::open(relay.port(), "GET", "/ui/stream", &[("Cookie", &cookie)], "").await?;
    let mut heard = String::new();
    http::event_with(&mut stream, &mut heard, "event: hello", LONG).await?;
    for path in ["me", "stats", "overview", "destinations", "dead", "waiting", "tail"] {
        let path = format!("/ui/api/{path}");
        assert_eq!(http::request(relay.port(), "GET", &path, &[("Cookie", &cookie)], "").await?.status, 200, "{path}");
    }
    // After a while not even a session is left of it: two are the relay's. What a session did last it reports at its end.
    let watcher = cluster.connect("postgres").await?;
    let sessions = format!(
        "SELECT count(*) = 2 FROM pg_stat_activity WHERE datname = '{database}' AND backend_type = 'client backend'"
    );
    watcher.until(&sessions, LONG).await?;
    cluster.falls_silent(&database).await?;
    let before = transactions(&watcher, &database).await?;
    // The tail, a lost stream and files are the relay's own.
    drop(stream);
    let number = heard_id(&relay, &cookie, None).await?;
    heard_id(&relay, &cookie, Some(&number)).await?;
    for path in ["/ui/tail", "/ui/api/tail", "/ui/api/under-way", "/ui/assets/app.js", "/ui/destinations"] {
        http::request(relay.port(), "GET", path, &[("Cookie", &cookie)], "").await?;
    }
    // Sessions report what they did up to 10 s late.
    tokio::time::sleep(Duration::from_secs(12)).await;
    assert_eq!(transactions(&watcher, &database).await?, before);
    ensure!(watcher.one::<bool>(&sessions).await?, "a session was opened");
    Ok(())
}

/// Connects to the stream, perhaps again, and returns the id of what it is told first.
async fn heard_id(relay: &Relay, cookie: &str, last: Option<&str>) -> Result<String> {
    let mut headers = vec![("Cookie", cookie)];
    headers.extend(last.map(|last| ("Last-Event-ID", last)));
    let mut stream = http::open(relay.port(), "GET", "/ui/stream", &headers, "").await?;
    let event = http::event_with(&mut stream, &mut String::new(), "event: hello", LONG).await?;
    Ok(event.lines().find_map(|line| line.split("id: ").nth(1)).context("no id")?.to_owned())
}

#[tokio::test]
async fn the_stream_tells_what_happens_and_what_was_missed() -> Result<()> {
    let scene = Scene::start(true).await?;
    let receiver = Receiver::start()?;
    scene.world.add_webhook("hook", &receiver.url("/"), "{}").await?;
    let cookie = [("Cookie", scene.cookie.as_str())];
    let mut stream = http::open(scene.relay.port(), "GET", "/ui/stream", &cookie, "").await?;
    let mut heard = String::new();
    let hello = http::event_with(&mut stream, &mut heard, "event: hello", LONG).await?;
    let last = hello.lines().find_map(|line| line.split("id: ").nth(1)).context("no id")?;
    scene.world.publish("1").await?;
    http::event_with(&mut stream, &mut heard, "\"processed\" : \"1\"", LONG).await?;
    // At most one a second for all together, however much happens.
    let began = Instant::now();
    for n in 0..200 {
        scene.world.publish(&n.to_string()).await?;
    }
    http::event_with(&mut stream, &mut heard, "\"processed\" : \"201\"", LONG).await?;
    drop(stream);
    let again = [("Cookie", scene.cookie.as_str()), ("Last-Event-ID", last)];
    let mut stream = http::open(scene.relay.port(), "GET", "/ui/stream", &again, "").await?;
    let missed = http::event_with(&mut stream, &mut String::new(), "event:", LONG).await?;
    ensure!(missed.contains("event: changed"), "{missed}");
    let number = |event: &str| event.split("id: ").nth(1)?.lines().next()?.split('-').nth(1)?.parse::<u64>().ok();
    let told = number(&missed).context("no number")? - number(&hello).context("no number")?;
    ensure!(told <= began.elapsed().as_secs() + 4, "{told} in {:?}", began.elapsed());
    let tail = scene.read("tail").await?;
    assert_eq!(tail.as_array().map(Vec::len), Some(201));
    ensure!(tail[0]["outcome"] == "delivered" && tail[0]["destination"] == "hook", "{}", tail[0]);
    Ok(())
}

/// Streams are few, and one that nobody reads any more gives its place back.
#[tokio::test]
async fn pages_that_are_gone_make_room_for_others() -> Result<()> {
    let scene = Scene::start(false).await?;
    let cookie = [("Cookie", scene.cookie.as_str())];
    for _ in 0..3 {
        let mut streams = Vec::new();
        for _ in 0..32 {
            let open = async || {
                let mut stream = http::open(scene.relay.port(), "GET", "/ui/stream", &cookie, "").await?;
                http::event_with(&mut stream, &mut String::new(), "event: hello", Duration::from_secs(5)).await?;
                Ok(Some(stream))
            };
            streams.push(wait::until("a place", LONG, open).await?);
        }
        let mut one_more = http::open(scene.relay.port(), "GET", "/ui/stream", &cookie, "").await?;
        let refused = http::event_with(&mut one_more, &mut String::new(), "hello", LONG).await;
        ensure!(refused.is_err(), "{refused:?}");
        assert_eq!(scene.get("/ui/api/tail").await?.status, 200);
    }
    Ok(())
}

#[tokio::test]
async fn a_relays_grants_are_enough_to_read_and_change_nothing() -> Result<()> {
    let scene = Scene::start(false).await?;
    let receiver = Receiver::start()?;
    scene.dead_letters(&receiver, "hook", &["order.made"]).await?;
    let me = scene.read("me").await?;
    let may = me["role"]["may"].as_object().context("no rights")?;
    ensure!(may.len() == 8 && may.values().all(|may| *may == false), "{me}");
    ensure!(!me.to_string().contains("pw@") && me["database"].is_string(), "{me}");
    for path in ["stats", "overview", "destinations", "dead", "waiting"] {
        scene.read(path).await?;
    }
    let dead = scene.read("dead").await?;
    let event_id = dead["rows"][0]["event_id"].as_str().context("no dead letter")?;
    assert_eq!(scene.read(&format!("events/{event_id}")).await?["event"]["status"], "failed");
    for (action, asked) in [
        ("pause", json!({ "destination": "hook" })),
        ("resume", json!({ "destination": "hook" })),
        ("test", json!({ "destination": "hook" })),
        ("rotate", json!({ "destination": "hook" })),
        ("replay", json!({ "event_id": event_id })),
        ("purge", json!({ "event_id": event_id })),
        ("replay-all", json!({})),
        ("purge-all", json!({ "preview": true })),
    ] {
        let answer = scene.act(action, asked).await?;
        ensure!(answer.status == 403 && answer.body.contains("42501"), "{action}: {answer:?}");
    }
    Ok(())
}

#[tokio::test]
async fn what_an_operator_asks_for_happens() -> Result<()> {
    let scene = Scene::start(true).await?;
    let receiver = Receiver::start()?;
    scene.dead_letters(&receiver, "hook", &["order.made", "order.made", "order.paid", "user.gone"]).await?;
    let me = scene.read("me").await?;
    ensure!(me["role"]["may"].as_object().is_some_and(|may| may.values().all(|may| *may == true)), "{me}");

    // One of them.
    let dead = scene.read("dead?type=user.*").await?;
    ensure!(dead["found"] == 1 && dead["rows"][0]["destination"] == "hook", "{dead}");
    let row = json!({ "event_id": dead["rows"][0]["event_id"], "destination": "hook" });
    assert_eq!(scene.done("purge", row.clone()).await?, "true");
    assert_eq!(scene.done("purge", row.clone()).await?, "false");
    assert_eq!(scene.one::<i64>("SELECT count(*) FROM outbox_events WHERE event_type = 'user.gone'").await?, 0);

    // All that match, after they were counted.
    let filter = json!({ "destination": "hook", "type": "order.m*", "error": "*500*" });
    let mut preview = filter.clone();
    preview["preview"] = true.into();
    assert_eq!(scene.done("replay-all", preview.clone()).await?, "2");
    assert_eq!(scene.read("dead?destination=hook&type=order.m*&error=*500*").await?["found"], 2);
    assert_eq!(scene.one::<i64>("SELECT count(*) FROM outbox.deliveries WHERE status = 'failed'").await?, 3);
    receiver.reply(Reply::Accept);
    assert_eq!(scene.done("replay-all", filter).await?, "2");
    scene.world.until("SELECT count(*) = 2 FROM outbox_events WHERE status = 'processed'").await?;
    let until = json!({ "until": "2001-01-01T00:00:00Z" });
    assert_eq!(scene.done("purge-all", until).await?, "0");
    assert_eq!(scene.act("purge-all", json!({ "since": "2001-01-01T00:00:00Z" })).await?.status, 400);
    assert_eq!(scene.done("purge-all", json!({ "type": "order.paid" })).await?, "1");

    // Destinations.
    let test = scene.done("test", json!({ "destination": "hook" })).await?;
    let test = test.as_str().context("no event")?.to_owned();
    scene.world.until(&format!("SELECT status = 'processed' FROM outbox_events WHERE event_id = '{test}'")).await?;
    scene.done("pause", json!({ "destination": "hook" })).await?;
    assert_eq!(scene.read("destinations").await?["rows"][0]["state"], "paused");
    scene.done("resume", json!({ "destination": "hook" })).await?;
    assert_eq!(scene.read("destinations").await?["rows"][0]["state"], "active");
    let secret = scene.done("rotate", json!({ "destination": "hook" })).await?;
    let secret = secret.as_str().context("no secret")?.to_owned();
    ensure!(secret.starts_with("whsec_"), "{secret}");
    ensure!(!scene.relay.log().contains(&secret), "the log shows the secret");
    scene.relay.logged("asked for on the page", LONG).await?;
    Ok(())
}

/// Digits are those of the database, and texts are texts.
#[tokio::test]
async fn what_an_event_holds_is_shown_as_it_is_stored() -> Result<()> {
    let scene = Scene::start(false).await?;
    let hostile = r#"{"html": "<script>alert(1)</script>", "n": 12345678901234567890.12345678901234567890}"#;
    let id: uuid::Uuid = scene
        .world
        .session
        .query_one("SELECT outbox.publish('<img src=x onerror=alert(1)>', $1::text::jsonb, 'a', '<b>')", &[&hostile])
        .await?
        .get(0);
    let answer = scene.get(&format!("/ui/api/events/{id}")).await?;
    assert_eq!(answer.header("content-type"), Some("application/json"));
    let event = answer.json()?["event"].clone();
    let data = event["event_data"].as_str().context("a text")?;
    ensure!(data.contains("12345678901234567890.12345678901234567890") && data.contains("<script>"), "{data}");
    ensure!(event["id"].is_string() && event["status"] == "pending", "{event}");
    let none = scene.read("events/00000000-0000-0000-0000-000000000000").await?;
    assert_eq!(none["event"], Value::Null);
    assert_eq!(scene.get("/ui/api/events/x'--").await?.status, 400);
    Ok(())
}

/// A database that does not answer costs the page an error, and a page that asks costs delivery nothing.
#[tokio::test]
async fn the_page_waits_for_nothing_for_ever() -> Result<()> {
    let scene = Scene::start(true).await?;
    let receiver = Receiver::start()?;
    scene.world.add_webhook("hook", &receiver.url("/"), "{}").await?;
    let blocker = scene.world.cluster.connect(&scene.world.database).await?;
    blocker.batch_execute("BEGIN; LOCK outbox.destination IN ACCESS EXCLUSIVE MODE").await?;
    let began = Instant::now();
    let answer = scene.get("/ui/api/destinations").await?;
    ensure!(answer.status == 504 && answer.body.contains("57014"), "{answer:?}");
    ensure!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    blocker.batch_execute("ROLLBACK").await?;
    scene.read("destinations").await?;
    Ok(())
}

//! How a webhook's requests travel: TLS with authorities and certificates of one's own, and proxies.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use outbox_tests::front::{Proxy, TlsFront};
use outbox_tests::receiver::Receiver;
use outbox_tests::relay::{self, Relay};
use outbox_tests::tls::Authority;
use outbox_tests::wait::LONG;
use outbox_tests::world::World;
use serde_json::json;

fn pem(path: &Path) -> Result<String> {
    Ok(fs::read_to_string(path)?)
}

async fn relay_with(world: &World<'_>, variables: &[(&str, &str)]) -> Result<Relay> {
    Relay::with(&world.cluster.url(&world.database), None, variables).await
}

/// The destination's trouble uses no attempt.
async fn refused(world: &World<'_>, text: &str) -> Result<()> {
    world.error(text).await?;
    assert_eq!(world.session.one::<i64>("SELECT sum(attempts) FROM outbox.deliveries").await?, 0);
    Ok(())
}

#[tokio::test]
async fn a_receiver_can_have_an_authority_of_its_own_and_want_a_certificate() -> Result<()> {
    let world = World::new().await?;
    let authority = Authority::new()?;
    let (server, client) = (authority.issue("server")?, authority.issue("relay")?);
    let receiver = Receiver::start()?;
    let front = TlsFront::start(&server, Some(&authority.certificate()), receiver.port()).await?;
    world.add_webhook("hook", &front.url("hook"), "{}").await?;
    let relay = world.relay().await?;
    world.publish("1").await?;
    refused(&world, "can't connect: invalid peer certificate: UnknownIssuer").await?;

    let ca = pem(&authority.certificate())?;
    let settings = json!({"ca_certificate": ca, "base": 0.1, "cap": 0.1, "max_attempts": 1000}).to_string();
    world.add_webhook("hook", &front.url("hook"), &settings).await?;
    // The connection may be reset before the relay has read why.
    world.until("SELECT bool_or(last_error LIKE '%CertificateRequired%') FROM outbox.deliveries").await?;
    assert_eq!(receiver.count(), 0);

    let (certificate, key) = (pem(&client.certificate)?, pem(&client.key)?);
    let settings = json!({"ca_certificate": ca, "client_certificate": certificate, "client_key": key});
    world.add_webhook("hook", &front.url("hook"), &settings.to_string()).await?;
    receiver.wait_for(1, LONG).await?;
    world.processed().await?;

    let shown: String = world.session.one("SELECT d::text FROM outbox.destinations d").await?;
    let secret = key.lines().nth(1).context("a key")?;
    ensure!(shown.contains("client_key") && !shown.contains(secret) && !relay.log().contains(secret));
    let stored: String = world.session.one("SELECT settings::text FROM outbox.destination").await?;
    ensure!(!stored.contains(secret) && stored.contains("BEGIN CERTIFICATE"));
    Ok(())
}

#[tokio::test]
async fn the_relay_can_trust_an_authority_for_all_webhooks_and_send_to_https_alone() -> Result<()> {
    let world = World::new().await?;
    let authority = Authority::new()?;
    let receiver = Receiver::start()?;
    let front = TlsFront::start(&authority.issue("server")?, None, receiver.port()).await?;
    world.add_webhook("tls", &front.url("hook"), "{}").await?;
    world.add_webhook("plain", &receiver.url("plain"), "{}").await?;
    let ca = authority.certificate();
    let variables =
        [("OUTBOX_WEBHOOK_CA_CERT", ca.to_str().unwrap_or_default()), ("OUTBOX_WEBHOOK_HTTPS_ONLY", "true")];
    let _relay = relay_with(&world, &variables).await?;
    world.publish("1").await?;
    receiver.wait_for(1, LONG).await?;
    world
        .until("SELECT count(*) = 1 AND bool_and(destination = 'plain' AND attempts = 0) FROM outbox.deliveries")
        .await?;
    refused(&world, "this relay sends to https alone").await?;
    assert_eq!(receiver.received().iter().filter(|request| request.path == "/plain").count(), 0);
    Ok(())
}

#[tokio::test]
async fn requests_go_through_the_proxy_that_is_named() -> Result<()> {
    let world = World::new().await?;
    let authority = Authority::new()?;
    let receiver = Receiver::start()?;
    let front = TlsFront::start(&authority.issue("server")?, None, receiver.port()).await?;
    let (own, relays) = (Proxy::start(Some("bWU6aHVudGVyMg==")).await?, Proxy::start(None).await?);
    let ca = pem(&authority.certificate())?;
    let settings = json!({"ca_certificate": ca, "proxy": own.url_as("me:hunter%32")}).to_string();
    world.add_webhook("own", &front.url("own"), &settings).await?;
    world.add_webhook("relays", &receiver.url("relays"), "{}").await?;
    world.add_webhook("direct", &receiver.url("direct"), r#"{"proxy": "none"}"#).await?;
    let relay = relay_with(&world, &[("OUTBOX_WEBHOOK_PROXY", &relays.url())]).await?;
    world.publish("1").await?;
    receiver.wait_for(3, LONG).await?;
    world.processed().await?;
    let target = front.url("").replace("https://", "");
    assert_eq!(own.asked(), [format!("CONNECT {} HTTP/1.1", target.trim_end_matches('/'))]);
    assert_eq!(relays.asked(), [format!("POST {} HTTP/1.1", receiver.url("relays"))]);
    let shown: String = world.session.one("SELECT string_agg(d::text, '') FROM outbox.destinations d").await?;
    ensure!(shown.contains("//…@127.0.0.1") && !shown.contains("hunter") && !relay.log().contains("hunter"));
    let stored: String = world.session.one("SELECT string_agg(settings::text, '') FROM outbox.destination").await?;
    ensure!(!stored.contains("hunter"));
    Ok(())
}

#[tokio::test]
async fn a_proxy_in_trouble_uses_no_attempt_and_says_why() -> Result<()> {
    let world = World::new().await?;
    let authority = Authority::new()?;
    let receiver = Receiver::start()?;
    let front = TlsFront::start(&authority.issue("server")?, None, receiver.port()).await?;
    let proxy = Proxy::start(Some("bWU6aHVudGVyMg==")).await?;
    let ca = pem(&authority.certificate())?;
    let closed = format!("http://127.0.0.1:{}", outbox_tests::scratch::free_port()?);
    let gone = format!("https://127.0.0.1:{}/", outbox_tests::scratch::free_port()?);
    let login = proxy.url_as("me:hunter2");
    for (name, url, proxy) in [
        ("login-tls", front.url("x"), proxy.url()),
        ("login-plain", receiver.url("x"), proxy.url_as("me:wrong")),
        ("closed", front.url("x"), closed.clone()),
        ("gone", gone, login),
        ("relays", front.url("x"), String::new()),
    ] {
        let mut settings = json!({"ca_certificate": ca});
        if !proxy.is_empty() {
            settings["proxy"] = proxy.into();
        }
        world.add_webhook(name, &url, &settings.to_string()).await?;
    }
    let relay = relay_with(&world, &[("OUTBOX_WEBHOOK_PROXY", &closed)]).await?;
    world.publish("1").await?;
    world.until("SELECT count(last_error) = 5 FROM outbox.deliveries").await?;
    for (name, error) in [
        ("login-tls", "can't connect through the proxy: tunnel error: proxy authorization required"),
        ("login-plain", "the proxy wants another login: 407 Proxy Authentication Required"),
        ("closed", "can't connect through the proxy: Connection refused"),
        ("gone", "can't connect through the proxy: tunnel error: unsuccessful"),
        ("relays", "can't connect through the proxy: Connection refused"),
    ] {
        let sql = "SELECT attempts::text || ' ' || last_error FROM outbox.deliveries WHERE destination = $1";
        let shown: String = world.session.query_one(sql, &[&name]).await?.get(0);
        ensure!(shown.starts_with(&format!("0 {error}")), "{name}: {shown}");
    }
    assert_eq!(receiver.count(), 0);
    ensure!(!relay.log().contains("hunter2"));
    Ok(())
}

#[tokio::test]
async fn a_proxy_is_no_way_to_addresses_that_are_not_allowed() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    let (own, relays) = (Proxy::start(None).await?, Proxy::start(None).await?);
    let by_name = receiver.url("hook").replace("127.0.0.1", "localhost");
    world.add_webhook("address", &receiver.url("hook"), "{}").await?;
    world.add_webhook("name", &by_name, "{}").await?;
    world.add_webhook("nobody", "http://nobody.invalid/", "{}").await?;
    world.add_webhook("proxy", "https://1.1.1.1/", &json!({"proxy": own.url()}).to_string()).await?;
    let named = own.url().replace("127.0.0.1", "localhost");
    world.add_webhook("proxy-name", "https://1.1.1.1/", &json!({"proxy": named}).to_string()).await?;
    let variables = [("OUTBOX_WEBHOOK_ALLOW_NETWORKS", ""), ("OUTBOX_WEBHOOK_PROXY", &relays.url())];
    let _relay = relay_with(&world, &variables).await?;
    world.publish("1").await?;
    world.until("SELECT count(last_error) = 5 FROM outbox.deliveries").await?;
    for (name, error) in [
        ("address", "address 127.0.0.1 is not public"),
        ("name", "address "),
        ("nobody", "can't resolve nobody.invalid"),
        ("proxy", "address 127.0.0.1 is not public"),
        ("proxy-name", "address "),
    ] {
        let sql = "SELECT attempts::text || ' ' || last_error FROM outbox.deliveries WHERE destination = $1";
        let shown: String = world.session.query_one(sql, &[&name]).await?.get(0);
        ensure!(shown.starts_with(&format!("0 {error}")), "{name}: {shown}");
    }
    assert_eq!((receiver.count(), own.asked().len(), relays.asked().len()), (0, 0, 0));
    Ok(())
}

#[tokio::test]
async fn what_no_request_could_travel_by_is_refused_and_not_shown() -> Result<()> {
    let world = World::new().await?;
    let authority = Authority::new()?;
    let identity = authority.issue("relay")?;
    let (certificate, key) = (pem(&identity.certificate)?, pem(&identity.key)?);
    for (settings, setting) in [
        (json!({"proxy": "hunter2"}), "proxy"),
        (json!({"proxy": "socks5://u:hunter2@h:1"}), "proxy"),
        (json!({"proxy": "http://u:hunter2@h/path"}), "proxy"),
        (json!({"proxy": "http://u:hunter2@1.2.3.256:1"}), "proxy"),
        (json!({"proxy": "http://u:hunter2@h:0"}), "proxy"),
        (json!({"proxy": "http://u:hunter2/x@h"}), "proxy"),
        (json!({"proxy": null}), "proxy"),
        (json!({"ca_certificate": "hunter2"}), "ca_certificate"),
        (json!({"ca_certificate": key}), "ca_certificate"),
        (json!({"ca_certificate": certificate.replace("MII", "hunter2")}), "ca_certificate"),
        (json!({"client_certificate": certificate}), "client_key"),
        (json!({"client_key": key}), "client_certificate"),
        (json!({"client_certificate": certificate, "client_key": "hunter2"}), "client_key"),
        (
            json!({"client_certificate": certificate, "client_key": key.replace("PRIVATE", "ENCRYPTED PRIVATE")}),
            "client_key",
        ),
        (json!({"client_certificate": certificate, "client_key": [key]}), "client_key"),
    ] {
        let error = world.add_webhook("hook", "https://example.com/", &settings.to_string()).await.err();
        let error = format!("{:?}", error.with_context(|| format!("{settings} was taken"))?);
        ensure!(error.contains(&format!("settings.{setting}")) && error.contains("HINT: "), "{settings}: {error}");
        ensure!(!error.contains("hunter2") && !error.contains(key.lines().nth(1).context("a key")?), "{error}");
    }
    for settings in [
        json!({"proxy": "http://user:p%40ss@[2001:db8::1]:3128/", "ca_certificate": format!("{certificate}{certificate}")}),
        json!({"client_certificate": certificate, "client_key": format!("A key.\n{key}"), "proxy": "none"}),
    ] {
        world.add_webhook("hook", "https://example.com/", &settings.to_string()).await?;
    }
    for (variable, value) in [
        ("OUTBOX_WEBHOOK_PROXY", "socks5://u:hunter2@h"),
        ("OUTBOX_WEBHOOK_CA_CERT", "/nowhere/hunter2"),
        ("OUTBOX_WEBHOOK_HTTPS_ONLY", "hunter2"),
    ] {
        let mut command = relay::command(None)?;
        let output = command.arg("run").env("DATABASE_URL", "postgres://h/db").env(variable, value).output()?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(64), "{variable}: {text}");
        ensure!(!text.contains("hunter2") && text.trim_end().lines().count() == 1, "{variable}: {text}");
    }
    Ok(())
}

//! How an event is written: envelopes and CloudEvents, as their reference library reads them, and the event's metadata.

use anyhow::{Context, Result, ensure};
use outbox_tests::receiver::{Received, Receiver};
use outbox_tests::reference::{cloud_event, cloud_event_of, verifies};
use outbox_tests::wait::LONG;
use outbox_tests::world::World;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::rabbitmq::Site;

const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

/// An event whose texts no header could hold as they are.
async fn publish(world: &World<'_>) -> Result<Uuid> {
    let sql = r#"SELECT outbox.publish('contact "neu"', '{"name": "Zoë 😀", "amount": 12345678901234567890.10}', 'contact',
                   E'4 2%\t€', jsonb_build_object('traceparent', $1::text, 'region', 'eu', 'n', 1.50, 'secret', 'hidden'),
                   tenant_id => 'acme')"#;
    Ok(world.session.query_one(sql, &[&TRACEPARENT]).await?.get(0))
}

/// What the reference library makes of that event.
async fn expected(world: &World<'_>, event: Uuid, source: &str) -> Result<Value> {
    let time: String = world
        .session
        .one("SELECT to_char(created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US+00:00') FROM outbox_events")
        .await?;
    Ok(json!({
        "specversion": "1.0", "id": event.to_string(), "source": source, "type": "contact \"neu\"",
        "time": time.replace(".000000", ""), "subject": "4 2%\t€", "datacontenttype": "application/json",
        "eventversion": "v1", "tenantid": "acme", "traceparent": TRACEPARENT,
    }))
}

async fn receive(settings: &str) -> Result<(World<'static>, Uuid, String, Received)> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    let secret = world.add_webhook("hook", &receiver.url("hook"), settings).await?;
    let _relay = world.relay().await?;
    let event = publish(&world).await?;
    let request = receiver.wait_for(1, LONG).await?.remove(0);
    world.processed().await?;
    Ok((world, event, secret, request))
}

#[tokio::test]
async fn webhooks_are_cloud_events_in_both_modes() -> Result<()> {
    for (format, kind) in [("cloudevents", "application/cloudevents+json"), ("cloudevents-binary", "application/json")]
    {
        let settings = format!(r#"{{"format": "{format}", "source": "https://shop.example/a?b#c"}}"#);
        let (world, event, secret, request) = receive(&settings).await?;
        assert_eq!(request.header("content-type"), Some(kind));
        let read = cloud_event(&request)?;
        assert_eq!(read["attributes"], expected(&world, event, "https://shop.example/a?b#c").await?);
        assert_eq!(read["data"]["name"], "Zoë 😀");
        assert!(verifies(&secret, &request)?);
        ensure!(request.headers.keys().any(|name| name.as_str() == "ce-id") == (format == "cloudevents-binary"));
    }
    Ok(())
}

#[tokio::test]
async fn messages_are_cloud_events_in_both_modes() -> Result<()> {
    for (format, kind) in [("cloudevents", "application/cloudevents+json"), ("cloudevents-binary", "application/json")]
    {
        let site = Site::shared().await?;
        let channel = site.broker.channel().await?;
        channel.bind("outbox_events", "#", "all").await?;
        site.add("mq", &format!(r#", routing_key => 'k', settings => '{{"format": "{format}"}}'"#)).await?;
        let _relay = site.relay().await?;
        let event = publish(&site).await?;
        let message = channel.consume("all").await?.next(LONG).await?;
        assert_eq!((message.event_id()?, message.content_type.as_deref()), (event, Some(kind)));
        let read = cloud_event_of(&message)?;
        assert_eq!(read["attributes"], expected(&site, event, "/pg_outbox/contact").await?);
        assert_eq!(read["data"]["name"], "Zoë 😀");
        ensure!(message.headers.contains_key("cloudEvents:id") == (format == "cloudevents-binary"));
        site.processed().await?;
    }
    Ok(())
}

#[tokio::test]
async fn the_data_alone_can_be_a_webhooks_body() -> Result<()> {
    let (world, event, secret, request) = receive(r#"{"format": "data"}"#).await?;
    let data: String = world.session.one("SELECT event_data::text FROM outbox_events").await?;
    assert_eq!(std::str::from_utf8(&request.body)?, data);
    assert_eq!((request.event_id()?, request.header("content-type")), (event, Some("application/json")));
    assert!(verifies(&secret, &request)?);
    Ok(())
}

#[tokio::test]
async fn a_webhooks_envelope_holds_the_metadata_that_was_asked_for() -> Result<()> {
    let (.., request) = receive(r#"{"metadata": ["reg*", "n", "absent"]}"#).await?;
    let body = std::str::from_utf8(&request.body)?;
    ensure!(body.contains(r#""metadata":{"n":1.50,"region":"eu"}"#) && !body.contains("hidden"), "{body}");
    let (.., request) = receive("{}").await?;
    assert_eq!(request.json()?.get("metadata"), None);
    Ok(())
}

#[tokio::test]
async fn settings_by_which_no_event_can_be_written_are_refused() -> Result<()> {
    let world = World::new().await?;
    let refused = async |kind: &str, settings: &str| -> Result<Option<String>> {
        let call = match kind {
            "webhook" => "SELECT outbox.add_webhook('a', 'https://example.com/', settings => $1::text::jsonb)",
            _ => "SELECT outbox.add_rabbitmq('b', settings => $1::text::jsonb)",
        };
        match world.session.execute(call, &[&settings]).await {
            Ok(_) => Ok(None),
            Err(error) => {
                let error = error.as_db_error().context("an error of the server")?.clone();
                ensure!(error.code().code() == "22023" && error.hint().is_some(), "{settings}: {error:?}");
                Ok(Some(error.message().to_owned()))
            }
        }
    };
    for (kind, settings, setting) in [
        ("webhook", r#"{"format": "xml"}"#, "format"),
        ("webhook", r#"{"format": 1}"#, "format"),
        ("rabbitmq", r#"{"format": "standard"}"#, "format"),
        ("webhook", r#"{"metadata": "*"}"#, "metadata"),
        ("rabbitmq", r#"{"metadata": [1]}"#, "metadata"),
        ("webhook", r#"{"source": ""}"#, "source"),
        ("webhook", r#"{"source": 7}"#, "source"),
        ("webhook", r#"{"source": "a b"}"#, "source"),
        ("webhook", r#"{"source": "é"}"#, "source"),
        ("webhook", r#"{"source": "1:b"}"#, "source"),
        ("webhook", r#"{"source": "a%2"}"#, "source"),
        ("webhook", r#"{"source": "a#b#c"}"#, "source"),
        ("webhook", r#"{"source": "//host:port/"}"#, "source"),
        ("webhook", r#"{"source": "/a[1]"}"#, "source"),
        ("rabbitmq", r#"{"source": "a<b>"}"#, "source"),
    ] {
        let error = refused(kind, settings).await?.with_context(|| format!("{kind} {settings} was taken"))?;
        ensure!(error.contains(&format!("settings.{setting}")), "{settings}: {error}");
    }
    for source in [
        "https://user@[2001:DB8::1]:8080/a/b?c=d#e",
        "urn:shop:orders",
        "mailto:a@b.example",
        "/orders",
        "//host/x",
        "a/b:c",
        "./a:b",
        "?q",
        "#f",
        "%C3%A9",
        "HTTP://EXAMPLE.COM",
    ] {
        for kind in ["webhook", "rabbitmq"] {
            assert_eq!(refused(kind, &json!({"source": source}).to_string()).await?, None, "{source}");
        }
    }
    Ok(())
}

//! Databases in other encodings than UTF-8, and values that one side holds and the other does not: each costs itself.

use anyhow::{Context, Result, ensure};
use outbox_tests::cluster::Cluster;
use outbox_tests::receiver::Receiver;
use outbox_tests::relay::Relay;
use outbox_tests::session::Session;
use outbox_tests::wait::{self, LONG};

/// Encodings with a byte that has no counterpart in UTF-8, written as an expression.
const WITHOUT_COUNTERPART: [(&str, &str); 2] =
    [("SQL_ASCII", "convert_from('\\x80'::bytea, 'SQL_ASCII')"), ("WIN1252", "chr(129)")];

struct Stage {
    session: Session,
    receiver: Receiver,
    relay: Relay,
}

async fn stage(cluster: &Cluster, encoding: &str) -> Result<Stage> {
    let database = format!("db_{}", outbox_tests::scratch::random_hex(4)?);
    let create = format!("CREATE DATABASE {database} TEMPLATE template0 ENCODING '{encoding}' LOCALE 'C'");
    cluster.connect("postgres").await?.batch_execute(&create).await?;
    let session = cluster.connect(&database).await?;
    session.batch_execute("CREATE EXTENSION pg_outbox").await?;
    session.until("SELECT worker_pid IS NOT NULL FROM outbox.stats()", LONG).await?;
    let receiver = Receiver::start()?;
    session.execute("SELECT outbox.add_webhook('hook', $1)", &[&receiver.url("/")]).await?;
    let relay = Relay::start(cluster, &database, None).await?;
    Ok(Stage { session, receiver, relay })
}

#[tokio::test]
async fn a_notification_of_any_bytes_is_harmless() -> Result<()> {
    let cluster = Cluster::shared().await?;
    for (encoding, byte) in WITHOUT_COUNTERPART {
        let stage = stage(cluster, encoding).await?;
        for channel in ["outbox_events", "outbox_destinations"] {
            let before = stage.relay.metric("outbox_relay_notifications_total").await?;
            stage.session.batch_execute(&format!("SELECT pg_notify('{channel}', {byte})")).await?;
            let heard =
                async || Ok((stage.relay.metric("outbox_relay_notifications_total").await? > before).then_some(()));
            wait::until("the notification to be heard", LONG, heard).await.context(encoding)?;
        }
        stage.session.batch_execute("SELECT outbox.publish('a', '{\"k\": 1}', metadata => '{\"t\": 2}')").await?;
        stage.receiver.wait_for(1, LONG).await.context(encoding)?;
        let lost = stage.relay.metric("outbox_relay_reconnects_total").await?;
        ensure!(lost == 0.0, "{encoding}: {}", stage.relay.log());
    }
    Ok(())
}

/// What has a counterpart is converted.
#[tokio::test]
async fn texts_of_other_encodings_arrive_in_utf8() -> Result<()> {
    let stage = stage(Cluster::shared().await?, "LATIN1").await?;
    let publish = "SELECT outbox.publish('grüße', '{\"k\": \"é\"}', 'ä', '1', metadata => '{\"t\": \"ö\"}')";
    stage.session.batch_execute(publish).await?;
    let received = stage.receiver.wait_for(1, LONG).await?;
    let body = received[0].json()?;
    assert_eq!((body["type"].as_str(), body["data"]["k"].as_str()), (Some("grüße"), Some("é")));
    assert_eq!(body["aggregate_type"].as_str(), Some("ä"));
    stage.session.until("SELECT bool_and(status = 'processed') FROM outbox_events", LONG).await
}

#[tokio::test]
async fn an_event_that_cannot_be_handed_out_is_a_dead_letter_and_the_others_arrive() -> Result<()> {
    let cluster = Cluster::shared().await?;
    for (encoding, byte) in WITHOUT_COUNTERPART {
        let stage = stage(cluster, encoding).await?;
        stage
            .session
            .batch_execute(&format!(
                "INSERT INTO outbox_events (event_type, event_data)
                 SELECT 'a', CASE n WHEN 5 THEN to_jsonb({byte}::text) ELSE '{{}}' END FROM generate_series(1, 9) n"
            ))
            .await?;
        stage.receiver.wait_for(8, LONG).await.with_context(|| format!("{encoding}: {}", stage.relay.log()))?;
        let settled = "SELECT count(*) FILTER (WHERE status = 'processed') = 8
                              AND count(*) FILTER (WHERE status = 'failed' AND last_error LIKE '%hand it out%') = 1
                         FROM outbox_events";
        stage.session.until(settled, LONG).await.context(encoding)?;
        stage.session.batch_execute("SELECT outbox.publish('after', '{}')").await?;
        stage.receiver.wait_for(9, LONG).await?;
        let lost = stage.relay.metric("outbox_relay_reconnects_total").await?;
        ensure!(lost == 0.0, "{encoding}: {}", stage.relay.log());
    }
    Ok(())
}

/// Whoever wrote past the functions: the other destinations are served.
#[tokio::test]
async fn a_destination_that_cannot_be_read_costs_itself() -> Result<()> {
    let stage = stage(Cluster::shared().await?, "UTF8").await?;
    let add = "SELECT outbox.add_webhook('bad', 'https://example.com/', '{none}')";
    stage.session.batch_execute(add).await?;
    let spoil = "UPDATE outbox.destination SET settings = '{\"x\": 1e400}' WHERE name = 'bad';
                 NOTIFY outbox_destinations";
    stage.session.batch_execute(spoil).await?;
    stage.session.batch_execute("SELECT outbox.publish('a', '{}')").await?;
    stage.receiver.wait_for(1, LONG).await.with_context(|| stage.relay.log())?;
    let lost = stage.relay.metric("outbox_relay_reconnects_total").await?;
    ensure!(lost == 0.0, "{}", stage.relay.log());
    Ok(())
}

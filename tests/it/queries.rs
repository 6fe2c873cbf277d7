//! The queries that users know, word for word.

use anyhow::Result;
use outbox_tests::broker::Broker;
use outbox_tests::receiver::{Receiver, Reply};
use outbox_tests::relay::Relay;
use outbox_tests::session::Session;
use outbox_tests::wait::LONG;
use outbox_tests::world::World;

async fn texts(session: &Session, query: &str) -> Result<Vec<Vec<Option<String>>>> {
    let messages = session.simple_query(query).await?;
    let rows = messages.iter().filter_map(|message| match message {
        tokio_postgres::SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    Ok(rows.map(|row| (0..row.len()).map(|i| row.get(i).map(str::to_owned)).collect()).collect())
}

#[tokio::test]
async fn the_documented_queries_give_what_they_say() -> Result<()> {
    let World { cluster, database, session } = World::new().await?;
    let broker = Broker::shared().await?;
    broker.channel().await?.bind("outbox_events", "#", "all").await?;
    let receiver = Receiver::start()?;
    session
        .execute(
            "SELECT outbox.add_rabbitmq('queue', event_types => '{contact.*}'),
                    outbox.add_webhook('hook', $1, '{bad.*}', settings => '{\"max_attempts\": 2, \"base\": 0.01}'),
                    outbox.add_webhook('slow', $2, '{slow.*}')",
            &[&receiver.url("bad"), &receiver.url("slow")],
        )
        .await?;
    receiver.reply_with(|_, request| if request.path == "/slow" { Reply::Never } else { Reply::Status(500) });
    let relay = Relay::start(cluster, &database, Some(&broker)).await?;

    let trigger = "SELECT trigger_name, event_manipulation, event_object_table, action_statement
  FROM information_schema.triggers WHERE trigger_name = 'after_outbox_insert';";
    let expected = ["after_outbox_insert", "INSERT", "outbox_events", "EXECUTE FUNCTION notify_outbox_event()"];
    assert_eq!(texts(&session, trigger).await?, [expected.map(|text| Some(text.to_owned()))]);

    session.batch_execute("SELECT outbox.publish('contact.created', '{}')").await?;
    session.until("SELECT count(*) = 1 FROM outbox_events WHERE status = 'processed'", LONG).await?;
    let latest = "SELECT event_type, status, created_at, processed_at, processed_at - created_at AS latency
  FROM outbox_events ORDER BY created_at DESC LIMIT 1;";
    let row = &texts(&session, latest).await?[0];
    assert_eq!(row[..2], [Some("contact.created".to_owned()), Some("processed".to_owned())]);
    assert!(row[2..].iter().all(Option::is_some), "{row:?}");

    session.batch_execute("SELECT outbox.publish('bad.news', '{}'), outbox.publish('slow.news', '{}')").await?;
    session.until("SELECT count(*) = 1 FROM outbox_events WHERE status = 'failed'", LONG).await?;
    session.until("SELECT count(*) = 1 FROM outbox_events WHERE status = 'processing'", LONG).await?;
    let processing = texts(&session, "SELECT * FROM outbox_events WHERE status = 'processing';").await?;
    assert_eq!(processing[0][2].as_deref(), Some("slow.news"));
    let failed = "SELECT event_type, last_error, retry_count FROM outbox_events WHERE status = 'failed' ORDER BY created_at DESC LIMIT 10;";
    let row = &texts(&session, failed).await?[0];
    assert_eq!((row[0].as_deref(), row[2].as_deref()), (Some("bad.news"), Some("2")));
    assert!(row[1].as_deref().is_some_and(|error| error.contains("500")), "{row:?}");

    session.batch_execute("SELECT outbox.pause('queue'); SELECT outbox.publish('contact.changed', '{}')").await?;
    let pending = "SELECT event_type, status, created_at, last_error FROM outbox_events WHERE status = 'pending' ORDER BY created_at DESC;";
    assert_eq!(texts(&session, pending).await?[0][0].as_deref(), Some("contact.changed"));

    for rubbish in ["'test-payload'", "''", "'{\"v\":1'", "'{\"v\":2,\"events\":{}}'", "repeat('x', 7999)"] {
        let statement = match rubbish.starts_with('r') {
            true => format!("SELECT pg_notify('outbox_events', {rubbish})"),
            false => format!("LISTEN outbox_events;  NOTIFY outbox_events, {rubbish};"),
        };
        session.batch_execute(&statement).await?;
    }
    session.batch_execute("SELECT outbox.resume('queue'); SELECT outbox.publish('contact.removed', '{}')").await?;
    session.until("SELECT count(*) = 3 FROM outbox_events WHERE status = 'processed'", LONG).await?;
    assert_eq!(relay.get("/readyz").await?.0, 200);
    Ok(())
}

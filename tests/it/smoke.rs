//! The main job: an event that was committed arrives, and is settled.

use anyhow::Result;
use outbox_tests::broker::Broker;
use outbox_tests::receiver::Receiver;
use outbox_tests::relay::Relay;
use outbox_tests::wait::LONG;
use outbox_tests::world::World;
use uuid::Uuid;

#[tokio::test]
async fn an_event_reaches_the_queue_and_the_webhook() -> Result<()> {
    let World { cluster, database, session } = World::new().await?;
    let broker = Broker::shared().await?;
    let channel = broker.channel().await?;
    channel.bind("outbox_events", "#", "all").await?;
    let mut queue = channel.consume("all").await?;
    let receiver = Receiver::start()?;
    session.execute("SELECT outbox.add_rabbitmq('queue')", &[]).await?;
    session.execute("SELECT outbox.add_webhook('hook', $1)", &[&receiver.url("hook")]).await?;
    let relay = Relay::start(cluster, &database, Some(&broker)).await?;

    let event: Uuid =
        session.one(r#"SELECT outbox.publish('contact.created', '{"name": "Ada"}', 'contact', '42')"#).await?;

    let message = queue.next(LONG).await?;
    assert_eq!(message.event_id()?, event);
    assert_eq!(message.routing_key, "contact.created");
    assert_eq!(message.json()?["name"], "Ada");
    let requests = receiver.wait_for(1, LONG).await?;
    assert_eq!(requests[0].event_id()?, event);
    assert_eq!(requests[0].json()?["type"], "contact.created");
    session.until("SELECT status = 'processed' FROM outbox_events", LONG).await?;
    assert!(relay.terminate(LONG).await?.success());
    Ok(())
}

#[tokio::test]
async fn the_events_of_a_stopped_broker_wait_for_it() -> Result<()> {
    let World { cluster, database, session } = World::new().await?;
    let broker = Broker::own().await?;
    broker.channel().await?.bind("outbox_events", "#", "all").await?;
    session.execute("SELECT outbox.add_rabbitmq('rabbitmq')", &[]).await?;
    let _relay = Relay::start(cluster, &database, Some(&broker)).await?;
    broker.stop(true).await?;

    let event: Uuid = session.one("SELECT outbox.publish('contact.created', '{}')").await?;
    session.until("SELECT state = 'open' FROM outbox.destinations", LONG).await?;
    broker.resume().await?;

    let mut queue = broker.channel().await?.consume("all").await?;
    assert_eq!(queue.next(LONG).await?.event_id()?, event);
    session.until("SELECT status = 'processed' FROM outbox_events", LONG).await?;
    Ok(())
}

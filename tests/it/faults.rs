//! A relay's own trouble costs no event anything, and no other relay.

use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use outbox_tests::broker::Broker;
use outbox_tests::receiver::{Received, Receiver, Reply};
use outbox_tests::relay::Relay;
use outbox_tests::scratch;
use outbox_tests::wait::{self, LONG};
use outbox_tests::world::World;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use uuid::Uuid;

use crate::rabbitmq::Site;

const NO_LOSS: &str = "SELECT bool_and(status <> 'failed') AND max(retry_count) = 0 FROM outbox_events";

#[tokio::test]
async fn a_relay_with_other_allowed_networks_burns_no_attempts() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    world.add_webhook("hook", &receiver.url("hook"), r#"{"max_attempts": 1}"#).await?;
    let url = world.cluster.url(&world.database);
    let confined = Relay::with(&url, None, &[("OUTBOX_WEBHOOK_ALLOW_NETWORKS", "")]).await?;
    world.publish("0").await?;
    world.until("SELECT state = 'open' AND last_error LIKE 'address %' FROM outbox.destinations").await?;
    let _free = world.relay().await?;
    for n in 0..60 {
        world.publish(&n.to_string()).await?;
    }
    world.processed().await?;
    assert!(world.session.one::<bool>(NO_LOSS).await?);
    assert_eq!(receiver.count(), 61);
    world.until("SELECT state = 'active' FROM outbox.destinations").await?;
    assert_eq!(confined.metric("outbox_relay_unable{destination=\"hook\"}").await?, 1.0);
    Ok(())
}

#[tokio::test]
async fn a_relay_that_can_not_reach_the_broker_opens_no_circuit_for_others() -> Result<()> {
    let site = Site::shared().await?;
    let channel = site.broker.channel().await?;
    channel.bind("outbox_events", "#", "all").await?;
    let mut queue = channel.consume("all").await?;
    site.add("mq", "").await?;
    let dead = format!("amqp://u:p@127.0.0.1:{}/%2f", scratch::free_port()?);
    let _cut_off = Relay::with(&site.cluster.url(&site.database), Some(&dead), &[]).await?;
    site.until("SELECT state = 'open' AND last_error LIKE 'can''t connect to RabbitMQ%' FROM outbox.destinations")
        .await?;
    let _healthy = site.relay().await?;
    for n in 0..100 {
        let begun = SystemTime::now();
        let event = site.publish(&n.to_string()).await?;
        assert_eq!(queue.next(LONG).await?.event_id()?, event);
        ensure!(n < 5 || begun.elapsed()? < Duration::from_secs(3), "event {n} took {:?}", begun.elapsed());
        assert_eq!(site.session.one::<i32>("SELECT circuit_failures FROM outbox.destinations").await?, 0);
    }
    site.processed().await?;
    assert!(site.session.one::<bool>(NO_LOSS).await?);
    Ok(())
}

#[tokio::test]
async fn a_relay_without_authorities_disables_nothing() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    world.add_webhook("hook", &receiver.url("hook").replace("http:", "https:"), r#"{"max_attempts": 1}"#).await?;
    let none = [("SSL_CERT_FILE", "/nonexistent"), ("SSL_CERT_DIR", "/nonexistent")];
    let relay = Relay::with(&world.cluster.url(&world.database), None, &none).await?;
    world.publish("1").await?;
    world.until("SELECT state IN ('open', 'half-open') AND last_error IS NOT NULL FROM outbox.destinations").await?;
    world.until("SELECT bool_and(attempts = 0 AND status = 'pending') FROM outbox.deliveries").await?;
    relay.terminate(LONG).await?;
    world.add_webhook("hook", &receiver.url("hook"), "{}").await?;
    let _relay = world.relay().await?;
    world.processed().await?;
    assert!(world.session.one::<bool>(NO_LOSS).await?);
    Ok(())
}

#[tokio::test]
async fn a_relay_without_file_descriptors_gives_its_events_back() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    receiver.reply_with(|_, _| Reply::With(204, vec![("connection", "close".into())], Vec::new()));
    world.add_webhook("hook", &receiver.url("hook"), r#"{"max_attempts": 1}"#).await?;
    let relay = world.relay().await?;
    world.publish("0").await?;
    world.processed().await?;
    let limit = |files: &str| {
        let status =
            Command::new("prlimit").args(["--pid", &relay.pid().to_string(), &format!("--nofile={files}:")]).status();
        ensure!(status.is_ok_and(|status| status.success()), "prlimit failed");
        Ok(())
    };
    limit("5")?;
    world.publish("1").await?;
    world.until("SELECT last_error LIKE '%Too many open files%' FROM outbox.deliveries").await?;
    assert!(world.session.one::<bool>(NO_LOSS).await?);
    limit("1000")?;
    world.processed().await?;
    assert!(world.session.one::<bool>(NO_LOSS).await?);
    Ok(())
}

#[tokio::test]
async fn a_black_hole_uses_no_attempt_whichever_time_is_over_first() -> Result<()> {
    let world = World::new().await?;
    let socket = TcpSocket::new_v4()?;
    socket.bind("127.0.0.1:0".parse()?)?;
    let listener = socket.listen(1)?;
    let address = listener.local_addr()?;
    let mut queued = Vec::new();
    while let Ok(stream) = tokio::time::timeout(Duration::from_millis(500), TcpStream::connect(address)).await {
        queued.push(stream?);
        ensure!(queued.len() < 100, "the queue does not fill");
    }
    let settings = r#"{"timeout": 0.3, "connect_timeout": 5, "max_attempts": 1}"#;
    world.add_webhook("hook", &format!("http://{address}/"), settings).await?;
    let _relay = world.relay().await?;
    world.publish("1").await?;
    world.until("SELECT last_error = 'can''t connect: no connection within 0.3 s' FROM outbox.deliveries").await?;
    world.until("SELECT circuit_failures >= 2 FROM outbox.destinations").await?;
    assert!(world.session.one::<bool>(NO_LOSS).await?);
    drop(queued);
    Ok(())
}

#[tokio::test]
async fn when_the_broker_is_back_deliveries_go_on_soon() -> Result<()> {
    let site = Site::new(Broker::own().await?).await?;
    site.broker.channel().await?.bind("outbox_events", "#", "all").await?;
    site.add("mq", "").await?;
    let relay = site.relay().await?;
    site.publish("0").await?;
    site.processed().await?;
    site.broker.stop_app().await?;
    site.until("SELECT state IN ('open', 'half-open') FROM outbox.destinations").await?;
    let events = [site.publish("1").await?, site.publish("1").await?];
    site.until("SELECT bool_or(last_error IS NOT NULL) FROM outbox.deliveries").await?;
    site.broker.start_app().await?;
    let mut queue = site.broker.channel().await?.consume("all").await?;
    let up =
        async || Ok(relay.events().iter().filter(|line| line["message"] == "connected to RabbitMQ").nth(1).cloned());
    wait::until("the relay to be connected again", LONG, up).await?;
    let connected = SystemTime::now();
    site.processed().await?;
    assert!(connected.elapsed()? < Duration::from_secs(2), "{:?}", connected.elapsed());
    let arrived: Vec<Uuid> = queue.take(3, LONG).await?.iter().map(|m| m.event_id()).collect::<Result<_>>()?;
    assert_eq!(&arrived[1..], events);
    assert!(site.session.one::<bool>(NO_LOSS).await?);
    Ok(())
}

#[tokio::test]
async fn what_a_relay_held_beyond_its_lease_is_not_sent_again() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    receiver.reply(Reply::After(Duration::from_millis(400), Box::new(Reply::Accept)));
    world.add_webhook("hook", &receiver.url("hook"), r#"{"concurrency": 1}"#).await?;
    let url = world.cluster.url(&world.database);
    let stopped = Relay::with(&url, None, &[("OUTBOX_LEASE", "5")]).await?;
    world.execute("SELECT outbox.publish('contact.created', '{}') FROM generate_series(1, 12)").await?;
    receiver.wait_for(1, LONG).await?;
    stopped.signal(Signal::SIGSTOP);
    let _other = world.relay().await?;
    world.processed().await?;
    stopped.signal(Signal::SIGCONT);
    world.publish("last").await?;
    world.processed().await?;
    let mut ids: Vec<Uuid> = receiver.received().iter().map(Received::event_id).collect::<Result<_>>()?;
    let sent = ids.len();
    ids.sort_unstable();
    ids.dedup();
    // The one that was under way.
    assert!(ids.len() == 13 && sent <= 14, "{sent} requests for 13 events");
    Ok(())
}

#[tokio::test]
async fn a_2xx_counts_when_its_status_is_there_whatever_the_body_does() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    receiver.reply(Reply::EndlessBody(200));
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        let mut open = Vec::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut buffer = [0; 65_536];
            let _read = stream.read(&mut buffer).await;
            let _sent = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nthank you").await;
            open.push(stream);
        }
    });
    world.add_webhook("endless", &receiver.url("hook"), "{}").await?;
    world.add_webhook("stalled", &format!("http://{address}/"), "{}").await?;
    let _relay = world.relay().await?;
    for n in 0..20 {
        world.publish(&n.to_string()).await?;
    }
    world.session.until("SELECT bool_and(status = 'processed') FROM outbox_events", Duration::from_secs(20)).await
}

#[tokio::test]
async fn a_kept_connection_that_ends_just_then_costs_no_attempt() -> Result<()> {
    let world = World::new().await?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    // Answers the first request of each connection, and hangs up when the second one comes.
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut buffer = [0; 65_536];
                let _read = stream.read(&mut buffer).await;
                let _sent = stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await;
                let _read = stream.read(&mut buffer).await;
            });
        }
    });
    world.add_webhook("hook", &format!("http://{address}/"), r#"{"max_attempts": 1}"#).await?;
    let _relay = world.relay().await?;
    for n in 0..30 {
        world.publish(&n.to_string()).await?;
        world.processed().await.with_context(|| format!("event {n}"))?;
    }
    assert!(world.session.one::<bool>(NO_LOSS).await?);
    Ok(())
}

#[tokio::test]
async fn a_network_that_is_withdrawn_is_not_reached_over_a_kept_connection() -> Result<()> {
    let cluster = outbox_tests::cluster::Cluster::start().await?;
    let database = cluster.database().await?;
    let session = cluster.connect(&database).await?;
    let receiver = Receiver::start()?;
    let url = receiver.url("hook").replace("127.0.0.1", "localhost");
    session.batch_execute("ALTER SYSTEM SET outbox.webhook_allow_networks = '127.0.0.0/8'").await?;
    session.batch_execute("SELECT pg_reload_conf()").await?;
    session.until("SELECT current_setting('outbox.webhook_allow_networks') <> ''", LONG).await?;
    session.execute("SELECT outbox.add_webhook('hook', $1)", &[&url]).await?;
    let relay = Relay::with(&cluster.url(&database), None, &[("OUTBOX_WEBHOOK_ALLOW_NETWORKS", "")]).await?;
    session.batch_execute("SELECT outbox.publish('contact.created', '{}')").await?;
    session.until("SELECT bool_and(status = 'processed') FROM outbox_events", LONG).await?;
    session.batch_execute("ALTER SYSTEM SET outbox.webhook_allow_networks = ''").await?;
    session.batch_execute("SELECT pg_reload_conf()").await?;
    session.until("SELECT current_setting('outbox.webhook_allow_networks') = ''", LONG).await?;
    session.batch_execute("SELECT outbox.resume('hook')").await?;
    relay.logged(r#""message":"changed""#, LONG).await?;
    session.batch_execute("SELECT outbox.publish('contact.created', '{}')").await?;
    session.until("SELECT bool_or(last_error LIKE 'address %') FROM outbox.deliveries", LONG).await?;
    assert_eq!(receiver.count(), 1);
    Ok(())
}

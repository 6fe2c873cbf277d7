//! Which addresses webhooks reach, and what becomes of an event whose receiver is not there.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use outbox_tests::cluster::Cluster;
use outbox_tests::receiver::{Received, Receiver};
use outbox_tests::relay::Relay;
use outbox_tests::wait::{self, LONG};
use outbox_tests::world::World;
use tokio::net::{TcpSocket, TcpStream};
use uuid::Uuid;

#[tokio::test]
async fn a_host_that_lets_nobody_connect_opens_the_circuit() -> Result<()> {
    let world = World::new().await?;
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
    world.add_webhook("hook", &format!("http://{address}/"), r#"{"connect_timeout": "300 ms"}"#).await?;
    let _relay = world.relay().await?;
    world.publish("1").await?;
    world.error("can't connect: ").await?;
    world.until("SELECT state IN ('open', 'half-open') AND circuit_failures >= 2 FROM outbox.destinations").await?;
    world.until("SELECT bool_and(attempts = 0) FROM outbox.deliveries").await?;

    drop((listener, queued));
    let receiver = Receiver::on(address.port())?;
    receiver.wait_for(1, LONG).await?;
    world.processed().await?;
    assert_eq!(world.session.one::<i32>("SELECT retry_count FROM outbox_events").await?, 0);
    Ok(())
}

#[tokio::test]
async fn a_receiver_that_is_away_uses_no_attempt() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    let (port, url) = (receiver.port(), receiver.url("hook"));
    drop(receiver);
    world.add_webhook("hook", &url, "{}").await?;
    let _relay = world.relay().await?;
    let events = [world.publish("1").await?, world.publish("1").await?, world.publish("1").await?];
    world.error("can't connect: Connection refused").await?;
    world.until("SELECT state IN ('open', 'half-open') FROM outbox.destinations").await?;
    let receiver = Receiver::on(port)?;
    let arrived: Vec<Uuid> = receiver.wait_for(3, LONG).await?.iter().map(Received::event_id).collect::<Result<_>>()?;
    assert_eq!(arrived, events);
    world.processed().await?;
    assert_eq!(world.session.one::<i32>("SELECT max(retry_count) FROM outbox_events").await?, 0);
    Ok(())
}

#[tokio::test]
async fn a_receiver_that_does_not_speak_tls_is_not_spoken_to() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    world
        .add_webhook("hook", &receiver.url("hook").replace("http://", "https://"), r#"{"timeout": "00:00:05"}"#)
        .await?;
    let _relay = world.relay().await?;
    world.publish("1").await?;
    world.error("can't connect: ").await?;
    assert_eq!(receiver.count(), 0);
    world.add_webhook("hook", &receiver.url("hook"), r#"{"timeout": "1 minute 30 seconds"}"#).await?;
    world.processed().await?;
    assert_eq!(world.session.one::<i32>("SELECT retry_count FROM outbox_events").await?, 0);
    Ok(())
}

#[tokio::test]
async fn addresses_that_are_not_public_are_refused() -> Result<()> {
    let world = World::new().await?;
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
        world.add_webhook(&format!("hook{n}"), &format!("http://{host}:{port}/"), settings).await?;
    }
    let url = world.cluster.url(&world.database);
    let _relay = Relay::with(&url, None, &[("OUTBOX_WEBHOOK_ALLOW_NETWORKS", "")]).await?;
    world.publish("1").await?;
    // Another relay may be allowed to: the event waits, and the operator sees why.
    let all = format!("SELECT count(last_error) = {} FROM outbox.deliveries", hosts.len());
    world.until(&all).await?;
    for (n, host) in hosts.iter().enumerate() {
        let sql = "SELECT attempts::text || ' ' || last_error FROM outbox.deliveries WHERE destination = $1";
        let shown: String = world.session.query_one(sql, &[&format!("hook{n}")]).await?.get(0);
        assert!(
            shown.starts_with("0 address ") && shown.contains("is not public; an operator can allow its network"),
            "{host}: {shown}"
        );
    }
    world.until("SELECT bool_and(state = 'open' AND last_error LIKE 'address %') FROM outbox.destinations").await?;
    assert_eq!(receiver.count(), 0);
    Ok(())
}

#[tokio::test]
async fn urls_with_a_user_or_of_another_scheme_are_not_taken() -> Result<()> {
    let world = World::new().await?;
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
        let error = world.add_webhook("hook", url, "{}").await.err().with_context(|| format!("{url:?} was taken"))?;
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

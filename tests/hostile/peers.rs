//! Peers that answer with anything: the relay never ends, takes none of it for success, and others go on.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use outbox_tests::broker::Broker;
use outbox_tests::receiver::Receiver;
use outbox_tests::relay::Relay;
use outbox_tests::world::World;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::Dice;

/// None of these is a success.
fn answers(dice: &mut Dice) -> Vec<Vec<u8>> {
    let mut answers: Vec<Vec<u8>> = [
        "",
        "\r\n\r\n\r\n",
        "HTTP/1.1",
        "HTTP/1.1 \r\n\r\n",
        "HTTP/1.1 20\r\n\r\n",
        "HTTP/1.1 2000 OK\r\n\r\n",
        "HTTP/1.1 -200 OK\r\n\r\n",
        "HTTP/1.1 000 Nothing\r\n\r\n",
        "HTTP/1.1 999 All\r\ncontent-length: 0\r\n\r\n",
        "HTTP/9.9 200 OK\r\n\r\n",
        "HTTP/2 200\r\n\r\n",
        "ICY 200 OK\r\n\r\n",
        "200 OK",
        "HTTP/1.1 200 OK\r\nno colon here\r\n\r\n",
        "HTTP/1.1 200 OK\r\n: nameless\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999999\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nx",
        "HTTP/1.1 200 OK\r\nretry-after: x",
        "HTTP/1.1 429 Slow\r\nretry-after: -1\r\ncontent-length: 0\r\n\r\n",
        "HTTP/1.1 429 Slow\r\nretry-after: 99999999999999999999\r\ncontent-length: 0\r\n\r\n",
        "HTTP/1.1 503 No\r\nretry-after: Thu, 99 Foo 10000 25:61:61 GMT\r\ncontent-length: 0\r\n\r\n",
        "HTTP/1.1 302 Found\r\nlocation: http://[\r\ncontent-length: 0\r\n\r\n",
        "HTTP/1.1 500 \u{1f4a5}\u{0}\r\n\r\nb\u{0}\u{1b}[31m",
        "HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into();
    answers.push(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec());
    answers.push([b"HTTP/1.1 200 OK\r\nx: ".as_slice(), &vec![b'a'; 2_000_000]].concat());
    answers.push("HTTP/1.1 100 Continue\r\n\r\n".repeat(20_000).into_bytes());
    for _ in 0..12 {
        let mut bytes: Vec<u8> = (0..dice.roll(3000)).map(|_| dice.roll(256) as u8).collect();
        // No status line by chance.
        bytes.insert(0, b'G');
        answers.push(bytes);
    }
    answers
}

/// Reads what a request begins with, and says its answer.
async fn answer(listener: TcpListener, answer: Vec<u8>) -> Result<()> {
    loop {
        let (mut stream, _) = listener.accept().await?;
        let answer = answer.clone();
        tokio::spawn(async move {
            let mut buffer = [0; 65_536];
            // The relay may be gone by now, which is its right.
            if stream.read(&mut buffer).await.is_ok() && stream.write_all(&answer).await.is_ok() {
                let _ = stream.shutdown().await;
            }
        });
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[allow(clippy::disallowed_macros, reason = "for whoever reads the output of the tests")]
async fn no_answer_that_is_malformed_is_a_success_or_harms_others() -> Result<()> {
    let seed = crate::seed()?;
    println!("OUTBOX_HOSTILE_SEED={seed}");
    let world = World::new().await?;
    let answers = answers(&mut Dice(seed));
    for (n, said) in answers.iter().enumerate() {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("http://{}/", listener.local_addr()?);
        tokio::spawn(answer(listener, said.clone()));
        world.add_webhook(&format!("odd{n:02}"), &url, r#"{"timeout": 2, "max_attempts": 1}"#).await?;
    }
    let receiver = Receiver::start()?;
    world.add_webhook("good", &receiver.url("good"), "{}").await?;
    let relay = world.relay().await?;
    world.publish("1").await?;
    receiver.wait_for(1, Duration::from_secs(20)).await?;
    let odd = answers.len();
    let told = format!(
        "SELECT count(*) = {odd} FROM outbox.deliveries WHERE destination LIKE 'odd%' AND last_error IS NOT NULL"
    );
    world.until(&told).await.context("each has an error, and none has gone")?;
    // An outage uses no attempt, everything else one.
    let wrong: i64 = world
        .session
        .one("SELECT count(*) FROM outbox.deliveries WHERE (status = 'failed') <> (attempts = 1) OR attempts > 1")
        .await?;
    ensure!(wrong == 0, "OUTBOX_HOSTILE_SEED={seed}: {wrong} deliveries count their attempts wrongly");
    ensure!(world.session.one::<String>("SELECT status FROM outbox_events LIMIT 1").await? != "processed");
    for n in 2..7 {
        world.publish(&n.to_string()).await?;
    }
    receiver.wait_for(6, Duration::from_secs(20)).await?;
    ensure!(!relay.log().contains("panic"), "{}", relay.log());
    ensure!(relay.get("/healthz").await?.0 == 200);
    Ok(())
}

/// Connects to the broker and passes on what both say; but what the broker says becomes garbage after so many bytes.
async fn distort(mut client: TcpStream, broker: u16, after: Option<usize>, garbage: Vec<u8>) -> Result<()> {
    let mut server = TcpStream::connect(("127.0.0.1", broker)).await?;
    let Some(mut left) = after else {
        tokio::io::copy_bidirectional(&mut client, &mut server).await?;
        return Ok(());
    };
    let ((mut from_client, mut to_client), (mut from_server, mut to_server)) = (client.split(), server.split());
    let there = async { tokio::io::copy(&mut from_client, &mut to_server).await };
    let back = async {
        let mut buffer = [0; 4096];
        loop {
            let read = from_server.read(&mut buffer).await?;
            let honest = read.min(left);
            to_client.write_all(&buffer[..honest]).await?;
            left -= honest;
            if left == 0 || read == 0 {
                to_client.write_all(&garbage).await?;
                // Nothing more is said, and the connection stays open.
                tokio::time::sleep(Duration::from_secs(2)).await;
                return Ok::<(), std::io::Error>(());
            }
        }
    };
    tokio::select! {
        _ = there => {}
        ended = back => ended?,
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[allow(clippy::disallowed_macros, reason = "for whoever reads the output of the tests")]
async fn a_broker_that_speaks_garbage_is_an_outage_and_others_go_on() -> Result<()> {
    let seed = crate::seed()?;
    println!("OUTBOX_HOSTILE_SEED={seed}");
    let broker = Broker::shared().await?;
    let world = World::new().await?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let port = listener.local_addr()?.port();
    let (real, connections) = (broker.port(), Arc::new(AtomicUsize::new(0)));
    let counted = connections.clone();
    tokio::spawn(async move {
        let mut dice = Dice(seed);
        while let Ok((client, _)) = listener.accept().await {
            let number = counted.fetch_add(1, SeqCst);
            // In the handshake, just after it (about 550 bytes), and at work.
            let after = (number < 5).then(|| [8, 300, 520, 560, 700][number]);
            let mut garbage: Vec<u8> = (0..1 + dice.roll(2000)).map(|_| dice.roll(256) as u8).collect();
            if number % 2 == 1 {
                // A frame of a channel that nobody opened, as long as can be said.
                garbage.splice(0..0, [1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
            }
            tokio::spawn(distort(client, real, after, garbage));
        }
    });
    let receiver = Receiver::start()?;
    world.add_webhook("good", &receiver.url("good"), "{}").await?;
    let queue = format!("garbage-{port}");
    world
        .execute(&format!(
            "SELECT outbox.add_rabbitmq('queue', exchange => '', routing_key => '{queue}',
                                        settings => '{{\"declare\": \"queue\", \"queue\": \"{queue}\"}}')"
        ))
        .await?;
    let url = broker.url().replace(&format!(":{real}"), &format!(":{port}"));
    let relay = Relay::spawn(&world.cluster.url(&world.database), Some(&url), &[])?;
    for n in 0..20 {
        world.publish(&n.to_string()).await?;
    }
    receiver.wait_for(20, Duration::from_secs(30)).await?;
    world.processed().await.with_context(|| format!("OUTBOX_HOSTILE_SEED={seed}: {}", relay.log()))?;
    ensure!(connections.load(SeqCst) > 5, "the relay did not connect again");
    ensure!(connections.load(SeqCst) < 60, "the relay connected {} times", connections.load(SeqCst));
    let attempts: i32 = world.session.one("SELECT max(retry_count) FROM outbox_events").await?;
    ensure!(attempts == 0, "OUTBOX_HOSTILE_SEED={seed}: an outage used {attempts} attempts");
    ensure!(!relay.log().contains("panic"), "{}", relay.log());
    Ok(())
}

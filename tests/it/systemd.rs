//! What systemd hears from the relay, over a socket like its own.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram as StdUnixDatagram};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use outbox_tests::cluster::{Cluster, Stop};
use outbox_tests::relay::Relay;
use outbox_tests::scratch;
use outbox_tests::wait::LONG;
use tokio::net::UnixDatagram;
use tokio::time::timeout;

/// Takes messages until one has this line, and returns that message.
async fn hear(socket: &UnixDatagram, line: &str) -> Result<String> {
    let mut buffer = vec![0; 4096];
    let heard = async {
        loop {
            let length = socket.recv(&mut buffer).await?;
            let message = String::from_utf8(buffer[..length].to_vec())?;
            if message.lines().any(|one| one.starts_with(line)) {
                return Ok::<_, anyhow::Error>(message);
            }
        }
    };
    timeout(LONG, heard).await.with_context(|| format!("{line} was not heard"))?
}

#[tokio::test]
async fn systemd_hears_of_attachment_life_loss_and_end() -> Result<()> {
    let cluster = Cluster::start().await?;
    let database = cluster.database().await?;
    let path = scratch::dir("notify")?.join("socket");
    let socket = UnixDatagram::bind(&path)?;
    let at = path.to_str().context("a path")?;
    let variables = [("NOTIFY_SOCKET", at), ("WATCHDOG_USEC", "400000")];
    let relay = Relay::spawn(&cluster.url(&database), None, &variables)?;
    hear(&socket, "READY=1").await?;
    hear(&socket, "WATCHDOG=1").await?;

    // Life is the loop's, not PostgreSQL's.
    cluster.stop(Stop::Fast).await?;
    let status = hear(&socket, "STATUS=no session with PostgreSQL").await?;
    ensure!(!status.contains(&cluster.login().1), "a password");
    for _ in 0..3 {
        hear(&socket, "WATCHDOG=1").await?;
    }
    cluster.resume().await?;
    hear(&socket, "READY=1").await?;

    relay.signal(Signal::SIGSTOP);
    let mut buffer = [0; 4096];
    while timeout(Duration::from_secs(2), socket.recv(&mut buffer)).await.is_ok() {}
    relay.signal(Signal::SIGCONT);
    hear(&socket, "WATCHDOG=1").await?;

    let (ended, heard) = tokio::join!(relay.terminate(LONG), hear(&socket, "STOPPING=1"));
    heard?;
    ensure!(ended?.success());
    Ok(())
}

#[tokio::test]
async fn an_abstract_socket_will_do_and_without_a_watchdog_there_is_no_sign_of_life() -> Result<()> {
    let cluster = Cluster::shared().await?;
    let database = cluster.database().await?;
    let name = format!("outbox-{}", scratch::random_hex(8)?);
    let socket = StdUnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name)?)?;
    socket.set_nonblocking(true)?;
    let socket = UnixDatagram::from_std(socket)?;
    let relay = Relay::spawn(&cluster.url(&database), None, &[("NOTIFY_SOCKET", &format!("@{name}"))])?;
    let mut buffer = [0; 4096];
    let length = timeout(LONG, socket.recv(&mut buffer)).await??;
    assert_eq!(std::str::from_utf8(&buffer[..length])?, "READY=1\nSTATUS=attached");
    relay.signal(Signal::SIGTERM);
    let length = timeout(LONG, socket.recv(&mut buffer)).await??;
    assert!(buffer[..length].starts_with(b"STOPPING=1\n"));
    Ok(())
}

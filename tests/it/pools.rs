//! The relay behind a connection pool, and where there is no room for two sessions.

use anyhow::{Result, ensure};
use outbox_tests::cluster::Cluster;
use outbox_tests::http;
use outbox_tests::pool::Pool;
use outbox_tests::receiver::Receiver;
use outbox_tests::relay::{self, Relay};
use outbox_tests::wait::{self, LONG};
use outbox_tests::world::World;

/// What `check` prints, and whether it found all well.
pub fn check(url: &str) -> Result<(bool, String)> {
    let output = relay::command(None)?.arg("check").env("DATABASE_URL", url).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    Ok((output.status.success(), text))
}

#[tokio::test]
async fn a_pool_in_session_mode_serves_a_relay() -> Result<()> {
    let cluster = Cluster::shared().await?;
    let database = cluster.database().await?;
    let pool = Pool::start(cluster, "session", 5).await?;
    let session = cluster.connect(&database).await?;
    let receiver = Receiver::start()?;
    session.execute("SELECT outbox.add_webhook('hook', $1)", &[&receiver.url("/")]).await?;
    let (well, text) = check(&pool.url(&database))?;
    // The receiver's address is not public; all else is well.
    ensure!(!text.lines().any(|line| line.starts_with("FAIL") && !line.contains("destination hook")), "{well}: {text}");
    let relay = Relay::with(&pool.url(&database), None, &[]).await?;
    for n in 1..=3 {
        session.batch_execute("SELECT outbox.publish('a', '{}')").await?;
        receiver.wait_for(n, LONG).await?;
    }
    ensure!(relay.metric("outbox_relay_reconnects_total").await? == 0.0, "{}", relay.log());
    Ok(())
}

#[tokio::test]
async fn a_pool_in_transaction_mode_is_named_and_no_relay_is_ready() -> Result<()> {
    let cluster = Cluster::shared().await?;
    let database = cluster.database().await?;
    for size in [1, 5] {
        let pool = Pool::start(cluster, "transaction", size).await?;
        let (well, text) = check(&pool.url(&database))?;
        ensure!(!well && text.contains("transaction mode"), "{size}: {text}");
        let relay = Relay::spawn(&pool.url(&database), None, &[])?;
        relay.logged("transaction mode", LONG).await?;
        let (status, page) = relay.get("/readyz").await?;
        ensure!(status == 503 && page.contains("transaction mode"), "{size}: {status} {page}");
    }
    Ok(())
}

/// The relay's sessions in the pool are not what another client is given with the relay's settings in it.
#[tokio::test]
async fn a_pool_in_transaction_mode_is_left_as_it_was() -> Result<()> {
    let cluster = Cluster::shared().await?;
    let database = cluster.database().await?;
    let pool = Pool::start(cluster, "transaction", 1).await?;
    let relay = Relay::spawn(&pool.url(&database), None, &[])?;
    relay.logged("transaction mode", LONG).await?;
    relay.kill().await?;
    let found = outbox_tests::session::Session::open(&pool.url(&database)).await?;
    let rows = found.simple_query("SHOW search_path").await?;
    let shown = rows.iter().find_map(|row| match row {
        tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0),
        _ => None,
    });
    assert_eq!(shown, Some("\"$user\", public"));
    Ok(())
}

#[tokio::test]
async fn check_is_red_where_only_one_session_has_room() -> Result<()> {
    let World { cluster, database, session } = World::new().await?;
    let role = format!("single_{database}");
    session
        .batch_execute(&format!(
            "CREATE ROLE {role} LOGIN PASSWORD 'word' CONNECTION LIMIT 1; SELECT outbox.grant_relay('{role}')"
        ))
        .await?;
    let (well, text) = check(&cluster.url_as(&role, "word", &database))?;
    ensure!(!well && text.contains("two at once"), "{text}");
    session.batch_execute(&format!("ALTER ROLE {role} CONNECTION LIMIT 2")).await?;
    let again = async || Ok(check(&cluster.url_as(&role, "word", &database))?.0.then_some(()));
    wait::until("check to be green with room for two", LONG, again).await
}

#[tokio::test]
async fn check_names_each_function_that_a_role_may_not_use() -> Result<()> {
    let World { cluster, database, session } = World::new().await?;
    let role = format!("partial_{database}");
    session
        .batch_execute(&format!(
            "CREATE ROLE {role} LOGIN PASSWORD 'word'; SELECT outbox.grant_relay('{role}');
             REVOKE EXECUTE ON FUNCTION outbox.renew, outbox.stats FROM {role}"
        ))
        .await?;
    let (well, text) = check(&cluster.url_as(&role, "word", &database))?;
    ensure!(!well && text.contains("renew(") && text.contains("stats("), "{text}");
    Ok(())
}

/// Its own pages are a listener that anybody may reach.
#[tokio::test]
async fn half_open_requests_leave_room_for_others_and_are_dropped() -> Result<()> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let cluster = Cluster::shared().await?;
    let database = cluster.database().await?;
    let port = outbox_tests::scratch::free_port()?;
    let listen = format!("127.0.0.1:{port}");
    let relay = Relay::spawn(&cluster.url(&database), None, &[("HTTP_LISTEN", &listen)])?;
    wait::until("the relay to be ready", LONG, async || Ok((http::get(port, "/readyz").await?.0 == 200).then_some(())))
        .await?;
    let mut held = Vec::new();
    for _ in 0..300 {
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await?;
        stream.write_all(b"GET /readyz HTTP/1.1\r\nHost:").await?;
        held.push(stream);
    }
    ensure!(http::get(port, "/readyz").await?.0 == 200);
    let open = std::fs::read_dir(format!("/proc/{}/fd", relay.pid()))?.count();
    ensure!(open < 150, "{open} descriptors");
    for mut stream in held {
        let mut rest = Vec::new();
        // A reset is an end too.
        let _ = tokio::time::timeout(LONG, stream.read_to_end(&mut rest)).await?;
    }
    Ok(())
}

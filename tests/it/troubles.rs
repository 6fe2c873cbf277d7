//! What docs/troubleshooting.md says that the page shows of each trouble, and that the remedy ends it.
//!
//! `OUTBOX_SCREENSHOTS` names the directory in which the pictures are kept, for the documentation.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use outbox_tests::broker::Broker;
use outbox_tests::browser::Browser;
use outbox_tests::cluster::Cluster;
use outbox_tests::receiver::{Receiver, Reply};
use outbox_tests::relay::Relay;
use outbox_tests::scratch;
use outbox_tests::wait::LONG;
use outbox_tests::world::World;

const PASSWORD: &str = "correct horse";

/// Shows a page, whose text then contains all of these.
async fn shows(browser: &Browser, relay: &Relay, page: &str, texts: &[&str]) -> Result<()> {
    browser.go(&format!("http://localhost:{}/ui/{page}", relay.port())).await?;
    for text in texts {
        let text = serde_json::to_string(text)?;
        browser.until(&format!("document.querySelector('main').textContent.includes({text})")).await?;
    }
    Ok(())
}

async fn log_in(relay: &Relay) -> Result<Browser> {
    let browser = Browser::start().await?;
    browser.looks(1600, 900, "light").await?;
    browser.go(&format!("http://localhost:{}/ui/", relay.port())).await?;
    browser.type_into("input[name=password]", PASSWORD).await?;
    browser.click("button[type=submit]").await?;
    browser.until_there("[data-test=pending]").await?;
    Ok(browser)
}

async fn troubles(world: &World<'_>, receiver: &Receiver) -> Result<()> {
    receiver.reply_with(|_, request| match request.path.as_str() {
        "/crm" => Reply::With(500, vec![], b"database is locked".to_vec()),
        "/billing" => Reply::With(422, vec![], br#"{"error": "no such customer"}"#.to_vec()),
        "/shop" => Reply::Status(503),
        _ => Reply::Accept,
    });
    world.add_webhook("crm", &receiver.url("/crm"), r#"{"base": "6 hours"}"#).await?;
    world.add_webhook("billing", &receiver.url("/billing"), r#"{"max_attempts": 1, "on_failure": "block"}"#).await?;
    world.add_webhook("warehouse", &receiver.url("/warehouse"), "{}").await?;
    world
        .execute(
            r#"SELECT outbox.add_rabbitmq('orders', settings => '{"base": "5 s", "cap": "5 s", "max_attempts": 1000}');
               SELECT outbox.add_rabbitmq('ledger', settings => '{"broker": "eu"}');
               SELECT outbox.pause('warehouse')"#,
        )
        .await
}

/// A receiver that answers 500, one that refuses an event that others wait behind, a broker that is down, a queue that is
/// missing, a destination that is paused; then a worker that is gone.
#[tokio::test]
async fn each_trouble_is_seen_and_the_remedy_ends_it() -> Result<()> {
    let kept = std::env::var_os("OUTBOX_SCREENSHOTS").map(PathBuf::from);
    let pictures = kept.map_or_else(|| scratch::dir("screenshots"), Ok)?;
    let cluster = Cluster::start().await?;
    let world = World::on(&cluster).await?;
    let (broker, receiver, away) = (Broker::shared().await?, Receiver::start()?, scratch::free_port()?);
    troubles(&world, &receiver).await?;
    let amqp = format!("default={} eu=amqp://guest:guest@127.0.0.1:{away}", broker.url());
    let relay = Relay::with(&cluster.url(&world.database), Some(&amqp), &[("OUTBOX_UI_PASSWORD", PASSWORD)]).await?;
    for number in 1..=3 {
        let publish =
            "SELECT outbox.publish('order.placed', jsonb_build_object('order_id', $1::int), 'order', '48213')";
        world.session.query_one(publish, &[&number]).await?;
    }
    world.until("SELECT count(*) = 1 FROM outbox.deliveries WHERE status = 'failed'").await?;
    world.until("SELECT bool_or(last_error LIKE 'unroutable%') FROM outbox.deliveries").await?;
    world.until("SELECT state = 'open' FROM outbox.destinations WHERE name = 'ledger'").await?;
    let browser = log_in(&relay).await?;

    shows(&browser, &relay, "destinations", &["can't connect to RabbitMQ"]).await?;
    for (name, state) in [("crm", "active"), ("orders", "active"), ("ledger", "open"), ("warehouse", "paused")] {
        browser.until_there(&format!("[data-test=destination-row][data-name={name}][data-state={state}]")).await?;
    }
    browser.screenshot(&pictures.join("troubles-destinations.png")).await?;
    let waits = ["order 48213", "unroutable", "database is locked", "no such customer"];
    shows(&browser, &relay, "waiting", &waits).await?;
    browser.screenshot(&pictures.join("troubles-waiting.png")).await?;
    shows(&browser, &relay, "dead", &["no such customer"]).await?;
    browser.screenshot(&pictures.join("troubles-dead.png")).await?;

    // What the operator presses.
    broker.channel().await?.bind("outbox_events", "order.*", "orders").await?;
    receiver.reply(Reply::Accept);
    world.execute("SELECT outbox.resume('warehouse'); SELECT outbox.replay_failed()").await?;
    world
        .until("SELECT count(*) = 0 FROM outbox.deliveries WHERE destination IN ('billing', 'warehouse', 'orders')")
        .await?;

    // A worker that can't come back, because its launcher stands still.
    let pid = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'pg_outbox launcher'";
    let launcher: i32 = world.session.one(pid).await?;
    cluster.signal(launcher, Signal::SIGSTOP)?;
    let ended = world.execute("SELECT pg_terminate_backend(worker_pid) FROM outbox.stats()").await;
    let gone = world.until("SELECT NOT ok FROM outbox.health() WHERE check_name = 'worker'").await;
    let seen = shows(&browser, &relay, "", &["max_worker_processes"]).await;
    browser.screenshot(&pictures.join("troubles-overview.png")).await?;
    cluster.signal(launcher, Signal::SIGCONT)?;
    ended.and(gone).and(seen)?;
    world.until("SELECT ok FROM outbox.health() WHERE check_name = 'worker'").await?;

    // No relay: the page is gone with it, and the health check says so.
    ensure!(relay.terminate(LONG).await?.success());
    let hint = "SELECT hint FROM outbox.health() WHERE check_name = 'consumers' AND NOT ok";
    world.session.one::<String>(hint).await.context("the check is well")?;
    Ok(())
}

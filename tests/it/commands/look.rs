//! `status`, `health`, `event`, `healthcheck`: what there is.

use anyhow::{Result, ensure};
use outbox_tests::receiver::Receiver;
use outbox_tests::relay::Relay;
use outbox_tests::scratch;
use outbox_tests::world::World;
use serde_json::json;

use super::{dead_letter, expect, file, run_with, url, webhook};

#[tokio::test]
async fn a_status_counts_and_shows_each_destination() -> Result<()> {
    let world = World::new().await?;
    let ran = expect(0, &url(&world), "status")?;
    ensure!(ran.out.contains("no destination yet") && ran.err.is_empty(), "{ran:?}");
    webhook(&world, "crm").await?;
    dead_letter(&world, "a.b", "crm", "HTTP 500").await?;
    world.execute("SELECT outbox.pause('crm')").await?;
    let status = expect(0, &url(&world), "status --json")?.json()?;
    assert_eq!(status["failed"], 1);
    assert_eq!(status["database"], world.database.as_str());
    assert_eq!(status["relays"], json!([]));
    assert_eq!(status["destinations"][0]["name"], "crm");
    assert_eq!(status["destinations"][0]["state"], "paused");
    assert_eq!(status["destinations"][0]["dead"], 1);
    let ran = expect(0, &url(&world), "status")?;
    let lines: Vec<&str> = ran.out.lines().collect();
    ensure!(lines[0].contains("dead 1") && lines[0].contains("relays 0"), "{ran:?}");
    ensure!(lines[1].starts_with("DESTINATION  KIND     STATE"), "{ran:?}");
    ensure!(lines[2].starts_with("crm          webhook  paused"), "{ran:?}");
    let relay = world.relay().await?;
    let status = expect(0, &url(&world), "status --json")?.json()?;
    let name = status["relays"][0]["name"].as_str().unwrap_or_default();
    ensure!(name.ends_with(&format!(":{}", relay.pid())), "{status}");
    let ran = expect(0, &url(&world), "status")?;
    ensure!(ran.out.contains("relays 1") && ran.out.contains(&format!("relay {name} (pid ")), "{ran:?}");
    Ok(())
}

#[tokio::test]
async fn health_is_an_exit_code_and_a_hint() -> Result<()> {
    let world = World::new().await?;
    let ran = expect(1, &url(&world), "health")?;
    let first = ran.out.lines().nth(1).unwrap_or_default();
    ensure!(first.starts_with("consumers") && first.contains("NO  none attached - Start outbox-relay"), "{ran:?}");
    let _relay = world.relay().await?;
    let ran = expect(0, &url(&world), "health --json")?;
    let checks = ran.json()?;
    let checks = checks.as_array().map(Vec::as_slice).unwrap_or_default();
    ensure!(
        checks.len() >= 11 && checks.iter().all(|check| check["ok"] == true && check["check"].is_string()),
        "{ran:?}"
    );
    Ok(())
}

#[tokio::test]
async fn an_event_is_shown_to_the_digit_with_its_fate() -> Result<()> {
    let world = World::new().await?;
    webhook(&world, "crm").await?;
    let event_id = dead_letter(&world, "a.b", "crm", "HTTP 500\u{1b}[2J").await?;
    let ran = expect(0, &url(&world), &format!("event {event_id}"))?;
    for part in ["12345678901234567890.10", "a.b v1", "crm          failed", "HTTP 500"] {
        ensure!(ran.out.contains(part), "{part}: {ran:?}");
    }
    ensure!(!ran.out.contains('\u{1b}'), "{ran:?}");
    let ran = expect(0, &url(&world), &format!("event {event_id} --json"))?;
    ensure!(ran.out.contains("12345678901234567890.10"), "{ran:?}");
    let event = ran.json()?;
    assert_eq!(event["event_id"], event_id.to_string());
    assert_eq!(event["destinations"]["crm"]["status"], "failed");
    let ran = expect(2, &url(&world), "event 00000000-0000-7000-8000-000000000000")?;
    ensure!(ran.out.is_empty() && ran.err.contains("there is no event"), "{ran:?}");
    Ok(())
}

#[tokio::test]
async fn an_event_is_replayed_to_all_or_to_one() -> Result<()> {
    let world = World::new().await?;
    for name in ["crm", "search"] {
        webhook(&world, name).await?;
    }
    let event_id = dead_letter(&world, "a.b", "crm", "HTTP 500").await?;
    expect(2, &url(&world), "replay 00000000-0000-7000-8000-000000000000")?;
    expect(2, &url(&world), &format!("replay {event_id} --to nowhere"))?;
    let ran = expect(0, &url(&world), &format!("replay {event_id} --to crm --json"))?;
    assert_eq!(ran.json()?, json!({"event_id": event_id, "destination": "crm", "replayed": true}));
    let ran = expect(2, &url(&world), &format!("replay {event_id}"))?;
    ensure!(ran.err.contains("is not owed again"), "{ran:?}");
    Ok(())
}

#[tokio::test]
async fn a_new_destination_is_owed_what_it_would_have_had() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    world.add_webhook("old", &receiver.url("/old"), "{}").await?;
    let _relay = world.relay().await?;
    for aggregate in ["1", "2", "3"] {
        world.publish(aggregate).await?;
    }
    world.processed().await?;
    world.add_webhook("new", &receiver.url("/new"), "{}").await?;
    let url = url(&world);
    let ran = expect(0, &url, "backfill new --type contact.* --since 1h --dry-run --json")?;
    assert_eq!(ran.json()?, json!({"events": 3, "dry_run": true}));
    assert_eq!(expect(0, &url, "backfill new --limit 2")?.out, "2 events owed to new\n");
    receiver.wait_for(5, outbox_tests::wait::LONG).await?;
    expect(2, &url, "backfill new --type nothing.*")?;
    expect(2, &url, "backfill new --until 1h")?;
    expect(2, &url, "backfill nowhere")?;
    Ok(())
}

#[tokio::test]
async fn a_health_check_asks_the_relay_on_this_machine() -> Result<()> {
    let world = World::new().await?;
    let relay = world.relay().await?;
    let at = format!("0.0.0.0:{}", relay.port());
    let ran = run_with(&["healthcheck"], &[("HTTP_LISTEN", &at)])?;
    assert_eq!((ran.code, ran.out.as_str()), (0, "ready\n"), "{ran:?}");
    let config = file(format!("http_listen = '127.0.0.1:{}'", relay.port()).as_bytes())?;
    let ran = run_with(&["healthcheck", "--json", "--config", &config], &[])?;
    assert_eq!(ran.json()?, json!({"ready": true, "detail": "ready"}));
    // Nobody is there.
    let port = scratch::free_port()?;
    let ran = run_with(&["healthcheck", "--http-listen", &format!("127.0.0.1:{port}")], &[])?;
    ensure!(ran.code == 1 && ran.out.contains("no answer"), "{ran:?}");
    // A relay that has no PostgreSQL.
    let waits = Relay::spawn(&format!("postgres://u@127.0.0.1:{port}/db"), None, &[])?;
    let at = format!("127.0.0.1:{}", waits.port());
    waits.logged("no session with PostgreSQL", outbox_tests::wait::LONG).await?;
    let ran = run_with(&["healthcheck", "--http-listen", &at], &[])?;
    ensure!(ran.code == 1 && ran.out.starts_with("503: "), "{ran:?}");
    Ok(())
}

/// The same configuration as that of `run`: a file, or libpq's environment alone.
#[tokio::test]
async fn the_configuration_is_that_of_run() -> Result<()> {
    let world = World::new().await?;
    let config = file(format!("database_url = '{}'\namqp_ca_cert = '/nowhere'\nlease = 30", url(&world)).as_bytes())?;
    let ran = run_with(&["--config", &config, "status", "--json"], &[])?;
    ensure!(ran.code == 0 && ran.json()?["database"] == world.database.as_str(), "{ran:?}");
    let (user, password) = world.cluster.login();
    let port = world.cluster.port().to_string();
    let variables = [
        ("PGHOST", "127.0.0.1"),
        ("PGPORT", &port),
        ("PGUSER", &user),
        ("PGPASSWORD", &password),
        ("PGDATABASE", &world.database),
    ];
    let ran = run_with(&["status", "--json"], &variables)?;
    ensure!(ran.code == 0 && ran.json()?["database"] == world.database.as_str(), "{ran:?}");
    let ran = run_with(&["status"], &[])?;
    assert_eq!((ran.code, ran.err.as_str()), (64, "outbox-relay: DATABASE_URL is not set\n"));
    let ran = run_with(&["status", "--database-url", &world.cluster.url("postgres")], &[])?;
    ensure!(ran.code == 1 && ran.err.contains("CREATE EXTENSION pg_outbox"), "{ran:?}");
    Ok(())
}

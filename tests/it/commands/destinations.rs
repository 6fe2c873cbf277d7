//! `destinations`: looked at and changed one by one.

use anyhow::{Context, Result, ensure};
use outbox_tests::receiver::Receiver;
use outbox_tests::wait::LONG;
use outbox_tests::world::World;
use serde_json::json;

use super::{expect, url, webhook};

#[tokio::test]
async fn destinations_are_listed_shown_paused_resumed_and_removed() -> Result<()> {
    let world = World::new().await?;
    let url = url(&world);
    let ran = expect(2, &url, "destinations list")?;
    ensure!(ran.out.is_empty() && ran.err.contains("there is no destination"), "{ran:?}");
    assert_eq!(expect(2, &url, "destinations list --json")?.json()?, json!([]));
    let secret = webhook(&world, "crm").await?;
    world.execute("SELECT outbox.add_rabbitmq('orders', event_types => '{order.*,invoice.*}')").await?;
    let mut printed = Vec::new();
    let mut run = |code: i32, arguments: &str| -> Result<super::Ran> {
        let ran = expect(code, &url, arguments)?;
        printed.push(ran.text());
        Ok(ran)
    };
    let ran = run(0, "destinations list")?;
    let lines: Vec<&str> = ran.out.lines().collect();
    ensure!(lines[1].starts_with("crm     webhook   active"), "{ran:?}");
    ensure!(lines[2].contains("order.*,invoice.*") && lines[2].contains("outbox_events"), "{ran:?}");
    let listed = run(0, "destinations list --json")?.json()?;
    assert_eq!(listed[1]["event_types"], json!(["order.*", "invoice.*"]));
    let shown = run(0, "destinations show crm --json")?.json()?;
    assert_eq!(shown["settings"], json!({"headers": {"X-Key": "…"}}));
    ensure!(run(0, "destinations show crm")?.out.contains("https://example.com/hook?…"));
    assert_eq!(run(0, "destinations pause crm")?.out, "crm paused\n");
    assert_eq!(run(0, "destinations show crm --json")?.json()?["state"], "paused");
    assert_eq!(run(0, "destinations resume crm --json")?.json()?, json!({"name": "crm", "done": "resumed"}));
    assert_eq!(run(0, "destinations show crm --json")?.json()?["state"], "active");
    assert_eq!(run(0, "destinations remove crm")?.out, "crm removed\n");
    for command in ["show", "pause", "resume", "test", "rotate", "remove"] {
        let ran = run(2, &format!("destinations {command} crm"))?;
        ensure!(ran.out.is_empty() && ran.err.contains("crm"), "{command}: {ran:?}");
    }
    let ran = run(1, "destinations rotate orders")?;
    ensure!(ran.err.contains("has no signing secret"), "{ran:?}");
    let printed = printed.concat();
    ensure!(!printed.contains(&secret) && !printed.contains("hidden-word"), "{printed}");
    Ok(())
}

#[tokio::test]
async fn a_test_event_goes_to_one_destination() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    world.session.execute("SELECT outbox.add_webhook('crm', $1, '{nothing.at.all}')", &[&receiver.url("/crm")]).await?;
    world.add_webhook("other", &receiver.url("/other"), "{}").await?;
    let _relay = world.relay().await?;
    let ran = expect(0, &url(&world), "destinations test crm --json")?.json()?;
    let received = receiver.wait_for(1, LONG).await?;
    assert_eq!(received[0].path, "/crm");
    assert_eq!(json!(received[0].event_id()?.to_string()), ran["event_id"]);
    world.processed().await?;
    assert_eq!(receiver.count(), 1);
    Ok(())
}

#[tokio::test]
async fn a_rotated_secret_is_shown_once_and_signs() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    let before = world.add_webhook("crm", &receiver.url("/"), "{}").await?;
    let ran = expect(0, &url(&world), "destinations rotate crm --grace 1h")?;
    let secret = ran.out.trim().to_owned();
    ensure!(secret.starts_with("whsec_") && secret != before && ran.err.is_empty(), "{ran:?}");
    let again = expect(0, &url(&world), "destinations rotate crm --grace 0 --json")?.json()?;
    let newest = again["secret"].as_str().context("no secret")?;
    let _relay = world.relay().await?;
    world.publish("1").await?;
    let received = receiver.wait_for(1, LONG).await?;
    ensure!(outbox_tests::reference::verifies(newest, &received[0])?, "the new secret signs");
    ensure!(!outbox_tests::reference::verifies(&secret, &received[0])?, "the one before has no grace");
    Ok(())
}

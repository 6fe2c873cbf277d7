//! `destinations apply` and `export`: a file says what there is to be.

use anyhow::{Result, ensure};
use outbox_tests::receiver::Receiver;
use outbox_tests::reference::verifies;
use outbox_tests::wait::LONG;
use outbox_tests::world::World;
use serde_json::{Value, json};

use super::{expect, file, login, url, webhook};

/// All that is stored of destinations, but for their state.
async fn stored(world: &World<'_>) -> Result<String> {
    let all = "SELECT coalesce(string_agg(concat_ws(' ', d.name, d.kind, d.event_types, d.tenant_id, d.filter, d.exchange,
                   d.routing_key, d.settings, d.paused, d.since_token, h.url, h.settings, s.secret), '; ' ORDER BY d.name), '')
                 FROM outbox.destination d LEFT JOIN outbox.hidden h ON h.destination = d.name
                 LEFT JOIN outbox.secret s ON s.destination = d.name";
    world.session.one(all).await
}

async fn full_world() -> Result<World<'static>> {
    let world = World::new().await?;
    webhook(&world, "crm").await?;
    world
        .execute(
            r#"SELECT outbox.add_rabbitmq('orders', 'shop', 'x.{event_type}', '{order.*}',
                      '{"max_attempts": 5, "timeout": 2.5, "cap": "5 minutes"}', 'acme', '$.amount > 100 && $event_type != "a"');
               SELECT outbox.add_webhook('paused', 'https://example.com/'), outbox.pause('paused')"#,
        )
        .await?;
    Ok(world)
}

#[tokio::test]
async fn an_export_that_is_applied_changes_nothing() -> Result<()> {
    let world = full_world().await?;
    let url = url(&world);
    let before = stored(&world).await?;
    for flags in ["", " --json"] {
        let export = expect(0, &url, &format!("destinations export{flags}"))?;
        for hidden in ["hidden-word", "whsec_"] {
            ensure!(!export.text().contains(hidden), "{export:?}");
        }
        let path = file(export.out.as_bytes())?;
        let ran = expect(0, &url, &format!("destinations apply -f {path} --prune"))?;
        assert_eq!(ran.text(), "nothing to change\n");
        let ran = expect(0, &url, &format!("destinations apply -f {path} --json"))?;
        assert_eq!(ran.json()?, json!({"dry_run": false, "changes": []}));
        assert_eq!(stored(&world).await?, before);
        // Elsewhere, what is hidden is missing, and the rest is as it was.
        let other = World::new().await?;
        let ran = expect(1, &super::url(&other), &format!("destinations apply -f {path}"))?;
        ensure!(ran.err.contains("stands for a hidden value"), "{ran:?}");
        let whole = export.out.replace("?…", "?a=b").replace('…', "filled-in");
        let path = file(whole.as_bytes())?;
        let ran = expect(0, &super::url(&other), &format!("destinations apply -f {path}"))?;
        ensure!(ran.out.ends_with("3 added, 0 changed, 0 removed\n"), "{ran:?}");
        ensure!(!ran.text().contains("filled-in") && !ran.text().contains("whsec_"), "{ran:?}");
        let again = expect(0, &super::url(&other), &format!("destinations export{flags}"))?;
        assert_eq!(again.out, export.out);
    }
    Ok(())
}

#[tokio::test]
async fn a_change_is_shown_first_and_leaves_what_is_hidden() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    let at = receiver.url("/hook?token=hidden-word");
    let secret =
        world.add_webhook("crm", &at, r#"{"headers": {"X-Key": "hidden-word", "X-Old": "hidden-word"}}"#).await?;
    world.execute("SELECT outbox.add_rabbitmq('old'), outbox.add_rabbitmq('orders')").await?;
    let url = url(&world);
    let shown = receiver.url("/hook?…");
    let path = file(
        format!(
            r#"
            [[destination]]
            name = "crm"
            kind = "webhook"
            url = "{shown}"
            event_types = ["contact.*"]
            [destination.settings]
            max_attempts = 3
            [destination.settings.headers]
            X-Key = "…"
            X-New = "other-word"

            [[destination]]
            name = "audit"
            kind = "rabbitmq"
            exchange = "audit"
            paused = true

            [[destination]]
            name = "orders"
            kind = "rabbitmq"
            "#
        )
        .as_bytes(),
    )?;
    let before = stored(&world).await?;
    let lines = "~ crm: event_types [\"*\"] -> [\"contact.*\"]\n\
                 ~ crm: settings.headers.X-New null -> \"…\"\n\
                 ~ crm: settings.headers.X-Old \"…\" -> null\n\
                 ~ crm: settings.max_attempts null -> 3\n\
                 + audit: rabbitmq audit, types *\n";
    let ran = expect(0, &url, &format!("destinations apply -f {path} --dry-run"))?;
    assert_eq!(ran.out, format!("{lines}1 to add, 1 to change, 0 to remove\n"));
    ensure!(ran.err.contains("kept without --prune: old"), "{ran:?}");
    assert_eq!(stored(&world).await?, before, "a dry run changes nothing");
    let ran = expect(0, &url, &format!("destinations apply -f {path}"))?;
    assert_eq!(ran.out, format!("{lines}1 added, 1 changed, 0 removed\n"));
    ensure!(!ran.text().contains("hidden-word") && !ran.text().contains("other-word"), "{ran:?}");
    // From now on the file can leave the new value to the database.
    let kept = file(std::fs::read_to_string(&path)?.replace("other-word", "…").as_bytes())?;
    let ran = expect(0, &url, &format!("destinations apply -f {kept} --prune --json"))?;
    assert_eq!(ran.json()?, json!({"dry_run": false, "changes": [{"action": "remove", "name": "old"}]}));
    assert_eq!(expect(0, &url, &format!("destinations apply -f {kept} --prune"))?.out, "nothing to change\n");
    assert_eq!(expect(0, &url, "destinations show audit --json")?.json()?["state"], "paused");
    // What was hidden is still sent, and signed as before.
    let _relay = world.relay().await?;
    world.publish("1").await?;
    let received = receiver.wait_for(1, LONG).await?;
    assert_eq!(received[0].path, "/hook?token=hidden-word");
    assert_eq!(received[0].header("X-Key"), Some("hidden-word"));
    assert_eq!(received[0].header("X-New"), Some("other-word"));
    assert_eq!(received[0].header("X-Old"), None);
    ensure!(verifies(&secret, &received[0])?);
    Ok(())
}

/// The second of two changes fails: the first is not made either.
#[tokio::test]
async fn what_fails_changes_nothing() -> Result<()> {
    let world = full_world().await?;
    let before = stored(&world).await?;
    for (content, code, text) in [
        (
            r#"{"destination": [{"name": "a", "kind": "rabbitmq"}, {"name": "b", "kind": "webhook", "url": "https://u:hidden-word@h"}]}"#,
            1,
            "malformed webhook URL",
        ),
        (
            r#"{"destination": [{"name": "a", "kind": "rabbitmq"}, {"name": "b", "kind": "rabbitmq", "filter": "$$"}]}"#,
            1,
            "destination b: filter",
        ),
        (
            r#"{"destination": [{"name": "a", "kind": "rabbitmq"}, {"name": "crm", "kind": "rabbitmq"}]}"#,
            1,
            "crm is a webhook",
        ),
        (r#"{"destination": [{"name": "a", "kind": "rabbitmq", "hidden-word": 1}]}"#, 64, "line 1"),
        ("[[destination]]\nname = 'a'\nkind = 'hidden-word'", 64, "line 3"),
        (
            "[[destination]]\nname = 'a'\nkind = 'webhook'\nurl = 'https://example.com'\nsecret_file = '/nowhere'",
            64,
            "secret",
        ),
    ] {
        let ran = expect(code, &url(&world), &format!("destinations apply -f {}", file(content.as_bytes())?))?;
        ensure!(ran.err.contains(text) && !ran.text().contains("hidden-word"), "{content}: {ran:?}");
        assert_eq!(stored(&world).await?, before);
    }
    let ran = expect(64, &url(&world), &format!("destinations apply --prune -f {}", file(b"")?))?;
    ensure!(ran.err.contains("--prune would remove all"), "{ran:?}");
    assert_eq!(stored(&world).await?, before);
    Ok(())
}

#[tokio::test]
async fn a_secret_of_its_own_comes_from_a_file() -> Result<()> {
    let world = World::new().await?;
    let secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    let secret_file = file(format!("{secret}\n").as_bytes())?;
    let wanted = json!({"destination": [{"name": "crm", "kind": "webhook", "url": "https://example.com/",
                                          "secret_file": secret_file}]});
    let path = file(wanted.to_string().as_bytes())?;
    let ran = expect(0, &url(&world), &format!("destinations apply -f {path}"))?;
    ensure!(!ran.text().contains("whsec_"), "{ran:?}");
    let stored: String = world.session.one("SELECT secret FROM outbox.secret").await?;
    assert_eq!(stored, secret);
    Ok(())
}

/// Who may look may see what would change, and not change it.
#[tokio::test]
async fn a_monitor_may_see_the_difference() -> Result<()> {
    let world = full_world().await?;
    let (role, url) = login(&world).await?;
    world.execute(&format!("SELECT outbox.grant_monitor('{role}')")).await?;
    let export = expect(0, &url, "destinations export --json")?.json()?;
    let all = export["destination"].as_array().map(Vec::as_slice).unwrap_or_default();
    let fewer: Vec<&Value> = all.iter().filter(|one| one["name"] != "orders").collect();
    let path = file(json!({"destination": fewer}).to_string().as_bytes())?;
    let ran = expect(0, &url, &format!("destinations apply --prune --dry-run -f {path}"))?;
    assert_eq!(ran.out, "- orders: removed with all that it is owed\n0 to add, 0 to change, 1 to remove\n");
    let ran = expect(1, &url, &format!("destinations apply --prune -f {path}"))?;
    ensure!(ran.err.contains("lacks grant_operator"), "{ran:?}");
    Ok(())
}

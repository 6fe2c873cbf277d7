//! The page for operators in a real browser: what one sees and clicks, in both themes, on narrow and wide screens.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use outbox_tests::browser::Browser;
use outbox_tests::process::run;
use outbox_tests::receiver::{Receiver, Reply};
use outbox_tests::wait::LONG;
use outbox_tests::{http, scratch};
use serde_json::Value;

use crate::page::{PASSWORD, Scene};

const PAGES: [&str; 5] = ["/ui/", "/ui/destinations", "/ui/dead", "/ui/waiting", "/ui/tail"];

/// A logged-in browser on the page.
async fn browse(scene: &Scene) -> Result<Browser> {
    let browser = Browser::start().await?;
    browser.looks(1600, 1000, "light").await?;
    browser.go(&format!("http://localhost:{}/ui/", scene.relay.port())).await?;
    browser.type_into("input[name=password]", PASSWORD).await?;
    browser.click("button[type=submit]").await?;
    browser.until_there("[data-test=pending]").await?;
    browser.until("document.querySelector('[data-test=pending]').textContent !== '–'").await?;
    Ok(browser)
}

async fn show(browser: &Browser, path: &str) -> Result<()> {
    // As its links do: without loading anything anew.
    browser.run(&format!("document.querySelector('a[href=\"{path}\"]').click()")).await?;
    browser.until(&format!("location.pathname === '{path}'")).await
}

#[tokio::test]
async fn a_dead_letter_is_replayed_and_its_row_is_gone() -> Result<()> {
    let scene = Scene::start(true).await?;
    let receiver = Receiver::start()?;
    scene.dead_letters(&receiver, "crm", &["order.made", "order.paid", "user.gone"]).await?;
    let browser = Browser::start().await?;
    browser.go(&format!("http://localhost:{}/ui/dead", scene.relay.port())).await?;
    browser.type_into("input[name=password]", "wrong").await?;
    browser.click("button[type=submit]").await?;
    browser.until("document.querySelector('[role=alert]').textContent.includes('Wrong')").await?;
    browser.type_into("input[name=password]", PASSWORD).await?;
    browser.click("button[type=submit]").await?;

    browser.until("document.querySelectorAll('[data-test=dead-row]').length === 3").await?;
    browser.until("document.querySelector('[data-test=dead]').textContent === '3'").await?;
    receiver.reply(Reply::Accept);
    let event_id = browser.run("return document.querySelector('[data-test=dead-row]').dataset.eventId").await?;
    let event_id = event_id.as_str().context("no event")?;
    let row = format!("[data-test=dead-row][data-event-id='{event_id}']");
    browser.click(&format!("{row} [data-test=replay]")).await?;
    browser.click("[data-test=confirm]").await?;
    browser.until(&format!("!document.querySelector(\"{row}\")")).await?;
    scene.world.until(&format!("SELECT status = 'processed' FROM outbox_events WHERE event_id = '{event_id}'")).await?;
    browser.until("document.querySelector('[data-test=dead]').textContent === '2'").await?;

    // All that match a filter, after their count.
    browser.run("document.querySelector('main input[placeholder=\"order.*\"]').focus()").await?;
    browser.type_into("main input[placeholder='order.*']", "order.m*").await?;
    browser.click("main form button[type=submit]").await?;
    browser
        .until("location.search === '?type=order.m*' && document.querySelectorAll('[data-test=dead-row]').length === 1")
        .await?;
    browser.click(".bulk [data-test=purge]").await?;
    browser.until("document.querySelector('dialog').textContent.includes('1 event ')").await?;
    browser.click("[data-test=confirm]").await?;
    browser.until("document.querySelectorAll('[data-test=dead-row]').length === 0").await?;
    scene.world.until("SELECT count(*) = 1 FROM outbox.deliveries WHERE status = 'failed'").await?;
    Ok(())
}

/// While rows are selected the list stands still, and what happened meanwhile shows afterwards.
#[tokio::test]
async fn those_that_are_selected_are_replayed_or_purged_and_no_others() -> Result<()> {
    let scene = Scene::start(true).await?;
    let receiver = Receiver::start()?;
    scene.dead_letters(&receiver, "crm", &["a", "b", "c", "d", "e"]).await?;
    let browser = browse(&scene).await?;
    show(&browser, "/ui/dead").await?;
    let rows = async |count: usize| {
        browser.until(&format!("document.querySelectorAll('[data-test=dead-row]').length === {count}")).await
    };
    let select = async |row: usize| {
        let checkbox =
            format!("document.querySelectorAll('[data-test=dead-row]')[{row}].querySelector('[data-test=select]')");
        browser.run(&format!("{checkbox}.click()")).await
    };
    rows(5).await?;
    browser.until("document.querySelector('[data-test=replay-selected]').disabled").await?;
    // The newest come first.
    select(0).await?;
    select(1).await?;
    select(3).await?;
    select(1).await?;
    browser.until("document.body.textContent.includes('2 selected')").await?;
    scene.more_dead_letters("crm", &["f"], 6).await?;
    browser.until("document.querySelector('[data-test=dead]').textContent === '6'").await?;
    rows(5).await?;
    browser.click("[data-test=purge-selected]").await?;
    browser.until("document.querySelector('dialog').textContent.includes('2 dead letters')").await?;
    browser.click("[data-test=confirm]").await?;
    rows(4).await?;
    browser.until("document.querySelector('.notice').textContent.includes('2 dead letters of 2')").await?;
    let left = "SELECT string_agg(event_type, '' ORDER BY event) FROM outbox.deliveries WHERE status = 'failed'";
    assert_eq!(scene.world.session.one::<String>(left).await?, "acdf");

    // All that are listed; one is gone before it is done.
    receiver.reply(Reply::Accept);
    browser.click("[data-test=select-listed]").await?;
    browser.until("document.body.textContent.includes('4 selected')").await?;
    scene.world.execute("SELECT outbox.purge_failed(event_types => 'c')").await?;
    browser.click("[data-test=replay-selected]").await?;
    browser.until("document.querySelector('dialog').textContent.includes('4 dead letters')").await?;
    browser.click("[data-test=confirm]").await?;
    rows(0).await?;
    browser.until("document.querySelector('.notice').textContent.includes('3 dead letters of 4')").await?;
    let sent = "SELECT string_agg(event_type, '' ORDER BY id) FROM outbox_events WHERE status = 'processed'";
    scene.world.until(&format!("SELECT ({sent}) = 'adf'")).await
}

#[tokio::test]
async fn what_happens_is_seen_without_a_reload() -> Result<()> {
    let scene = Scene::start(true).await?;
    let receiver = Receiver::start()?;
    scene.world.add_webhook("crm", &receiver.url("/"), "{}").await?;
    let browser = browse(&scene).await?;
    browser.run("window.same = true").await?;
    show(&browser, "/ui/destinations").await?;
    let row = "[data-test=destination-row][data-name=crm]";
    browser.until_there(&format!("{row}[data-state=active]")).await?;
    browser.click(&format!("{row} [data-test=pause]")).await?;
    browser.until_there(&format!("{row}[data-state=paused]")).await?;
    scene.world.publish("1").await?;
    browser.until("document.querySelector('[data-test=pending]').textContent === '1'").await?;
    // By somebody else.
    scene.world.execute("SELECT outbox.resume('crm')").await?;
    browser.until_there(&format!("{row}[data-state=active]")).await?;
    browser.until("document.querySelector('[data-test=pending]').textContent === '0'").await?;
    browser.click(&format!("{row} [data-test=send-test]")).await?;
    browser.until_there(".notice a").await?;
    browser.click(".notice a").await?;
    browser.until("document.querySelector('[data-test=event-status]')?.textContent === 'processed'").await?;
    show(&browser, "/ui/tail").await?;
    browser.until("document.querySelectorAll('[data-test=tail-row]').length === 2").await?;
    scene.world.publish("2").await?;
    browser.until("document.querySelectorAll('[data-test=tail-row]').length === 3").await?;
    assert_eq!(browser.run("return window.same").await?, true, "the page was loaded again");
    Ok(())
}

/// Whatever the destinations are called.
#[tokio::test]
async fn attempts_under_way_and_their_outcomes_are_seen() -> Result<()> {
    let scene = Scene::start(true).await?;
    let receiver = Receiver::start()?;
    receiver.reply(Reply::After(Duration::from_secs(6), Box::new(Reply::Accept)));
    scene.world.add_webhook("constructor", &receiver.url("/"), r#"{"concurrency": 4}"#).await?;
    let browser = browse(&scene).await?;
    show(&browser, "/ui/destinations").await?;
    let row = "[data-test=destination-row][data-name=constructor]";
    let in_flight = format!("document.querySelector('{row} [data-test=in-flight]')?.textContent");
    browser.until(&format!("{in_flight} === '0'")).await?;
    scene.world.publish("1").await?;
    scene.world.publish("2").await?;
    browser.until(&format!("{in_flight} === '2'")).await?;
    browser.until(&format!("{in_flight} === '0'")).await?;
    browser
        .until(&format!("document.querySelector('{row} .outcomes title').textContent.startsWith('2 of the last 2')"))
        .await
}

#[tokio::test]
async fn a_role_that_may_only_read_sees_no_actions() -> Result<()> {
    let scene = Scene::start(false).await?;
    let receiver = Receiver::start()?;
    scene.dead_letters(&receiver, "crm", &["order.made"]).await?;
    let browser = browse(&scene).await?;
    for (path, row) in [("/ui/destinations", "destination-row"), ("/ui/dead", "dead-row")] {
        show(&browser, path).await?;
        browser.until_there(&format!("[data-test={row}]")).await?;
        browser.until_there("[data-test=read-only]").await?;
        let actions = "return document.querySelectorAll('main [data-test=replay], main [data-test=purge], \
                       main [data-test=pause], main [data-test=send-test], main [data-test=rotate]').length";
        assert_eq!(browser.run(actions).await?, 0, "{path}");
    }
    Ok(())
}

#[tokio::test]
async fn what_an_event_holds_is_never_run() -> Result<()> {
    let scene = Scene::start(true).await?;
    let receiver = Receiver::start()?;
    let hostile = "<img src=x onerror=window.hit=1><script>window.hit=1</script>";
    receiver.reply(Reply::With(500, vec![], hostile.as_bytes().to_vec()));
    scene.world.add_webhook("crm", &receiver.url("/"), r#"{"max_attempts": 1}"#).await?;
    let sql = "SELECT outbox.publish($1::text, jsonb_build_object('text', $1::text, 'n', 12345678901234567890.5), $1::text, $1::text, jsonb_build_object('m', $1::text))::text";
    let event_id: String = scene.world.session.query_one(sql, &[&hostile]).await?.get(0);
    scene.world.until("SELECT count(*) = 1 FROM outbox.deliveries WHERE status = 'failed'").await?;
    let browser = browse(&scene).await?;
    for path in PAGES {
        show(&browser, path).await?;
        browser.until("!document.querySelector('main').textContent.includes('Loading')").await?;
    }
    show(&browser, "/ui/dead").await?;
    browser.until_there("[data-test=dead-row]").await?;
    browser.click("[data-test=dead-row] a.id").await?;
    browser.until("document.querySelector('[data-test=event-status]')?.textContent === 'failed'").await?;
    browser.click("details summary").await?;
    browser
        .until("document.querySelector('[data-test=event-data]').textContent.includes('12345678901234567890.5')")
        .await?;
    let shown = browser.run("return document.querySelector('[data-test=event-data]').textContent").await?;
    ensure!(shown.as_str().is_some_and(|shown| shown.contains("<script>")), "{shown}");
    assert_eq!(
        browser.run("return [window.hit ?? null, document.images.length, location.pathname.split('/').at(-1)]").await?,
        serde_json::json!([null, 1, event_id])
    );
    let complaints: Vec<String> = browser.console().await?.into_iter().filter(|line| !line.contains("401")).collect();
    ensure!(complaints.is_empty(), "{complaints:?}");
    Ok(())
}

/// Too many pages are open, and then the relay can't be reached for a while: the page goes on trying, asks PostgreSQL nothing
/// meanwhile, and shows what it missed.
#[tokio::test]
async fn a_stream_that_is_refused_is_tried_again_and_nothing_is_missed() -> Result<()> {
    let scene = Scene::start(true).await?;
    let receiver = Receiver::start()?;
    let mut others = Vec::new();
    for _ in 0..32 {
        let mut stream = http::open(scene.relay.port(), "GET", "/ui/stream", &[("Cookie", scene.cookie())], "").await?;
        http::event_with(&mut stream, &mut String::new(), "event: hello", LONG).await?;
        others.push(stream);
    }
    let browser = browse(&scene).await?;
    show(&browser, "/ui/dead").await?;
    browser.until("document.querySelector('.empty')?.textContent.includes('no dead letters')").await?;
    browser.until_there(".lost").await?;
    let away = "const reach = window.fetch; window.tries = 0; \
                window.fetch = (...what) => (window.tries++ < 2 ? Promise.reject(new TypeError('away')) : reach(...what))";
    browser.run(away).await?;
    browser.until("window.tries > 2").await?;
    scene.dead_letters(&receiver, "crm", &["order.made"]).await?;
    browser.until_there(".lost").await?;
    drop(others);
    browser.until_there(".live").await?;
    browser.until("document.querySelectorAll('[data-test=dead-row]').length === 1").await?;
    let asked =
        "return performance.getEntriesByType('resource').filter((one) => one.name.endsWith('/ui/api/me')).length";
    assert_eq!(browser.run(asked).await?, 1);
    Ok(())
}

#[tokio::test]
async fn moments_that_no_browser_knows_break_no_page() -> Result<()> {
    let scene = Scene::start(true).await?;
    let receiver = Receiver::start()?;
    scene.dead_letters(&receiver, "crm", &["a"]).await?;
    for moment in ["infinity", "294276-12-31"] {
        scene.world.execute(&format!("SELECT outbox.publish('b', '{{}}', available_at => '{moment}')")).await?;
    }
    let of_caesar =
        "INSERT INTO outbox_events (event_type, event_data, created_at) VALUES ('c', '{}', '0044-03-15 BC')";
    scene.world.execute(of_caesar).await?;
    scene.world.until("SELECT count(*) = 2 FROM outbox.deliveries WHERE status = 'failed'").await?;
    let browser = browse(&scene).await?;
    show(&browser, "/ui/waiting").await?;
    browser.until("document.querySelector('main').textContent.includes('infinity')").await?;
    show(&browser, "/ui/dead").await?;
    browser.until("document.querySelectorAll('[data-test=dead-row]').length === 2").await?;
    ensure!(browser.run("return document.querySelector('main').textContent").await?.to_string().contains("BC"));
    browser.go(&format!("http://localhost:{}/ui/dead?since=yesterday", scene.relay.port())).await?;
    browser.until("document.querySelectorAll('[data-test=dead-row]').length === 1").await
}

/// With a bit of everything, as for the pictures of the documentation.
async fn furnish(scene: &Scene, receiver: &Receiver) -> Result<()> {
    scene
        .world
        .add_webhook(
            "billing",
            &receiver.url("/billing"),
            r#"{"max_attempts": 3, "base": "2 hours", "cap": "2 hours"}"#,
        )
        .await?;
    scene.world.add_webhook("crm", &receiver.url("/crm"), r#"{"max_attempts": 1}"#).await?;
    scene.world.add_webhook("search-index", &receiver.url("/search"), "{}").await?;
    let warehouse = "SELECT outbox.add_webhook('warehouse', $1, '{invoice.sent}'), outbox.pause('warehouse')";
    scene.world.session.query_one(warehouse, &[&receiver.url("/warehouse")]).await?;
    receiver.reply_with(|number, request| match request.path.as_str() {
        "/crm" if number % 3 == 0 => Reply::With(422, vec![], br#"{"error": "customer 4711 is locked"}"#.to_vec()),
        "/crm" if number % 11 == 0 => Reply::With(500, vec![], b"upstream timed out".to_vec()),
        "/billing" if number % 5 == 0 => Reply::With(500, vec![], b"deadlock detected, try again".to_vec()),
        _ => Reply::Accept,
    });
    for n in 0..24 {
        let event_type = ["order.created", "order.paid", "customer.updated", "invoice.sent"][n % 4];
        let sql = "SELECT outbox.publish($1, jsonb_build_object('order_id', 48213 + $2::int, 'total', 149.90), 'order', $2::int::text, \
                   jsonb_build_object('correlation_id', 'c-' || $2::int))";
        scene.world.session.query_one(sql, &[&event_type, &i32::try_from(n % 7)?]).await?;
    }
    scene
        .world
        .execute("SELECT outbox.publish('report.due', '{}', available_at => now() + interval '2 hours')")
        .await?;
    scene.world.until("SELECT count(*) > 2 FROM outbox.deliveries WHERE status = 'failed'").await?;
    scene.world.until("SELECT count(*) = 0 FROM outbox_events WHERE status = 'processing'").await
}

/// `OUTBOX_SCREENSHOTS` names the directory in which they are kept, for the documentation.
#[tokio::test]
async fn it_is_legible_in_both_themes_and_at_every_width() -> Result<()> {
    let axe = run(Command::new("../scripts/axe.sh"))?;
    let axe = std::fs::read_to_string(String::from_utf8(axe.stdout)?.trim())?;
    let kept = std::env::var_os("OUTBOX_SCREENSHOTS").map(PathBuf::from);
    let pictures = kept.map_or_else(|| scratch::dir("screenshots"), Ok)?;
    let scene = Scene::start(true).await?;
    let receiver = Receiver::start()?;
    furnish(&scene, &receiver).await?;
    let browser = browse(&scene).await?;
    let event = "/ui/events/".to_owned()
        + &scene
            .world
            .session
            .one::<String>(
                "SELECT event_id::text FROM outbox.deliveries WHERE status = 'failed' ORDER BY event LIMIT 1",
            )
            .await?;
    let mut all: Vec<&str> = PAGES.to_vec();
    all.push(&event);
    for path in all {
        let name = path.split('/').nth(2).filter(|name| !name.is_empty()).unwrap_or("overview");
        browser.go(&format!("http://localhost:{}{path}", scene.relay.port())).await?;
        browser
            .until("document.querySelector('main') && !document.querySelector('main').textContent.includes('Loading')")
            .await?;
        browser.run(&axe).await?;
        for (width, height) in [(400, 860), (1600, 1000)] {
            for theme in ["light", "dark"] {
                browser.looks(width, height, theme).await?;
                let wide = browser.run("return document.documentElement.scrollWidth").await?;
                ensure!(wide.as_u64().is_some_and(|wide| wide <= u64::from(width)), "{name} is {wide} wide at {width}");
                browser.screenshot(&pictures.join(format!("{name}-{width}-{theme}.png"))).await?;
                let found = browser.run_async("axe.run(document)").await?;
                let broken: Vec<String> =
                    found["violations"].as_array().context("no result of axe")?.iter().map(describe).collect();
                ensure!(broken.is_empty(), "{name} at {width}, {theme}: {broken:#?}");
            }
        }
    }
    Ok(())
}

fn describe(violation: &Value) -> String {
    let nodes = violation["nodes"].as_array().into_iter().flatten().take(3);
    let where_: Vec<String> = nodes.map(|node| format!("{} {}", node["html"], node["any"][0]["message"])).collect();
    format!("{}: {}: {}", violation["id"], violation["help"], where_.join("; "))
}

/// By keyboard alone: the dialog takes the focus, Escape leaves it, and it goes back to where it was.
#[tokio::test]
async fn a_dialog_can_be_left_by_the_keyboard() -> Result<()> {
    let scene = Scene::start(true).await?;
    let receiver = Receiver::start()?;
    scene.dead_letters(&receiver, "crm", &["order.made"]).await?;
    let browser = browse(&scene).await?;
    show(&browser, "/ui/dead").await?;
    browser.until_there("[data-test=dead-row]").await?;
    browser.run("document.querySelector('[data-test=dead-row] [data-test=purge]').focus()").await?;
    browser.press("\u{e007}").await?;
    browser.until("document.querySelector('dialog').contains(document.activeElement)").await?;
    browser.press("\u{e00c}").await?;
    browser.until("!document.querySelector('dialog') && document.activeElement.dataset.test === 'purge'").await?;
    scene.world.until("SELECT count(*) = 1 FROM outbox.deliveries WHERE status = 'failed'").await?;
    Ok(())
}

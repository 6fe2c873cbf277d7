//! `dead`: what is given up is listed, owed again and removed, by filter.

use anyhow::{Result, ensure};
use outbox_tests::pool::Pool;
use outbox_tests::world::World;
use serde_json::json;

use super::{dead_letter, expect, run_with, url, webhook};

/// Four dead letters: two types, two destinations, two errors, two ages.
async fn world_with_dead_letters() -> Result<World<'static>> {
    let world = World::new().await?;
    webhook(&world, "crm").await?;
    dead_letter(&world, "order.placed", "crm", "HTTP 500").await?;
    let old = dead_letter(&world, "order.placed", "crm", "timeout after 30 s").await?;
    world
        .execute(&format!("UPDATE outbox_events SET created_at = now() - interval '3 days' WHERE event_id = '{old}'"))
        .await?;
    dead_letter(&world, "contact.created", "crm", "HTTP 500").await?;
    webhook(&world, "search").await?;
    dead_letter(&world, "contact.created", "search", "HTTP 404").await?;
    Ok(world)
}

const FILTERS: [(&str, i64); 10] = [
    ("--destination crm", 3),
    ("--destination search", 1),
    ("--type order.*", 2),
    ("--type *.created", 2),
    ("--error *timeout*", 1),
    ("--error HTTP*", 3),
    ("--since 1h", 3),
    ("--until 1day", 1),
    ("--since 4d --until 1h --destination crm --type order.* --error time*", 1),
    ("--destination crm --type contact.* --error *404*", 0),
];

#[tokio::test]
async fn what_is_listed_is_what_a_replay_takes() -> Result<()> {
    let world = world_with_dead_letters().await?;
    let url = url(&world);
    for (filter, count) in FILTERS {
        let code = if count == 0 { 2 } else { 0 };
        let listed = expect(code, &url, &format!("dead list --json {filter}"))?.json()?;
        assert_eq!(listed.as_array().map(Vec::len), usize::try_from(count).ok(), "{filter}: {listed}");
        let ran = expect(code, &url, &format!("dead replay --json --dry-run {filter}"))?;
        assert_eq!(ran.json()?, json!({"events": count, "dry_run": true}), "{filter}");
    }
    for (filter, count) in
        FILTERS.iter().filter(|(filter, _)| !filter.contains("--since") && !filter.contains("--until"))
    {
        let ran = expect(if *count == 0 { 2 } else { 0 }, &url, &format!("dead purge --json --dry-run {filter}"))?;
        assert_eq!(ran.json()?, json!({"events": count, "dry_run": true}), "{filter}");
    }
    assert_eq!(expect(0, &url, "dead purge --dry-run --older-than 2d")?.out, "1 event would be removed\n");
    // All this has changed nothing.
    let ran = expect(0, &url, "dead list")?;
    let lines: Vec<&str> = ran.out.lines().collect();
    ensure!(lines.len() == 5 && lines[0].starts_with("EVENT") && lines[0].ends_with("LAST ERROR"), "{ran:?}");
    ensure!(lines[2].contains("3 d") && lines[2].ends_with("timeout after 30 s"), "{ran:?}");
    let first = expect(0, &url, "dead list --json --limit 1")?.json()?;
    let keys: Vec<&String> = first[0].as_object().map(|letter| letter.keys().collect()).unwrap_or_default();
    let expected = [
        "aggregate_id",
        "aggregate_type",
        "attempts",
        "created_at",
        "destination",
        "event_id",
        "event_type",
        "last_error",
    ];
    assert_eq!(keys, expected, "{first}");
    Ok(())
}

#[tokio::test]
async fn dead_letters_are_owed_again_and_removed() -> Result<()> {
    let world = world_with_dead_letters().await?;
    let url = url(&world);
    assert_eq!(expect(0, &url, "dead replay --error *timeout*")?.out, "1 event owed again\n");
    assert_eq!(expect(2, &url, "dead replay --error *timeout*")?.out, "0 events owed again\n");
    expect(2, &url, "dead replay --destination nowhere")?;
    assert_eq!(expect(0, &url, "dead replay --all --limit 1 --json")?.json()?, json!({"events": 1, "dry_run": false}));
    assert_eq!(expect(0, &url, "dead purge --destination search")?.out, "1 event removed\n");
    expect(2, &url, "dead purge --destination nowhere")?;
    assert_eq!(expect(0, &url, "dead purge --all --json")?.json()?, json!({"events": 1, "dry_run": false}));
    let ran = expect(2, &url, "dead purge --all")?;
    ensure!(ran.out == "0 events removed\n", "{ran:?}");
    let ran = expect(2, &url, "dead list")?;
    ensure!(ran.out.is_empty() && ran.err.contains("no dead letter matches"), "{ran:?}");
    assert_eq!(expect(2, &url, "dead list --json")?.json()?, json!([]));
    // Two are owed again, and a third one is still owed to crm.
    let left: i64 = world.session.one("SELECT count(*) FROM outbox_events").await?;
    assert_eq!(left, 3);
    Ok(())
}

/// A time with its zone, in an argument that has a space.
#[tokio::test]
async fn times_are_rfc_3339_or_durations_back() -> Result<()> {
    let world = world_with_dead_letters().await?;
    let at: String = world
        .session
        .one("SELECT to_char(now() AT TIME ZONE 'UTC' - interval '1 day', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"')")
        .await?;
    for since in [at.as_str(), "1 day", "24 hours", "1d"] {
        let ran = run_with(&["dead", "list", "--json", "--since", since], &[("DATABASE_URL", &url(&world))])?;
        assert_eq!(ran.json()?.as_array().map(Vec::len), Some(3), "{since}");
    }
    Ok(())
}

/// Each command is one transaction, so it needs no session of its own.
#[tokio::test]
async fn a_pool_in_transaction_mode_is_enough() -> Result<()> {
    let world = world_with_dead_letters().await?;
    let pool = Pool::start(world.cluster, "transaction", 2).await?;
    let url = pool.url(&world.database);
    assert_eq!(expect(0, &url, "dead list --json")?.json()?.as_array().map(Vec::len), Some(4));
    assert_eq!(expect(0, &url, "dead replay --all")?.out, "4 events owed again\n");
    Ok(())
}

//! A thousand webhooks, each of a tenant of its own, that are added, altered, removed and paused while events come and relays
//! are killed, judged by what was committed and what arrived.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use outbox_tests::receiver::{Receiver, Reply};
use outbox_tests::relay::Relay;
use outbox_tests::scratch;
use outbox_tests::session::Session;
use outbox_tests::world::World;
use uuid::Uuid;

use crate::chaos::Random;

const TENANTS: u64 = 1000;
/// The first tenants lose their webhook and get it again; those of the next are altered; those of all others are paused at most.
const REMOVED: u64 = 100;
const ALTERED: u64 = 300;
const AGGREGATES: u64 = 3;
const PUBLISHERS: u64 = 6;

/// How long the events come; `OUTBOX_CHAOS_SECONDS` says otherwise.
const SECONDS: u64 = 20;

/// Each failure is tried again soon, and as often as it takes.
const SETTINGS: &str = r#"{"base": 0.05, "cap": 0.5, "max_attempts": 1000}"#;

/// What was committed, in the order of each aggregate's only publisher.
struct Published {
    event: Uuid,
    tenant: u64,
    aggregate: String,
    /// The number of times that the tenant's webhook was added, counted when the event's transaction began.
    era: u32,
}

#[derive(Default)]
struct Record {
    events: Vec<Published>,
    /// Of the tenants whose webhook is removed: how often it was added.
    eras: HashMap<u64, u32>,
    changes: u64,
}

struct Arena {
    url: String,
    receiver: Receiver,
    record: Mutex<Record>,
    end: Instant,
}

impl Arena {
    fn with<T>(&self, look: impl FnOnce(&mut Record) -> T) -> T {
        look(&mut self.record.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn webhook(tenant: u64) -> String {
    format!("customer-{tenant}")
}

async fn publisher(arena: Arc<Arena>, number: u64, mut random: Random) -> Result<()> {
    let session = Session::open(&arena.url).await?;
    while Instant::now() < arena.end {
        let mut published = Vec::new();
        session.batch_execute("BEGIN").await?;
        for _ in 0..=random.below(4) {
            let tenant = random.below(TENANTS);
            let era = arena.with(|record| record.eras.get(&tenant).copied().unwrap_or(0));
            // Each aggregate has one publisher, so that its events are committed in the order of their ids.
            let aggregate = format!("{tenant}/{number}/{}", random.below(AGGREGATES));
            let publish = "SELECT outbox.publish('order.placed', '{}', 'order', $1, tenant_id => $2)";
            let event = session.query_one(publish, &[&aggregate, &tenant.to_string()]).await?.get(0);
            published.push(Published { event, tenant, aggregate, era });
        }
        let committed = random.below(10) > 0;
        session.batch_execute(if committed { "COMMIT" } else { "ROLLBACK" }).await?;
        if committed {
            arena.with(|record| record.events.append(&mut published));
        }
        tokio::time::sleep(Duration::from_millis(random.below(40))).await;
    }
    Ok(())
}

async fn operator(arena: Arc<Arena>, mut random: Random) -> Result<()> {
    let session = Session::open(&arena.url).await?;
    while Instant::now() < arena.end {
        let tenant = random.below(TENANTS);
        let name = webhook(tenant);
        if tenant < REMOVED {
            session.execute("SELECT outbox.remove_destination($1)", &[&name]).await?;
            tokio::time::sleep(Duration::from_millis(random.below(50))).await;
            add(&session, &arena.receiver, tenant).await?;
            arena.with(|record| *record.eras.entry(tenant).or_default() += 1);
        } else if tenant < ALTERED {
            let changes = format!(r#"{{"url": "{}"}}"#, url(&arena.receiver, tenant, random.below(1000)));
            session.execute("SELECT outbox.alter_destination($1, $2::text::jsonb)", &[&name, &changes]).await?;
        } else {
            session.execute("SELECT outbox.pause($1)", &[&name]).await?;
            tokio::time::sleep(Duration::from_millis(random.below(50))).await;
            session.execute("SELECT outbox.resume($1)", &[&name]).await?;
        }
        arena.with(|record| record.changes += 1);
    }
    Ok(())
}

fn url(receiver: &Receiver, tenant: u64, version: u64) -> String {
    receiver.url(&format!("{tenant}/{version}"))
}

async fn add(session: &Session, receiver: &Receiver, tenant: u64) -> Result<()> {
    let add = "SELECT outbox.add_webhook($1, $2, settings => $3::text::jsonb, tenant_id => $4)";
    session
        .execute(add, &[&webhook(tenant), &url(receiver, tenant, 0), &SETTINGS, &tenant.to_string()])
        .await
        .map(|_| ())
        .with_context(|| format!("tenant {tenant}"))
}

/// One of each twenty requests fails and one is slow.
fn unreliable(receiver: &Receiver, seed: u64) {
    let random = Mutex::new(Random(seed));
    receiver.reply_with(move |_, _| match random.lock().unwrap_or_else(PoisonError::into_inner).below(20) {
        0 => Reply::Status(500),
        1 => Reply::After(Duration::from_millis(100), Box::new(Reply::Accept)),
        _ => Reply::Accept,
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_webhooks_change_under_load_and_each_gets_what_is_its_own() -> Result<()> {
    let seconds = std::env::var("OUTBOX_CHAOS_SECONDS").ok().map_or(Ok(SECONDS), |text| text.parse())?;
    let seed = u64::from_str_radix(&scratch::random_hex(7)?, 16)? | 1;
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    for tenant in 0..TENANTS {
        add(&world.session, &receiver, tenant).await?;
    }
    unreliable(&receiver, seed);
    let url = world.cluster.url(&world.database);
    let end = Instant::now() + Duration::from_secs(seconds);
    let arena = Arc::new(Arena { url: url.clone(), receiver, record: Mutex::default(), end });

    let mut sessions = tokio::task::JoinSet::new();
    for number in 0..PUBLISHERS {
        sessions.spawn(publisher(arena.clone(), number, Random(seed.wrapping_mul(2 * number + 3))));
    }
    sessions.spawn(operator(arena.clone(), Random(seed.wrapping_mul(101))));
    let steady = Relay::start(world.cluster, &world.database, None).await?;
    let mut mortal = Relay::start(world.cluster, &world.database, None).await?;
    let mut killed = 0;
    while !sessions.is_empty() {
        tokio::select! {
            Some(ended) = sessions.join_next() => ended?.with_context(|| format!("seed {seed}"))?,
            () = tokio::time::sleep(Duration::from_secs(3)) => {
                mortal.kill().await?;
                mortal = Relay::with(&url, None, &[]).await?;
                killed += 1;
            }
        }
    }
    world.processed().await.with_context(|| format!("seed {seed}"))?;
    ensure!(killed > 0 && steady.lines().iter().any(|line| line.contains("served")), "nothing happened");
    arena.with(|record| judge(record, &arena.receiver)).with_context(|| format!("seed {seed}"))
}

/// Each event arrived at its tenant's webhook and nowhere else, those of an aggregate in order, unless the webhook was removed
/// after the event.
fn judge(record: &Record, receiver: &Receiver) -> Result<()> {
    let mut arrived: HashMap<Uuid, usize> = HashMap::new();
    let mut tenants: HashMap<Uuid, String> = HashMap::new();
    for (place, request) in receiver.received().iter().enumerate() {
        let tenant = request.path.trim_start_matches('/').split('/').next().unwrap_or_default().to_owned();
        let event = request.event_id()?;
        let other = tenants.insert(event, tenant.clone()).filter(|other| *other != tenant);
        ensure!(other.is_none(), "{event} went to {other:?} and {tenant}");
        arrived.entry(event).or_insert(place);
    }
    let committed: HashSet<Uuid> = record.events.iter().map(|event| event.event).collect();
    let invented: Vec<&Uuid> = arrived.keys().filter(|event| !committed.contains(event)).collect();
    ensure!(invented.is_empty(), "never committed: {invented:?}");
    let mut last: HashMap<&str, (usize, Uuid)> = HashMap::new();
    for event in &record.events {
        let (id, tenant) = (event.event, event.tenant);
        let Some(place) = arrived.get(&id).copied() else {
            let removed = tenant < REMOVED && record.eras.get(&tenant).is_some_and(|era| *era > event.era);
            ensure!(removed, "{id} of tenant {tenant} never arrived");
            continue;
        };
        ensure!(tenants[&id] == tenant.to_string(), "{id} of tenant {tenant} went to {}", tenants[&id]);
        let (before, earlier) = last.insert(&event.aggregate, (place, id)).unwrap_or_default();
        // What was owed when a webhook was removed may arrive beside what the next one is owed.
        ensure!(before <= place || tenant < REMOVED, "{id} of {} arrived before {earlier}", event.aggregate);
    }
    ensure!(record.changes > 20 && record.events.len() > 200, "only {} events", record.events.len());
    println!(
        "{} events, {} changes of destinations, {} requests",
        record.events.len(),
        record.changes,
        receiver.count()
    );
    Ok(())
}

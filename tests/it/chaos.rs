//! Two hundred sessions that publish, claim, settle and die at random, judged by a record that no database keeps.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use outbox_tests::cluster::Cluster;
use outbox_tests::scratch;
use outbox_tests::session::Session;
use outbox_tests::wait::LONG;

const PUBLISHERS: u64 = 20;
const CONSUMERS: u64 = 180;
const AGGREGATES: u64 = 10;

/// How long the sessions go on; `OUTBOX_CHAOS_SECONDS` says otherwise.
const SECONDS: u64 = 90;

/// A claim of a session that is not attached ends with this lease.
const LEASE: Duration = Duration::from_secs(2);

/// xorshift64* (Vigna, 2014): good enough to choose what happens next.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Free,
    /// By a consumer, until a moment if only its lease ends that.
    Held(u64, Option<Instant>),
    /// The answer to the settlement is not known yet, or never will be.
    Settling,
    Settled,
}

/// What was published and who holds it, as its publishers and consumers know it.
#[derive(Default)]
struct Record {
    events: BTreeMap<i64, (String, State)>,
    by_aggregate: HashMap<String, Vec<i64>>,
    handed_out: u64,
    deaths: u64,
}

#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Record>>);

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Record> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Committed. The ids of an aggregate come in order, from its only publisher. A consumer may have been faster.
    fn published(&self, id: i64, aggregate: &str) {
        let mut record = self.lock();
        record.events.entry(id).or_insert_with(|| (aggregate.to_owned(), State::Free));
        let line = record.by_aggregate.entry(aggregate.to_owned()).or_default();
        if !line.contains(&id) {
            line.push(id);
        }
    }

    fn handed_out(&self, consumer: u64, ids: &[(i64, Option<String>)], until: Option<Instant>) -> Result<()> {
        let mut record = self.lock();
        record.handed_out += ids.len() as u64;
        for (id, aggregate) in ids {
            let state = record.events.get(id).map(|(_, state)| *state);
            match state {
                Some(State::Held(by, until)) if until.is_none_or(|until| until > Instant::now()) => {
                    bail!("{id} was handed out to {consumer} while {by} holds it")
                }
                Some(State::Settled) => bail!("{id} was handed out to {consumer} after it was settled"),
                _ => {}
            }
            let aggregate = aggregate.clone().unwrap_or_default();
            if !aggregate.is_empty() {
                let earlier = record.by_aggregate.get(&aggregate).map(|line| line.iter().copied().filter(|e| e < id));
                for earlier in earlier.into_iter().flatten() {
                    let together = ids.iter().any(|(other, _)| *other == earlier);
                    let open = record
                        .events
                        .get(&earlier)
                        .is_some_and(|(_, s)| !matches!(s, State::Settled | State::Settling));
                    ensure!(together || !open, "{id} was handed out to {consumer} before {earlier} of {aggregate}");
                }
            }
        }
        for (id, aggregate) in ids {
            record.events.insert(*id, (aggregate.clone().unwrap_or_default(), State::Held(consumer, until)));
        }
        Ok(())
    }

    fn set(&self, ids: &[i64], state: State) {
        let mut record = self.lock();
        for id in ids {
            if let Some((_, s)) = record.events.get_mut(id) {
                *s = state;
            }
        }
    }

    /// A consumer's events from this one on, in its line, are no longer its own.
    fn lost_from(&self, consumer: u64, id: i64) {
        let mut record = self.lock();
        let aggregate = record.events.get(&id).map(|(aggregate, _)| aggregate.clone()).unwrap_or_default();
        for (other, (line, state)) in record.events.range_mut(id..) {
            let same = *other == id || (!aggregate.is_empty() && *line == aggregate);
            if same && matches!(state, State::Held(by, _) if *by == consumer) {
                *state = State::Free;
            }
        }
    }

    /// Everything that a consumer holds.
    fn lost(&self, consumer: u64) {
        for (_, state) in self.lock().events.values_mut() {
            if matches!(state, State::Held(by, _) if *by == consumer) {
                *state = State::Free;
            }
        }
    }

    fn holds(&self, consumer: u64, id: i64) -> bool {
        matches!(self.lock().events.get(&id), Some((_, State::Held(by, _))) if *by == consumer)
    }
}

struct Arena {
    url: String,
    shared: Shared,
    end: Instant,
}

async fn publisher(arena: Arc<Arena>, number: u64, mut random: Random) -> Result<()> {
    let session = Session::open(&arena.url).await?;
    while Instant::now() < arena.end {
        // Each aggregate has one publisher, so that its ids are committed in order.
        let aggregate = match random.below(4) {
            0 => None,
            _ => Some(format!("{number}-{}", random.below(AGGREGATES))),
        };
        let count = random.below(5) as i32 + 1;
        let rolled_back = random.below(10) == 0;
        session.batch_execute("BEGIN").await?;
        let rows = session
            .query(
                "INSERT INTO outbox_events (event_type, event_data, aggregate_type, aggregate_id)
                 SELECT 'chaos', '{}', 'a', $1 FROM generate_series(1, $2) RETURNING id",
                &[&aggregate, &count],
            )
            .await?;
        tokio::time::sleep(Duration::from_millis(random.below(20))).await;
        session.batch_execute(if rolled_back { "ROLLBACK" } else { "COMMIT" }).await?;
        if !rolled_back {
            rows.iter().for_each(|row| arena.shared.published(row.get(0), aggregate.as_deref().unwrap_or_default()));
        }
        tokio::time::sleep(Duration::from_millis(random.below(100))).await;
    }
    Ok(())
}

async fn consumer(arena: Arc<Arena>, number: u64, mut random: Random) -> Result<()> {
    while Instant::now() < arena.end {
        let session = Session::open(&arena.url).await?;
        let attached = random.below(4) > 0;
        if attached {
            session.batch_execute(&format!("SELECT outbox.attach('chaos {number}')")).await?;
        }
        let claims = random.below(8) + 1;
        for _ in 0..claims {
            if Instant::now() >= arena.end {
                break;
            }
            work(&arena, &session, number, attached, &mut random).await?;
            tokio::time::sleep(Duration::from_millis(random.below(300))).await;
        }
        // Its claims must not be taken for held once it may be gone.
        arena.shared.lost(number);
        arena.shared.lock().deaths += 1;
        if random.below(2) == 0 {
            // The backend ends by itself, in the middle of whatever it does.
            let admin = Session::open(&arena.url).await?;
            let pid: i32 = session.one("SELECT pg_backend_pid()").await?;
            admin.execute("SELECT pg_terminate_backend($1)", &[&pid]).await?;
        }
    }
    Ok(())
}

async fn work(arena: &Arena, session: &Session, number: u64, attached: bool, random: &mut Random) -> Result<()> {
    let until = (!attached).then(|| Instant::now() + LEASE);
    let lease = if attached { "1 hour".to_owned() } else { format!("{} seconds", LEASE.as_secs()) };
    let most = random.below(20) + 1;
    let claim = format!("SELECT id, claim_token, aggregate_id FROM outbox.claim({most}, NULL, '{lease}')");
    let rows = session.query(&claim, &[]).await?;
    let events: Vec<(i64, Option<String>)> = rows.iter().map(|row| (row.get(0), row.get(2))).collect();
    arena.shared.handed_out(number, &events, until)?;
    let Some(token) = rows.first().map(|row| row.get::<_, i64>(1)) else { return Ok(()) };
    for (id, _) in events {
        if Instant::now() >= arena.end {
            return Ok(());
        }
        if until.is_some_and(|until| until < Instant::now() + LEASE / 4) {
            arena.shared.lost(number);
            return Ok(());
        }
        if arena.shared.holds(number, id) && !settle(arena, session, number, (token, id), random).await? {
            return Ok(());
        }
    }
    Ok(())
}

/// One event's outcome; false: the consumer gives up on the claim.
async fn settle(arena: &Arena, session: &Session, number: u64, held: (i64, i64), random: &mut Random) -> Result<bool> {
    let ((token, id), shared) = (held, &arena.shared);
    match random.below(20) {
        0 => {
            shared.lost_from(number, id);
            let failed = format!("SELECT outbox.fail({token}, {id}, 'chaos', '{} ms')", random.below(100));
            ensure!(session.one::<bool>(&failed).await?, "{id} of {token} could not fail");
        }
        1 => {
            shared.lost(number);
            session.one::<i64>(&format!("SELECT outbox.release({token})")).await?;
            return Ok(false);
        }
        2 if random.below(4) == 0 => return Ok(false),
        _ => {
            shared.set(&[id], State::Settling);
            let settled = session.one::<i64>(&format!("SELECT outbox.ack({token}, ARRAY[{id}])")).await?;
            ensure!(settled == 1, "{id} of {token} was held and could not be settled");
            shared.set(&[id], State::Settled);
        }
    }
    Ok(true)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_sessions_lose_nothing_and_share_nothing() -> Result<()> {
    let seconds = std::env::var("OUTBOX_CHAOS_SECONDS").ok().map_or(Ok(SECONDS), |text| text.parse())?;
    let seed = u64::from_str_radix(&scratch::random_hex(7)?, 16)? | 1;
    let cluster = Cluster::start().await?;
    let database = cluster.database().await?;
    let admin = cluster.connect(&database).await?;
    let end = Instant::now() + Duration::from_secs(seconds);
    let arena = Arc::new(Arena { url: cluster.url(&database), shared: Shared::default(), end });

    let mut sessions = tokio::task::JoinSet::new();
    for number in 0..PUBLISHERS {
        sessions.spawn(publisher(arena.clone(), number, Random(seed.wrapping_mul(2 * number + 3))));
    }
    for number in PUBLISHERS..PUBLISHERS + CONSUMERS {
        sessions.spawn(consumer(arena.clone(), number, Random(seed.wrapping_mul(2 * number + 3))));
    }
    let mut workers_ended = 0;
    while !sessions.is_empty() {
        tokio::select! {
            Some(ended) = sessions.join_next() => ended?.with_context(|| format!("seed {seed}"))?,
            () = tokio::time::sleep(Duration::from_secs(3)) => {
                // The worker is not spared either.
                let ended: i64 = admin.one("SELECT count(pg_terminate_backend(worker_pid)) FROM outbox.stats() WHERE worker_pid IS NOT NULL").await?;
                workers_ended += ended;
            }
        }
    }

    let open = "SELECT count(*) FROM outbox_events WHERE status NOT IN ('processed')";
    admin.until("SELECT worker_state = 'idle' FROM outbox.stats()", LONG).await?;
    let last_claim = Instant::now() + LONG;
    while admin.one::<i64>(open).await? > 0 {
        ensure!(Instant::now() < last_claim, "{} events are left over", admin.one::<i64>(open).await?);
        let rows = admin.query("SELECT id, claim_token, aggregate_id FROM outbox.claim(1000)", &[]).await?;
        let events: Vec<(i64, Option<String>)> = rows.iter().map(|row| (row.get(0), row.get(2))).collect();
        arena.shared.handed_out(u64::MAX, &events, None)?;
        if let Some(row) = rows.first() {
            let settled: i64 = admin.one(&format!("SELECT outbox.ack({})", row.get::<_, i64>(1))).await?;
            ensure!(settled == events.len() as i64, "{settled} of {} were settled", events.len());
            arena.shared.set(&events.iter().map(|(id, _)| *id).collect::<Vec<_>>(), State::Settled);
        } else {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    let count = {
        let record = arena.shared.lock();
        let lost: Vec<i64> = record
            .events
            .iter()
            .filter(|(_, (_, s))| !matches!(s, State::Settled | State::Settling))
            .map(|(id, _)| *id)
            .collect();
        ensure!(lost.is_empty(), "never settled: {lost:?}; seed {seed}");
        ensure!(record.handed_out > 0 && record.deaths > 0 && workers_ended > 0, "nothing happened");
        println!(
            "{} events, handed out {} times; {} sessions and {workers_ended} workers ended; seed {seed}",
            record.events.len(),
            record.handed_out,
            record.deaths
        );
        record.events.len()
    };
    let settled = format!("SELECT processed = {count} AND pending = 0 AND processing = 0 FROM outbox.stats()");
    admin.until(&settled, LONG).await
}

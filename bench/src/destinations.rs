//! Webhooks by the thousand, each of a tenant of its own, beside a few: an outbox for each number, in turns.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use outbox_tests::cluster::Cluster;
use outbox_tests::receiver::Receiver;
use outbox_tests::relay::Relay;
use outbox_tests::scratch;
use outbox_tests::session::Session;
use outbox_tests::trace::{Micros, micros};
use outbox_tests::wait::LONG;
use serde_json::json;
use uuid::Uuid;

use crate::load::{Sent, paced, producers};
use crate::process::peak_memory;
use crate::sample::{Spread, percentile, sorted};
use crate::sheet::{Must, Sheet};
use crate::stage::Outbox;

const COUNTS: [usize; 4] = [1, 10, 1000, 10_000];
/// What the largest is compared with.
const FEW: usize = 1;
const TURNS: usize = 3;
const ROUNDS: usize = 60;
const RATE: usize = 100;
const SECONDS: f64 = 8.0;
const BURST: usize = 3000;
/// Of as many as the largest has.
const DEAD: usize = 1000;

/// One outbox with so many webhooks, and what was measured there.
struct Size {
    count: usize,
    /// The first of them: nobody listens where they send.
    dead: usize,
    outbox: Outbox,
    receiver: Receiver,
    figures: HashMap<&'static str, Vec<f64>>,
}

pub async fn run(sheet: &mut Sheet) -> Result<()> {
    let mut sizes = Vec::new();
    for count in COUNTS {
        sizes.push(Size::set(sheet.count(count), 0).await?);
    }
    let largest = sheet.count(COUNTS[COUNTS.len() - 1]);
    let mut ill = Size::set(largest, sheet.count(DEAD)).await?;
    for turn in 0..=TURNS {
        for size in &mut sizes {
            let figures = size.measure(sheet.scale.min(1.0)).await?;
            // The first turn fills caches.
            for (name, value) in figures.into_iter().filter(|_| turn > 0) {
                size.figures.entry(name).or_default().push(value);
            }
        }
        let figures = ill.measure_others(sheet.scale.min(1.0)).await?;
        for (name, value) in figures.into_iter().filter(|_| turn > 0) {
            ill.figures.entry(name).or_default().push(value);
        }
    }
    sheet.raw(format!("{largest} webhooks, {} dead", ill.dead), json!(ill.figures))?;
    for size in &sizes {
        sheet.raw(format!("{} webhooks", size.count), json!(size.figures))?;
    }
    let (few, many) = (&sizes[FEW].figures, &sizes[COUNTS.len() - 1].figures);
    for (name, must) in [
        ("claim and settlement of 1", Must::AtMost(1.3)),
        ("claim and settlement of 500", Must::AtMost(1.3)),
        ("commit to request p50", Must::AtMost(1.3)),
        ("commit to request p99", Must::Nothing),
        ("burst", Must::AtMost(1.5)),
    ] {
        let (few, many) = (few.get(name).context(name)?, many.get(name).context(name)?);
        sheet.spread(format!("{name}, 10,000 of 10"), Spread::of_ratios(many, few), "x", must)?;
    }
    for (name, must) in [("commit to request p50", Must::Nothing), ("commit to request p99", Must::AtMost(1.5))] {
        let (well, ill) = (many.get(name).context(name)?, ill.figures.get(name).context(name)?);
        sheet.spread(format!("{name} of the others, 1,000 of 10,000 dead"), Spread::of_ratios(ill, well), "x", must)?;
    }
    for (name, unit, must) in [
        ("relay, before it delivers", "MiB", Must::AtMost(60.0)),
        ("relay, at its most", "MiB", Must::AtMost(60.0)),
        ("a new one's first event", "ms", Must::AtMost(50.0)),
    ] {
        let values = many.get(name).context(name)?;
        sheet.spread(format!("{name}, 10,000"), Spread::of(values), unit, must)?;
    }
    Ok(())
}

impl Size {
    async fn set(count: usize, dead: usize) -> Result<Self> {
        let outbox = Outbox::start(&[]).await?;
        let receiver = Receiver::start()?;
        let add = "SELECT count(outbox.add_webhook(t, $1, tenant_id => t)) FROM (SELECT 'tenant.' || n AS t FROM generate_series(1, $2::int) n) x";
        outbox.session.execute(add, &[&receiver.url("hook"), &(count as i32)]).await?;
        let nowhere = json!({ "url": format!("http://127.0.0.1:{}/", scratch::free_port()?) }).to_string();
        let alter = "SELECT count(*) FROM (SELECT outbox.alter_destination('tenant.' || n, $1::text::jsonb) FROM generate_series(1, $2::int) n) x";
        outbox.session.execute(alter, &[&nowhere, &(dead as i32)]).await?;
        outbox.session.batch_execute("VACUUM ANALYZE").await?;
        Ok(Size { count, dead, outbox, receiver, figures: HashMap::new() })
    }

    async fn measure(&self, scale: f64) -> Result<Vec<(&'static str, f64)>> {
        self.outbox.empty("outbox_events").await?;
        let one = claim_and_settle(&self.outbox.session, self.count, 1, ROUNDS * 5).await?;
        let many = claim_and_settle(&self.outbox.session, self.count, 500, ROUNDS / 4).await?;
        let relay = relay(&self.outbox.cluster, &self.outbox.database).await?;
        let idle = peak_memory(relay.pid())?;
        let latencies = self.latencies(SECONDS * scale).await?;
        let burst = self.burst().await?;
        let first = self.first_of_a_new_one().await?;
        let peak = peak_memory(relay.pid())?;
        let status = relay.terminate(LONG).await?;
        ensure!(status.success(), "the relay ended with {status}: {}", relay.log());
        let at = |percent| percentile(&latencies, percent).context("no event was measured");
        Ok(vec![
            ("claim and settlement of 1", one),
            ("claim and settlement of 500", many),
            ("commit to request p50", at(50.0)?),
            ("commit to request p99", at(99.0)?),
            ("burst", burst),
            ("relay, before it delivers", idle),
            ("relay, at its most", peak),
            ("a new one's first event", first),
        ])
    }

    /// What those that are well notice of the dead ones, which are owed their share of the events.
    async fn measure_others(&self, scale: f64) -> Result<Vec<(&'static str, f64)>> {
        let relay = relay(&self.outbox.cluster, &self.outbox.database).await?;
        let latencies = self.latencies(SECONDS * scale).await?;
        let status = relay.terminate(LONG).await?;
        ensure!(status.success(), "the relay ended with {status}: {}", relay.log());
        let at = |percent| percentile(&latencies, percent).context("no event was measured");
        Ok(vec![("commit to request p50", at(50.0)?), ("commit to request p99", at(99.0)?)])
    }

    /// Milliseconds from commit to request at a steady rate, sorted; of those that are well.
    async fn latencies(&self, seconds: f64) -> Result<Vec<f64>> {
        let before = self.receiver.count();
        let tenants: Vec<String> = (0..997).map(|n| format!("tenant.{}", 1 + n * 7919 % self.count)).collect();
        let producers = producers(&self.outbox, "outbox_events", 4).await?;
        let sent =
            paced(producers, &tenants, RATE, Duration::from_secs_f64(seconds.max(2.0))).await?.at_least(RATE)?.sent;
        let well = self.of_the_well(&sent).await?;
        let sent: Vec<_> = sent.iter().filter(|sent| well.contains(&sent.event_id)).collect();
        let received = self.receiver.wait_for(before + sent.len(), LONG).await?;
        let mut arrivals: HashMap<Uuid, Micros> = HashMap::new();
        for request in &received[before..] {
            arrivals.entry(request.event_id()?).or_insert_with(|| micros(request.at));
        }
        let lag = |sent: &&Sent| Some((arrivals.get(&sent.event_id)? - sent.at) as f64 / 1000.0);
        let all: Vec<f64> = sent.iter().filter_map(lag).collect();
        ensure!(all.len() == sent.len(), "{} of {} events arrived", all.len(), sent.len());
        Ok(sorted(&all[all.len() / 5..]))
    }

    /// Those of the events whose webhook is not dead.
    async fn of_the_well(&self, sent: &[Sent]) -> Result<HashSet<Uuid>> {
        let ids: Vec<Uuid> = sent.iter().map(|sent| sent.event_id).collect();
        let well = "SELECT event_id FROM outbox_events WHERE event_id = ANY ($1) AND substr(tenant_id, 8)::int > $2";
        let rows = self.outbox.session.query(well, &[&ids, &(self.dead as i32)]).await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    /// Milliseconds until each of so many events, spread over all webhooks, arrived.
    async fn burst(&self) -> Result<f64> {
        let before = self.receiver.count();
        let insert = format!(
            "INSERT INTO outbox_events (event_type, tenant_id, event_data)
             SELECT 'bench.burst', 'tenant.' || 1 + n % {}, '{{}}' FROM generate_series(1, {BURST}) n",
            self.count
        );
        let started = Instant::now();
        self.outbox.session.batch_execute(&insert).await?;
        self.receiver.wait_for(before + BURST, LONG).await?;
        Ok(started.elapsed().as_secs_f64() * 1000.0)
    }

    /// Milliseconds from the commit that adds a webhook, and an event for it, to the request.
    async fn first_of_a_new_one(&self) -> Result<f64> {
        self.outbox.settled().await?;
        let before = self.receiver.count();
        let add = format!(
            "BEGIN; SELECT outbox.add_webhook('new', '{}', tenant_id => 'new');
             INSERT INTO outbox_events (event_type, tenant_id, event_data) VALUES ('bench.first', 'new', '{{}}'); COMMIT",
            self.receiver.url("new")
        );
        self.outbox.session.batch_execute(&add).await?;
        let committed = outbox_tests::trace::now_us();
        let received = self.receiver.wait_for(before + 1, LONG).await?;
        self.outbox.settled().await?;
        self.outbox.session.batch_execute("SELECT outbox.remove_destination('new')").await?;
        Ok((micros(received[before].at) - committed) as f64 / 1000.0)
    }
}

async fn relay(cluster: &Cluster, database: &str) -> Result<Relay> {
    Relay::start(cluster, database, None).await
}

/// Milliseconds of a claim with its settlement, the median.
async fn claim_and_settle(session: &Session, count: usize, events: usize, rounds: usize) -> Result<f64> {
    let insert = format!(
        "INSERT INTO outbox_events (event_type, tenant_id, event_data, aggregate_id)
         SELECT 'bench.claimed', 'tenant.' || 1 + (random() * {})::int, '{{}}', n FROM generate_series(1, {events}) n",
        count - 1
    );
    let claim = session.prepare("SELECT count(*), max(claim_token) FROM outbox.claim_for($1, '1 minute')").await?;
    let ack = session.prepare("SELECT outbox.ack($1)").await?;
    let mut took = Vec::new();
    for _ in 0..rounds {
        session.batch_execute(&insert).await?;
        let started = Instant::now();
        let row = session.query_one(&claim, &[&(events as i32)]).await?;
        session.query_one(&ack, &[&row.get::<_, i64>(1)]).await?;
        took.push(started.elapsed().as_secs_f64() * 1000.0);
        ensure!(row.get::<_, i64>(0) == events as i64, "{} of {events} events were claimed", row.get::<_, i64>(0));
    }
    percentile(&sorted(&took), 50.0).context("nothing was measured")
}

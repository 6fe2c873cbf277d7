//! The servers of the demonstration, and what can be done on them.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use outbox_tests::broker::Broker;
use outbox_tests::cluster::Cluster;
use outbox_tests::receiver::Receiver;
use outbox_tests::relay::Relay;
use outbox_tests::session::Session;
use outbox_tests::trace::{Trace, now_us};
use outbox_tests::wait::{self, LONG};
use outbox_tests::{postgres, scratch};
use uuid::Uuid;

use crate::KINDS;
use crate::journal::Journal;
use crate::show::say;

const PUBLISH: &str = "SELECT outbox.publish($1, $2, split_part($1, '.', 1), $3)";

pub struct Stage {
    pub cluster: Cluster,
    pub database: String,
    pub broker: Broker,
    pub webhook: Receiver,
    pub relays: Vec<Relay>,
    pub journal: Arc<Journal>,
    /// Kept after the death of its relay.
    pub past_trace: Trace,
    session: Session,
    dead_port: u16,
    revived: Option<Receiver>,
}

impl Stage {
    pub async fn set() -> Result<Self> {
        let started = Instant::now();
        let durable = [("fsync", "on")];
        let (cluster, broker) = tokio::try_join!(Cluster::with(&durable), Broker::own())?;
        let database = cluster.database().await?;
        let session = cluster.connect(&database).await?;
        let webhook = Receiver::start()?;
        let channel = broker.channel().await?;
        channel.bind("outbox_events", "#", "everything").await?;
        let journal = Arc::new(Journal::default());
        journal.clone().watch_queue(channel.consume("everything").await?);
        journal.clone().watch_notifications(cluster.connect(&database).await?).await?;
        session.execute("SELECT outbox.add_rabbitmq('rabbitmq')", &[]).await?;
        session.execute("SELECT outbox.add_webhook('webhook', $1)", &[&webhook.url("/events")]).await?;
        let mut stage = Stage {
            cluster,
            database,
            broker,
            webhook,
            relays: Vec::new(),
            journal,
            past_trace: Trace::default(),
            session,
            dead_port: scratch::free_port()?,
            revived: None,
        };
        stage.start_relay().await?;
        stage.start_relay().await?;
        let version = postgres::Installation::get()?.major;
        say(&format!("PostgreSQL {version} with fsync on, RabbitMQ, a webhook receiver and two relays: all"));
        say(&format!("private, on 127.0.0.1, ready after {:.1} s.", started.elapsed().as_secs_f64()));
        Ok(stage)
    }

    async fn start_relay(&mut self) -> Result<()> {
        let variables = [("OUTBOX_LOG_LEVEL", "info,outbox_relay::trace=debug")];
        let (database, amqp) = (self.cluster.url(&self.database), self.broker.url());
        self.relays.push(Relay::with(&database, Some(&amqp), &variables).await?);
        Ok(())
    }

    /// Commits one event and returns its identity.
    pub async fn publish(&self, kind: &str, number: usize) -> Result<Uuid> {
        publish(&self.session, &self.journal, kind, number).await
    }

    /// Commits events one by one from several sessions at once.
    pub async fn publish_many(&self, count: usize, sessions: usize) -> Result<Vec<Uuid>> {
        let mut tasks = tokio::task::JoinSet::new();
        for first in 0..sessions {
            let session = self.cluster.connect(&self.database).await?;
            let journal = self.journal.clone();
            tasks.spawn(async move {
                let mut ids = Vec::new();
                for number in (first..count).step_by(sessions) {
                    ids.push(publish(&session, &journal, KINDS[number % KINDS.len()], number).await?);
                }
                Ok::<_, anyhow::Error>(ids)
            });
        }
        let mut ids = Vec::new();
        while let Some(done) = tasks.join_next().await {
            ids.extend(done??);
        }
        Ok(ids)
    }

    /// Commits events of one kind in one transaction, over a number of aggregates; in the order of their id.
    pub async fn publish_in_one_transaction(
        &self,
        kind: &str,
        count: i32,
        aggregates: i32,
    ) -> Result<Vec<(Uuid, String)>> {
        let insert = "INSERT INTO outbox_events (event_type, aggregate_type, aggregate_id, event_data)
            SELECT $1, 'cart', (n % $3)::text, jsonb_build_object('n', n) FROM generate_series(1, $2) AS n
            RETURNING id, event_id, aggregate_id";
        let sent = now_us();
        let rows = self.session.query(insert, &[&kind, &count, &aggregates]).await?;
        let committed = now_us();
        let mut events: Vec<(i64, Uuid, String)> =
            rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?))).collect::<Result<_>>()?;
        events.sort();
        events.iter().for_each(|(_, id, _)| self.journal.publish(*id, kind, sent, committed));
        Ok(events.into_iter().map(|(_, id, aggregate)| (id, aggregate)).collect())
    }

    /// Waits until the queue and the webhook have all of them.
    pub async fn arrived(&self, ids: &[Uuid], limit: Duration) -> Result<()> {
        let wanted: HashSet<Uuid> = ids.iter().copied().collect();
        let look = async || {
            let there = wanted.iter().all(|id| self.journal.in_queue(id));
            Ok((there && wanted.is_subset(&self.at_webhook()?)).then_some(()))
        };
        wait::until("the events to arrive", limit, look).await?;
        self.note_webhook()
    }

    fn at_webhook(&self) -> Result<HashSet<Uuid>> {
        self.webhook.received().iter().map(|request| request.event_id()).collect()
    }

    fn note_webhook(&self) -> Result<()> {
        self.webhook.received().iter().try_for_each(|request| self.journal.note_webhook(request))
    }

    /// Waits until the table says so of all of them.
    pub async fn processed(&self, ids: &[Uuid]) -> Result<()> {
        self.until_none(ids, "status <> 'processed'").await
    }

    /// The same, leaving out what only the dead webhook still waits for.
    pub async fn processed_but_for_the_dead(&self, ids: &[Uuid]) -> Result<()> {
        let owed = "status <> 'processed' AND EXISTS (SELECT FROM outbox.deliveries d
            WHERE d.event_id = e.event_id AND d.destination <> 'dead' AND d.status <> 'failed')";
        self.until_none(ids, owed).await?;
        self.until_none(ids, "status = 'processing'").await
    }

    async fn until_none(&self, ids: &[Uuid], condition: &str) -> Result<()> {
        let query = format!("SELECT count(*) FROM outbox_events e WHERE event_id = ANY ($1) AND {condition}");
        let look = async || Ok((self.session.query_one(&query, &[&ids]).await?.get::<_, i64>(0) == 0).then_some(()));
        wait::until("the events to be settled", LONG, look).await
    }

    pub async fn add_dead_webhook(&self, kinds: &str) -> Result<()> {
        let url = format!("http://127.0.0.1:{}/", self.dead_port);
        self.session.execute("SELECT outbox.add_webhook('dead', $1, ARRAY[$2])", &[&url, &kinds]).await?;
        Ok(())
    }

    /// How many deliveries wait for it, and the state of its circuit.
    pub async fn dead_webhook(&self) -> Result<(i64, String)> {
        let query = "SELECT count(d.event_id), min(t.state) FROM outbox.destinations t
            LEFT JOIN outbox.deliveries d ON d.destination = t.name WHERE t.name = 'dead'";
        let row = self.session.query_one(query, &[]).await?;
        Ok((row.try_get(0)?, row.try_get(1)?))
    }

    /// Something listens at its port again. Returns how long what waited took to arrive, and how much it was.
    pub async fn revive_dead_webhook(&mut self) -> Result<(Duration, usize)> {
        let expected: HashSet<Uuid> = self
            .journal
            .published()
            .into_iter()
            .filter(|(_, kind)| kind.starts_with("order."))
            .map(|(id, _)| id)
            .collect();
        let receiver = Receiver::on(self.dead_port)?;
        let started = Instant::now();
        self.session.execute("SELECT outbox.resume('dead')", &[]).await?;
        let owed = self.session.one::<i64>("SELECT count(*) FROM outbox.deliveries WHERE destination = 'dead'");
        ensure!(owed.await? <= expected.len() as i64, "more waits for the dead webhook than was published");
        let look = async || Ok((self.dead_webhook().await?.0 == 0).then_some(()));
        wait::until("the dead webhook's deliveries", LONG, look).await?;
        let took = started.elapsed();
        let got: HashSet<Uuid> = receiver.received().iter().map(|request| request.event_id()).collect::<Result<_>>()?;
        if !got.is_subset(&expected) {
            bail!("the dead webhook got what it did not ask for");
        }
        self.revived = Some(receiver);
        Ok((took, got.len()))
    }

    /// What every relay, living or dead, said of each step.
    pub fn trace(&self) -> Trace {
        let mut trace = self.past_trace.clone();
        self.relays.iter().for_each(|relay| trace.add(relay));
        trace
    }

    pub async fn statistics(&self, session: &Session) -> Result<Vec<(String, String)>> {
        let query = "SELECT key, value FROM outbox.stats() s, jsonb_each_text(to_jsonb(s))
            WHERE key NOT IN ('worker_pid', 'since')";
        let rows = session.query(query, &[]).await?;
        let order = ["pending", "processing", "processed", "failed", "oldest_pending"];
        let mut all: Vec<(String, String)> = rows
            .iter()
            .map(|row| (row.get(0), row.get::<_, Option<String>>(1).unwrap_or_else(|| "none".into())))
            .collect();
        all.sort_by_key(|(name, _)| {
            (order.iter().position(|known| known == name).unwrap_or(order.len()), name.clone())
        });
        Ok(all)
    }

    /// Ends the relays as an operator would.
    pub async fn close(&mut self) -> Result<()> {
        for relay in self.relays.drain(..) {
            let status = relay.terminate(LONG).await?;
            ensure!(status.success(), "a relay ended with {status} on SIGTERM:\n{}", relay.log());
        }
        Ok(())
    }
}

async fn publish(session: &Session, journal: &Journal, kind: &str, number: usize) -> Result<Uuid> {
    let data = serde_json::json!({ "number": number });
    let sent = now_us();
    let row = session.query_one(PUBLISH, &[&kind, &data, &number.to_string()]).await.context("publish")?;
    let committed = now_us();
    let id = row.try_get(0)?;
    journal.publish(id, kind, sent, committed);
    Ok(id)
}

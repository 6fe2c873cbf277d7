//! The servers of a row: a PostgreSQL as durable as its defaults make it, a quorum queue, relays.

use std::ops::Deref;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lapin::ExchangeKind;
use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::FieldTable;
use outbox_tests::broker::Broker;
use outbox_tests::cluster::Cluster;
use outbox_tests::queue::Channel;
use outbox_tests::relay::Relay;
use outbox_tests::session::Session;
use outbox_tests::wait;

pub const EXCHANGE: &str = "outbox_events";
pub const QUEUE: &str = "bench";

/// For what takes minutes on a slow machine.
const VERY_LONG: Duration = Duration::from_secs(900);

/// A PostgreSQL with one outbox, and a session in it.
pub struct Outbox {
    pub cluster: Cluster,
    pub database: String,
    pub session: Session,
}

impl Outbox {
    /// With fsync, unlike the tests' servers, and settings of its own.
    pub async fn start(settings: &[(&str, &str)]) -> Result<Self> {
        let cluster = Cluster::with(&[&[("fsync", "on")], settings].concat()).await?;
        let database = cluster.database().await?;
        let session = cluster.connect(&database).await?;
        Ok(Outbox { cluster, database, session })
    }

    /// The outbox's table without its triggers, under another name.
    pub async fn create_like(&self, name: &str) -> Result<()> {
        let options = "SELECT array_to_string(reloptions, ', ') FROM pg_class WHERE oid = 'outbox_events'::regclass";
        let options: String = self.session.one(options).await?;
        let create = format!("CREATE TABLE {name} (LIKE outbox_events INCLUDING ALL) WITH ({options})");
        Ok(self.session.batch_execute(&create).await?)
    }

    /// Empties tables and writes everything to disk, so that no turn pays for the one before.
    pub async fn empty(&self, tables: &str) -> Result<()> {
        Ok(self.session.batch_execute(&format!("TRUNCATE {tables}; CHECKPOINT")).await?)
    }

    /// Inserts that many events in one transaction; `aggregate` is SQL that may depend on `n`.
    pub async fn fill(&self, count: usize, bytes: usize, aggregate: &str) -> Result<()> {
        let insert = format!(
            "INSERT INTO outbox_events (event_type, aggregate_type, aggregate_id, event_data)
             SELECT 'bench.filled', 'bench', {aggregate}, {} FROM generate_series(1, {count}) AS n",
            payload_sql(bytes)
        );
        Ok(self.session.batch_execute(&insert).await?)
    }

    /// Waits until nothing is pending or processing. Looks at the counters alone: looking must not cost anything.
    pub async fn settled(&self) -> Result<()> {
        let query = "SELECT pending + processing = 0 FROM outbox._counters()";
        self.session.until(query, VERY_LONG).await
    }
}

/// JSON of that many bytes, as SQL.
pub fn payload_sql(bytes: usize) -> String {
    format!("'{}'::jsonb", payload(bytes))
}

/// JSON of that many bytes.
pub fn payload(bytes: usize) -> String {
    let frame = "{\"data\": \"\"}".len();
    format!("{{\"data\": \"{}\"}}", "x".repeat(bytes.saturating_sub(frame)))
}

/// An outbox, a broker, and one quorum queue that gets every event.
pub struct Stage {
    pub outbox: Outbox,
    pub broker: Broker,
    pub channel: Channel,
}

impl Deref for Stage {
    type Target = Outbox;

    fn deref(&self) -> &Outbox {
        &self.outbox
    }
}

impl Stage {
    pub async fn set() -> Result<Self> {
        Self::with(&[]).await
    }

    /// The same with settings of PostgreSQL.
    pub async fn with(settings: &[(&str, &str)]) -> Result<Self> {
        let (outbox, broker) = tokio::try_join!(Outbox::start(settings), Broker::shared())?;
        let channel = broker.channel().await?;
        let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
        channel.exchange_declare(EXCHANGE.into(), ExchangeKind::Topic, durable, FieldTable::default()).await?;
        outbox.session.execute("SELECT outbox.add_rabbitmq('rabbitmq')", &[]).await?;
        let stage = Stage { outbox, broker, channel };
        stage.new_queue().await?;
        Ok(stage)
    }

    /// The queue anew and empty.
    pub async fn new_queue(&self) -> Result<()> {
        self.channel.queue_delete(QUEUE.into(), QueueDeleteOptions::default()).await?;
        self.channel.declare(QUEUE, &[("x-queue-type", "quorum")]).await?;
        let bind = QueueBindOptions::default();
        let everything =
            self.channel.queue_bind(QUEUE.into(), EXCHANGE.into(), "#".into(), bind, FieldTable::default());
        Ok(everything.await?)
    }

    /// How many messages the queue holds.
    pub async fn queued(&self) -> Result<usize> {
        let look = QueueDeclareOptions { passive: true, ..Default::default() };
        let queue = self.channel.queue_declare(QUEUE.into(), look, FieldTable::default()).await?;
        Ok(queue.message_count() as usize)
    }

    /// An error unless the queue comes to hold at least that many.
    pub async fn arrived(&self, count: usize) -> Result<()> {
        let look = async || {
            let there = self.queued().await?;
            ensure!(there >= count, "it holds {there}");
            Ok(Some(()))
        };
        wait::until(&format!("the queue to hold {count} messages"), wait::LONG, look).await
    }

    pub async fn relay(&self, variables: &[(&str, &str)]) -> Result<Relay> {
        Relay::with(&self.cluster.url(&self.database), Some(&self.broker.url()), variables).await
    }

    /// Starts a relay on what is pending and waits until all of it is settled and in the queue.
    pub async fn drain(&self, count: usize) -> Result<(Duration, Relay)> {
        let started = Instant::now();
        let relay = self.relay(&[]).await?;
        self.settled().await.with_context(|| relay.log())?;
        let took = started.elapsed();
        self.arrived(count).await?;
        let failed: i64 = self.session.one("SELECT failed FROM outbox._counters()").await?;
        ensure!(failed == 0, "{failed} events failed: {}", relay.log());
        Ok((took, relay))
    }

    /// Ends a relay as an operator would.
    pub async fn end(&self, relay: Relay) -> Result<()> {
        let status = relay.terminate(wait::LONG).await?;
        ensure!(status.success(), "the relay ended with {status}: {}", relay.log());
        Ok(())
    }
}

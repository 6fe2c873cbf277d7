//! The servers of a soak, and what all of its tasks share.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use outbox_tests::broker::Broker;
use outbox_tests::cluster::Cluster;
use outbox_tests::relay::Relay;
use outbox_tests::session::Session;
use outbox_tests::trace::now_us;
use outbox_tests::wait::{self, LONG};

use crate::judge::OWN;
use crate::load::Prepared;
use crate::logs::{Cause, Span};
use crate::receiver::Host;
use crate::record::{Fault, Shared, Wanted};
use crate::show::say;
use crate::small::Disk;

pub const RELAYS: usize = 3;
pub const EXCHANGE: &str = "outbox_events";
pub const ACME_EXCHANGE: &str = "acme";

const SETTINGS: [(&str, &str); 2] = [("max_prepared_transactions", "40"), ("log_min_duration_statement", "2s")];

pub struct Stage {
    pub seed: u64,
    pub cluster: Cluster,
    pub database: String,
    /// A database in which the extension comes and goes.
    pub second: String,
    pub broker: Broker,
    /// Where the database's tables are, if a small file system can be had.
    pub disk: Option<Disk>,
    /// Receivers that have outages, and receivers that misbehave.
    pub outages: Host,
    pub rough: Host,
    pub relays: [tokio::sync::Mutex<Option<Relay>>; RELAYS],
    pub record: Shared,
    /// Parts of the server's log that belong to certain faults.
    spans: Mutex<Vec<Span>>,
    pub prepared: Mutex<Vec<Prepared>>,
    /// Aggregates of prepared transactions that are committed.
    pub followed: Mutex<Vec<u32>>,
    /// Somebody wants a strong lock, which prepared transactions would keep from him for long.
    pub no_more_prepared: AtomicBool,
    pub loading: AtomicBool,
    pub storming: AtomicBool,
    pub consuming: AtomicBool,
    transactions: AtomicU64,
}

impl Stage {
    pub async fn set(seed: u64) -> Result<Arc<Self>> {
        let (cluster, broker) = tokio::try_join!(Cluster::with(&SETTINGS), Broker::own())?;
        let disk = Disk::mount()?;
        let (database, second) = (database(&cluster, disk.as_ref()).await?, cluster.database().await?);
        let record = Shared::default();
        let channel = broker.channel().await?;
        channel.bind(EXCHANGE, "#", "all").await?;
        channel.bind(ACME_EXCHANGE, "#", "acme").await?;
        channel.bind("ops", "#", "ops").await?;
        let stage = Stage {
            seed,
            outages: Host::start(record.clone())?,
            rough: Host::start(record.clone())?,
            cluster,
            database,
            second,
            broker,
            disk,
            relays: Default::default(),
            record,
            spans: Mutex::default(),
            prepared: Mutex::default(),
            followed: Mutex::default(),
            no_more_prepared: AtomicBool::default(),
            loading: AtomicBool::default(),
            storming: AtomicBool::default(),
            consuming: AtomicBool::default(),
            transactions: AtomicU64::default(),
        };
        stage.destinations().await?;
        for number in 0..RELAYS {
            stage.start_relay(number).await?.ready().await?;
        }
        Ok(Arc::new(stage))
    }

    /// One attempt is all that those have which only outages befall.
    async fn destinations(&self) -> Result<()> {
        let session = self.session().await?;
        let quick = r#""base": 0.1, "cap": 1"#;
        session
            .batch_execute(&format!(
                r#"CREATE TABLE ledger (transaction bigint PRIMARY KEY);
                   SELECT outbox.add_rabbitmq('mq', '{EXCHANGE}', settings => '{{"max_attempts": 1}}');
                   SELECT outbox.add_rabbitmq('acme', '{ACME_EXCHANGE}', tenant_id => 'acme', settings => '{{"max_attempts": 1}}');
                   SELECT outbox.add_rabbitmq('ops', 'ops', event_types => '{{outbox.event.*,outbox.destination.*}}');
                   SELECT outbox.add_webhook('hook', '{}', settings => '{{"max_attempts": 1}}');
                   SELECT outbox.add_webhook('rough', '{}', '{{contact.*}}', settings => '{{"max_attempts": 4, "timeout": 2, {quick}}}');
                   SELECT outbox.add_webhook('{OWN}', 'http://127.0.0.1:9/', '{{order.*}}', settings => '{{"max_attempts": 8, {quick}}}')"#,
                self.outages.url("hook"),
                self.rough.url("rough"),
            ))
            .await?;
        for (name, types, tenant, only_outages) in [
            ("mq", "", None, true),
            ("acme", "", Some("acme"), true),
            ("hook", "", None, true),
            ("rough", "contact.", None, false),
            (OWN, "order.", None, false),
        ] {
            let wanted = Wanted { types, tenant, since: 0, removed: false, only_outages };
            self.record.lock().destinations.insert(name.to_owned(), wanted);
        }
        Ok(())
    }

    /// Starts a relay in that place and does not wait.
    pub async fn start_relay(&self, number: usize) -> Result<tokio::sync::MappedMutexGuard<'_, Relay>> {
        let mut place = self.relays[number].lock().await;
        // A short lease in one of them, so that a stop outlasts it.
        let lease = if number == 0 { "5" } else { "60" };
        let variables = [("OUTBOX_LEASE", lease), ("OUTBOX_DESTINATIONS", "mq,acme,ops,hook,rough,churn*")];
        *place = Some(Relay::spawn(&self.url(), Some(&self.broker.url()), &variables)?);
        tokio::sync::MutexGuard::try_map(place, Option::as_mut).ok().context("no relay")
    }

    pub fn url(&self) -> String {
        self.cluster.url(&self.database)
    }

    /// A session, as soon as the server takes one.
    pub async fn session(&self) -> Result<Session> {
        wait::until("a session", LONG, async || Ok(Some(Session::open(&self.url()).await?))).await
    }

    /// Runs SQL that may be repeated until it succeeds, whatever happens to the server.
    pub async fn insist(&self, sql: &str) -> Result<()> {
        let look = async || {
            let session = Session::open(&self.url()).await?;
            session.batch_execute(sql).await?;
            Ok(Some(()))
        };
        wait::until(sql, LONG, look).await
    }

    /// Does something while no transaction is prepared, as well as that can be had.
    pub async fn without_prepared<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        self.no_more_prepared.store(true, Ordering::Relaxed);
        let none = async || Ok(self.prepared.lock().is_ok_and(|all| all.is_empty()).then_some(()));
        let _in_vain = wait::until("the last prepared transaction", Duration::from_secs(8), none).await;
        let done = work.await;
        self.no_more_prepared.store(false, Ordering::Relaxed);
        done
    }

    pub fn next_transaction(&self) -> u64 {
        self.transactions.fetch_add(1, Ordering::Relaxed) + 1
    }

    pub fn is_loading(&self) -> bool {
        self.loading.load(Ordering::Relaxed)
    }

    pub fn is_storming(&self) -> bool {
        self.storming.load(Ordering::Relaxed)
    }

    pub fn is_consuming(&self) -> bool {
        self.consuming.load(Ordering::Relaxed)
    }

    /// Sleeps, but not longer than the storm lasts.
    pub async fn pause(&self, time: Duration) {
        let end = tokio::time::Instant::now() + time;
        while self.is_storming() && tokio::time::Instant::now() < end {
            let left = end.saturating_duration_since(tokio::time::Instant::now());
            tokio::time::sleep(left.min(Duration::from_millis(100))).await;
        }
    }

    /// Notes the beginning of a fault, and returns its place in the timeline.
    pub fn fault(&self, what: impl Into<String>) -> usize {
        let what = what.into();
        say(&what);
        let mut record = self.record.lock();
        record.faults.push(Fault { what, begin: now_us(), end: None });
        record.faults.len() - 1
    }

    /// Does something during which the server may say what this cause explains, and shortly after.
    pub async fn explained<T>(&self, cause: Cause, work: impl Future<Output = Result<T>>) -> Result<T> {
        let from = self.cluster.log().len();
        let spans = || self.spans.lock().unwrap_or_else(PoisonError::into_inner);
        let place = {
            let mut spans = spans();
            spans.push(Span { cause, part: from..usize::MAX });
            spans.len() - 1
        };
        let done = work.await;
        // Whoever met the fault may still be about to say so.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let to = self.cluster.log().len();
        if let Some(span) = spans().get_mut(place) {
            span.part.end = to;
        }
        done
    }

    /// What explains a line of the server's log, by its offset.
    pub fn causes_at(&self, offset: usize) -> Vec<Cause> {
        let spans = self.spans.lock().unwrap_or_else(PoisonError::into_inner);
        spans.iter().filter(|span| span.part.contains(&offset)).map(|span| span.cause).collect()
    }

    pub fn healed(&self, fault: usize) {
        if let Some(fault) = self.record.lock().faults.get_mut(fault) {
            fault.end = Some(now_us());
        }
    }
}

async fn database(cluster: &Cluster, disk: Option<&Disk>) -> Result<String> {
    let Some(disk) = disk else { return cluster.database().await };
    let postgres = cluster.connect("postgres").await?;
    postgres.batch_execute(&format!("CREATE TABLESPACE small LOCATION '{}'", disk.path().display())).await?;
    postgres.batch_execute("CREATE DATABASE soak TABLESPACE small").await?;
    let session = cluster.connect("soak").await?;
    session.batch_execute("CREATE EXTENSION pg_outbox").await?;
    session.until("SELECT worker_pid IS NOT NULL FROM outbox.stats()", LONG).await?;
    Ok("soak".into())
}

//! Sessions that publish: single events, many, savepoints, rollbacks, errors, prepared transactions, scheduled events.

pub mod consumer;
pub mod prepared;

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use outbox_tests::session::Session;
use outbox_tests::trace::{Micros, now_us};
use uuid::Uuid;

pub use prepared::Prepared;

use crate::random::Random;
use crate::record::{Event, Fate, Transaction};
use crate::stage::Stage;
use crate::trouble::{Trouble, connected};

const KINDS: [&str; 4] = ["order.created", "order.paid", "contact.created", "contact.updated"];
const TENANTS: [Option<&str>; 4] = [None, None, Some("acme"), Some("globex")];

/// Aggregates that a publisher comes back to; each has one publisher, so that its ids are committed in order.
const AGGREGATES: u64 = 8;

/// The numbers of a publisher's aggregates begin at its own number times this.
const OF_ONE: u32 = 1_000_000;

/// Prepared transactions at a time; each holds locks.
const MOST_PREPARED: usize = 12;

pub struct Publisher {
    stage: Arc<Stage>,
    random: Random,
    number: u32,
    /// Aggregates that are used once.
    once: u32,
    /// Nothing but plain commits.
    plain: bool,
}

/// What an event is published with.
struct Draft {
    event: Uuid,
    kind: &'static str,
    tenant: Option<&'static str>,
    aggregate: Option<u32>,
    due: Option<Micros>,
}

impl Publisher {
    pub fn new(stage: Arc<Stage>, round: u64, number: u32, plain: bool) -> Self {
        let random = Random::stream(stage.seed, round * 1000 + u64::from(number));
        Publisher { stage, random, number, once: 0, plain }
    }

    pub async fn publish(mut self) {
        let url = self.stage.url();
        let mut session = None;
        while self.stage.is_loading() {
            let Some(open) = session.take() else {
                session = connected(&url).await;
                continue;
            };
            let transaction = self.stage.next_transaction();
            let began = Transaction { fate: Fate::Open, began: now_us() };
            self.stage.record.lock().transactions.insert(transaction, began);
            match self.transaction(&open, transaction).await {
                Ok(fate) => {
                    self.stage.record.set_fate(transaction, fate);
                    session = Some(open);
                }
                Err(trouble) => {
                    if let Trouble::Strange(what) = &trouble {
                        self.stage.record.complain(format!("transaction {transaction}: {what}"));
                    }
                    // A commit on its way is Unknown already; before it nothing can have been committed.
                    let mut record = self.stage.record.lock();
                    if let Some(it) = record.transactions.get_mut(&transaction).filter(|it| it.fate == Fate::Open) {
                        it.fate = Fate::RolledBack;
                    }
                }
            }
            tokio::time::sleep(self.random.millis(30, 500)).await;
        }
    }

    async fn transaction(&mut self, session: &Session, number: u64) -> Result<Fate, Trouble> {
        let chance = if self.plain { self.random.below(60) } else { self.random.below(100) };
        if (90..96).contains(&chance) && self.may_prepare() {
            return self.prepare(session, number).await;
        }
        session.batch_execute(&format!("BEGIN; INSERT INTO ledger VALUES ({number})")).await?;
        match chance {
            0..45 => self.insert(session, number, 1, false).await?,
            45..55 => {
                let count = 2 + self.random.below(5);
                self.insert(session, number, count, false).await?;
            }
            55..60 => {
                let count = 20 + self.random.below(if self.plain { 20 } else { 80 });
                self.insert(session, number, count, false).await?;
            }
            60..72 => self.savepoints(session, number).await?,
            72..84 => self.schedule(session, number).await?,
            _ => {
                self.insert(session, number, 2, false).await?;
                return Self::roll_back(session, chance % 2 == 0).await;
            }
        }
        if self.random.percent(10) {
            tokio::time::sleep(self.random.millis(5, 200)).await;
        }
        self.stage.record.set_fate(number, Fate::Unknown);
        session.batch_execute("COMMIT").await?;
        Ok(Fate::Committed)
    }

    /// By the application, or by an error of its own.
    async fn roll_back(session: &Session, by_error: bool) -> Result<Fate, Trouble> {
        if by_error {
            match session.batch_execute("SELECT 1 / 0").await.map_err(Trouble::from) {
                Err(Trouble::Strange(what)) if what.starts_with("22012") => {}
                Err(trouble) => return Err(trouble),
                Ok(()) => return Err(Trouble::Strange("1 / 0 gave a result".into())),
            }
        }
        session.batch_execute("ROLLBACK").await?;
        Ok(Fate::RolledBack)
    }

    async fn savepoints(&mut self, session: &Session, number: u64) -> Result<(), Trouble> {
        self.insert(session, number, 1, false).await?;
        for _ in 0..=self.random.below(3) {
            let undone = self.random.percent(50);
            session.batch_execute("SAVEPOINT s").await?;
            let count = 1 + self.random.below(3);
            self.insert(session, number, count, undone).await?;
            session.batch_execute(if undone { "ROLLBACK TO SAVEPOINT s" } else { "RELEASE SAVEPOINT s" }).await?;
        }
        self.insert(session, number, 1, false).await
    }

    async fn schedule(&mut self, session: &Session, number: u64) -> Result<(), Trouble> {
        let due = now_us() + 1_000_000 + 1000 * self.random.below(7_000) as i64;
        let drafts = (0..=self.random.below(3)).map(|_| Draft { due: Some(due), ..self.draft() }).collect();
        self.write(session, number, drafts, false).await
    }

    async fn prepare(&mut self, session: &Session, number: u64) -> Result<Fate, Trouble> {
        session.batch_execute(&format!("BEGIN; INSERT INTO ledger VALUES ({number})")).await?;
        // Committed later than those with higher ids: aggregates that nobody else uses before.
        let (mut drafts, aggregate) = (Vec::new(), self.fresh_aggregate());
        for _ in 0..=self.random.below(3) {
            drafts.push(Draft { aggregate: Some(aggregate), ..self.draft() });
        }
        self.write(session, number, drafts, false).await?;
        let prepared = Prepared {
            transaction: number,
            aggregate,
            due: now_us() + self.random.millis(0, 6_000).as_micros() as i64,
            commit: self.random.percent(70),
        };
        self.stage.record.set_fate(number, Fate::Unknown);
        let name = prepared.name();
        self.stage.prepared.lock().unwrap_or_else(PoisonError::into_inner).push(prepared);
        session.batch_execute(&format!("PREPARE TRANSACTION '{name}'")).await?;
        Ok(Fate::Unknown)
    }

    fn may_prepare(&self) -> bool {
        let waiting = self.stage.prepared.lock().unwrap_or_else(PoisonError::into_inner).len();
        waiting < MOST_PREPARED && !self.stage.no_more_prepared.load(Ordering::Relaxed)
    }

    fn fresh_aggregate(&mut self) -> u32 {
        self.once += 1;
        self.number * OF_ONE + 1000 + self.once
    }

    /// An aggregate of this publisher whose prepared transaction is committed: what follows comes after it.
    fn followed(&self) -> Option<u32> {
        let mut followed = self.stage.followed.lock().unwrap_or_else(PoisonError::into_inner);
        let own = followed.iter().position(|aggregate| aggregate / OF_ONE == self.number)?;
        Some(followed.swap_remove(own))
    }

    fn draft(&mut self) -> Draft {
        let drawn = match self.random.below(5) {
            0 => None,
            1 => Some(self.fresh_aggregate()),
            _ => Some(self.number * OF_ONE + self.random.below(AGGREGATES) as u32),
        };
        let aggregate = self.followed().or(drawn);
        Draft {
            event: self.random.uuid(),
            kind: self.random.one_of(&KINDS).copied().unwrap_or(KINDS[0]),
            tenant: self.random.one_of(&TENANTS).copied().flatten(),
            aggregate,
            due: None,
        }
    }

    async fn insert(&mut self, session: &Session, number: u64, count: u64, undone: bool) -> Result<(), Trouble> {
        let drafts = (0..count).map(|_| self.draft()).collect();
        self.write(session, number, drafts, undone).await
    }

    /// Inserts events and puts them down, before they can be committed.
    async fn write(&mut self, session: &Session, number: u64, drafts: Vec<Draft>, undone: bool) -> Result<(), Trouble> {
        let insert = "INSERT INTO outbox_events (event_id, event_type, tenant_id, aggregate_type, aggregate_id, available_at, event_data)
            SELECT e, k, t, 'soak', a, 'epoch'::timestamptz + d * interval '1 microsecond', jsonb_build_object('n', n, 'filler', repeat('x', $6))
              FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::bigint[]) WITH ORDINALITY AS u (e, k, t, a, d, n)
             ORDER BY n RETURNING id, event_id";
        let uuids: Vec<Uuid> = drafts.iter().map(|draft| draft.event).collect();
        let kinds: Vec<&str> = drafts.iter().map(|draft| draft.kind).collect();
        let tenants: Vec<Option<&str>> = drafts.iter().map(|draft| draft.tenant).collect();
        let aggregates: Vec<Option<String>> =
            drafts.iter().map(|draft| draft.aggregate.map(|a| a.to_string())).collect();
        let dues: Vec<Option<i64>> = drafts.iter().map(|draft| draft.due).collect();
        let size = if self.random.percent(2) { 20_000 } else { self.random.below(200) as i32 };
        let rows = session.query(insert, &[&uuids, &kinds, &tenants, &aggregates, &dues, &size]).await?;
        if rows.len() != drafts.len() {
            return Err(Trouble::Strange(format!("{} rows were inserted for {} events", rows.len(), drafts.len())));
        }
        let mut record = self.stage.record.lock();
        for (row, draft) in rows.iter().zip(drafts) {
            let Draft { event, kind, tenant, aggregate, due } = draft;
            if row.get::<_, Uuid>(1) != event {
                return Err(Trouble::Strange("the rows came back in another order".into()));
            }
            let event_of = Event { id: row.get(0), transaction: number, kind, tenant, aggregate, due, undone };
            record.events.insert(event, event_of);
        }
        Ok(())
    }
}

/// How long the calm load goes on.
pub const CALM: Duration = Duration::from_secs(4);

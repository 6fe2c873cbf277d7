//! Inserts at a steady rate from many sessions of this program, each event's moment noted.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use outbox_tests::session::Session;
use outbox_tests::trace::{Micros, now_us};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tokio_postgres::Statement;
use uuid::Uuid;

use crate::stage::{Outbox, payload_sql};

pub struct Sent {
    pub event_id: Uuid,
    /// Just before the INSERT, which commits by itself, was sent.
    pub at: Micros,
    /// The server's answer was there.
    pub committed: Micros,
}

/// Inserts one event a transaction, with types of its own, also as tenants, so that destinations can be told apart.
pub struct Producer {
    session: Session,
    insert: Statement,
}

impl Producer {
    pub async fn new(outbox: &Outbox, table: &str) -> Result<Self> {
        let session = outbox.cluster.connect(&outbox.database).await?;
        let insert = format!(
            "INSERT INTO {table} (event_type, aggregate_type, tenant_id, event_data) VALUES ($1, 'bench', $1, {}) RETURNING event_id",
            payload_sql(200)
        );
        let insert = session.prepare(&insert).await?;
        Ok(Producer { session, insert })
    }

    pub async fn insert(&self, event_type: &str) -> Result<Sent> {
        let at = now_us();
        let row = self.session.query_one(&self.insert, &[&event_type]).await?;
        Ok(Sent { event_id: row.try_get(0)?, at, committed: now_us() })
    }
}

/// What was sent, in order, and how many a second it was.
pub struct Run {
    pub sent: Vec<Sent>,
    pub rate: f64,
}

impl Run {
    /// An error if less than nine tenths of the rate were reached.
    pub fn at_least(self, rate: usize) -> Result<Self> {
        let reached = self.rate;
        ensure!(reached > 0.9 * rate as f64, "{reached:.0} inserts/s instead of {rate}: the machine is too busy");
        Ok(self)
    }
}

/// Inserts `rate` events a second for some time, or as many as can be, in turns of the types.
pub async fn paced(producers: Vec<Producer>, types: &[String], rate: usize, time: Duration) -> Result<Run> {
    let pause = Duration::from_secs_f64(producers.len() as f64 / rate as f64);
    let (started, sessions) = (Instant::now(), producers.len() as u32);
    let types: Arc<[String]> = types.into();
    let mut tasks = JoinSet::new();
    for (number, producer) in (0..).zip(producers) {
        let types = types.clone();
        tasks.spawn(async move {
            let mut next = started + pause * number / sessions;
            let mut sent = Vec::new();
            while started.elapsed() < time {
                sleep_until(next).await;
                let turn = sent.len() * sessions as usize + number as usize;
                sent.push(producer.insert(&types[turn % types.len()]).await?);
                next += pause;
            }
            anyhow::Ok(sent)
        });
    }
    let mut sent = Vec::new();
    while let Some(session) = tasks.join_next().await {
        sent.extend(session??);
    }
    sent.sort_by_key(|sent| sent.at);
    let rate = sent.len() as f64 / started.elapsed().as_secs_f64();
    Ok(Run { sent, rate })
}

/// So many producers.
pub async fn producers(outbox: &Outbox, table: &str, count: usize) -> Result<Vec<Producer>> {
    let mut all = Vec::with_capacity(count);
    for _ in 0..count {
        all.push(Producer::new(outbox, table).await?);
    }
    Ok(all)
}

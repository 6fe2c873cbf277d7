//! All SQL of the relay. Every call is one of the extension's functions; the relay touches no table.
//!
//! Two sessions: the first listens, is attached and claims, so that its end, however it comes, gives back what it claimed;
//! the second settles, so that neither waits for the other's answers.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use futures_util::TryStreamExt;
use serde::Serialize;
use tokio_postgres::types::{FromSql, Json, ToSql, Type};
use tokio_postgres::{Client, Row, Statement};
use uuid::Uuid;

use crate::destination::{Event, Object, Spec};
use crate::error::Result;

const CLAIM: &str = "SELECT id, event_id, event_type, event_version, aggregate_type, aggregate_id, tenant_id, \
     event_data, metadata, created_at, retry_count, destinations, claim_token \
     FROM outbox.claim($1::int, $2::text[], $3::float8 * interval '1 second')";
const ATTEMPTS: &str = "SELECT id, destination, attempts FROM outbox.claimed_attempts($1)";
const SETTLE: &str = "SELECT latencies FROM outbox.settle($1::bigint[], $2::bigint[], $3::jsonb)";
const RENEW: &str = "SELECT t FROM unnest($1::bigint[]) AS t \
     WHERE outbox.renew(ARRAY[t], $2::float8 * interval '1 second') > 0";
const DESTINATIONS: &str = "SELECT name, kind, exchange, routing_key, url, settings, secrets, max_attempts \
     FROM outbox.relay_destinations()";
const STATS: &str = "SELECT pending, processing, failed, \
     extract(epoch FROM oldest_pending)::float8 FROM outbox.stats()";

/// One event of a claim, before it is given to its destinations.
pub struct Claimed {
    pub token: i64,
    pub id: i64,
    pub event_id: Uuid,
    pub created_at: SystemTime,
    pub destinations: Vec<String>,
    /// Attempts that failed so far, of the destinations that have any.
    pub attempts: HashMap<String, u32>,
    /// The most attempts that failed at one destination.
    retries: i32,
    /// Bytes of payload and metadata.
    pub size: usize,
    /// `None`: the claim brought more bytes than were asked for, and this one was let go.
    pub event: Option<Event>,
}

/// A delivery that did not simply go well everywhere, in the words of `outbox.settle`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Exception {
    pub token: i64,
    pub id: i64,
    pub destination: std::sync::Arc<str>,
    pub outcome: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_in: Option<f64>,
}

/// What `outbox.stats()` says, as far as the metrics show it.
pub struct Stats {
    pub pending: i64,
    pub processing: i64,
    pub failed: i64,
    pub oldest_pending: Option<f64>,
}

pub struct Store {
    claims: Client,
    settles: Client,
    claim: Statement,
    settle: Statement,
    renew: Statement,
    stats: Statement,
    /// The server can store any character.
    utf8: bool,
}

impl Store {
    /// Listens, attaches and prepares, in this order: what is committed from now on is heard of.
    pub async fn open(claims: Client, settles: Client, consumer: &str, utf8: bool) -> Result<Self> {
        claims.batch_execute("SET synchronous_commit = off; LISTEN outbox_events; LISTEN outbox_destinations").await?;
        settles.batch_execute("SET synchronous_commit = off").await?;
        claims.execute("SELECT outbox.attach($1)", &[&consumer]).await?;
        let claim = claims.prepare(CLAIM).await?;
        let settle = settles.prepare(SETTLE).await?;
        let renew = settles.prepare(RENEW).await?;
        let stats = settles.prepare(STATS).await?;
        Ok(Store { claims, settles, claim, settle, renew, stats, utf8 })
    }

    /// Claims up to `count` events and keeps the payloads of the first `bytes` of them, of one at least.
    pub async fn claim(
        &self,
        count: usize,
        destinations: &[String],
        lease: Duration,
        bytes: usize,
    ) -> Result<Vec<Claimed>> {
        let count = i32::try_from(count).unwrap_or(i32::MAX);
        let lease = lease.as_secs_f64();
        let parameters: [&(dyn ToSql + Sync); 3] = [&count, &destinations, &lease];
        let rows = self.claims.query_raw(&self.claim, parameters).await?;
        let mut rows = std::pin::pin!(rows);
        let mut claimed = Vec::new();
        let mut taken = 0;
        while let Some(row) = rows.try_next().await? {
            let one = read_claimed(&row, taken < bytes)?;
            taken += one.size;
            claimed.push(one);
        }
        if let Some(retried) = claimed.iter().find(|one| one.retries > 0) {
            let attempts = self.claims.query(ATTEMPTS, &[&retried.token]).await?;
            add_attempts(&mut claimed, &attempts)?;
        }
        Ok(claimed)
    }

    /// Settles many events at once. Returns, of each that is processed now, the seconds since it could be delivered.
    pub async fn settle(&self, tokens: &[i64], ids: &[i64], exceptions: &[Exception]) -> Result<Vec<f64>> {
        let exceptions: Vec<Exception> = exceptions.iter().map(|e| self.storable(e)).collect();
        let row = self.settles.query_one(&self.settle, &[&tokens, &ids, &Json(&exceptions)]).await?;
        Ok(row.try_get(0)?)
    }

    /// Starts the leases of these claims anew; those that were still open.
    pub async fn renew(&self, tokens: &[i64], lease: Duration) -> Result<Vec<i64>> {
        let rows = self.settles.query(&self.renew, &[&tokens, &lease.as_secs_f64()]).await?;
        rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
    }

    /// Gives back all that these claims still hold.
    pub async fn release(&self, tokens: &[i64]) -> Result<()> {
        self.settles.query("SELECT outbox.release(t) FROM unnest($1::bigint[]) AS t", &[&tokens]).await?;
        Ok(())
    }

    /// This relay can't serve these destinations, and why.
    pub async fn destinations_unable(&self, names: &[String], error: &str) -> Result<()> {
        let error = self.storable_text(error);
        self.settles.query_one("SELECT outbox.destination_unable($1, $2)", &[&names, &error]).await?;
        Ok(())
    }

    /// This relay's connection to these destinations stands again.
    pub async fn destinations_back(&self, names: &[String]) -> Result<()> {
        self.settles.query_one("SELECT outbox.destination_back($1)", &[&names]).await?;
        Ok(())
    }

    pub async fn destinations(&self) -> Result<Vec<Spec>> {
        destinations(&self.settles).await
    }

    pub async fn webhook_allow_networks(&self) -> Result<String> {
        webhook_allow_networks(&self.settles).await
    }

    pub async fn stats(&self) -> Result<Stats> {
        let row = self.settles.query_one(&self.stats, &[]).await?;
        Ok(Stats {
            pending: row.try_get(0)?,
            processing: row.try_get(1)?,
            failed: row.try_get(2)?,
            oldest_pending: row.try_get(3)?,
        })
    }

    /// jsonb has no NUL, and a database that is not UTF-8 has no place for every character.
    fn storable(&self, exception: &Exception) -> Exception {
        let error = exception.error.as_deref().map(|error| self.storable_text(error));
        Exception { error, ..exception.clone() }
    }

    fn storable_text(&self, text: &str) -> String {
        let kept = text.chars().take(2000);
        kept.map(|c| if c == '\0' || !(self.utf8 || c.is_ascii()) { '?' } else { c }).collect()
    }
}

pub async fn destinations(client: &Client) -> Result<Vec<Spec>> {
    let rows = client.query(DESTINATIONS, &[]).await?;
    rows.iter().map(read_destination).collect()
}

pub async fn webhook_allow_networks(client: &Client) -> Result<String> {
    let row = client.query_one("SELECT outbox.webhook_allow_networks()", &[]).await?;
    Ok(row.try_get::<_, Option<String>>(0)?.unwrap_or_default())
}

fn read_destination(row: &Row) -> Result<Spec> {
    Ok(Spec {
        name: row.try_get(0)?,
        kind: row.try_get(1)?,
        exchange: row.try_get(2)?,
        routing_key: row.try_get(3)?,
        url: row.try_get(4)?,
        settings: row.try_get::<_, Option<JsonText<'_>>>(5)?.map(|text| text.0.to_owned()).unwrap_or_default(),
        secrets: row.try_get::<_, Option<_>>(6)?.unwrap_or_default(),
        max_attempts: row.try_get(7)?,
    })
}

fn read_claimed(row: &Row, keep: bool) -> Result<Claimed> {
    let data: JsonText<'_> = row.try_get(7)?;
    let metadata: JsonText<'_> = row.try_get(8)?;
    let mut claimed = Claimed {
        token: row.try_get(12)?,
        id: row.try_get(0)?,
        event_id: row.try_get(1)?,
        created_at: row.try_get(9)?,
        destinations: row.try_get(11)?,
        attempts: HashMap::new(),
        retries: row.try_get(10)?,
        size: data.0.len() + metadata.0.len(),
        event: None,
    };
    if keep {
        claimed.event = Some(read_event(row, &claimed, data, metadata)?);
    }
    Ok(claimed)
}

fn read_event(row: &Row, claimed: &Claimed, data: JsonText<'_>, metadata: JsonText<'_>) -> Result<Event> {
    Ok(Event {
        event_id: claimed.event_id,
        event_type: row.try_get(2)?,
        event_version: row.try_get(3)?,
        aggregate_type: row.try_get(4)?,
        aggregate_id: row.try_get(5)?,
        tenant_id: row.try_get(6)?,
        event_data: data.0.to_owned().into(),
        metadata: Object::new(metadata.0),
        created_at: claimed.created_at,
    })
}

fn add_attempts(claimed: &mut [Claimed], rows: &[Row]) -> Result<()> {
    let mut by_id: HashMap<i64, &mut Claimed> = claimed.iter_mut().map(|one| (one.id, one)).collect();
    for row in rows {
        if let Some(one) = by_id.get_mut(&row.try_get(0)?) {
            one.attempts.insert(row.try_get(1)?, u32::try_from(row.try_get::<_, i32>(2)?).unwrap_or(0));
        }
    }
    Ok(())
}

/// A json or jsonb value as its text, unparsed.
struct JsonText<'a>(&'a str);

impl<'a> FromSql<'a> for JsonText<'a> {
    fn from_sql(ty: &Type, raw: &'a [u8]) -> std::result::Result<Self, Box<dyn std::error::Error + Sync + Send>> {
        let text = match raw {
            [1, text @ ..] if *ty == Type::JSONB => text,
            _ if *ty == Type::JSONB => return Err("unknown version of jsonb".into()),
            text => text,
        };
        Ok(JsonText(std::str::from_utf8(text)?))
    }

    fn accepts(ty: &Type) -> bool {
        matches!(*ty, Type::JSON | Type::JSONB)
    }
}

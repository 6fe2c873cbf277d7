//! What the relay asks of the extension: every call is one of its functions, and no table of the outbox is touched. What
//! connecting and `check` ask of PostgreSQL itself is theirs.
//!
//! Two sessions: the first listens, is attached and claims, so that its end, however it comes, gives back what it claimed;
//! the second settles, so that neither waits for the other's answers. A call that is given up is cancelled in the server.

mod dialect;
mod rows;

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use futures_util::TryStreamExt;
use serde::{Deserialize, Serialize};
use tokio::sync::{Mutex, mpsc::UnboundedReceiver};
use tokio::time::timeout;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{Json, ToSql};
use tokio_postgres::{Client, Notification, Statement};
use uuid::Uuid;

use self::dialect::Dialect;
use crate::dead_letters::DeadLetter;
use crate::destination::{Event, Spec};
use crate::directory::Which;
use crate::error::{Error, Result};
use crate::postgres::{Cancel, POOLED, Pair};

const SETTLE: &str = "SELECT latencies, dead FROM outbox.settle($1::bigint[], $2::bigint[], $3::jsonb)";
const RENEW: &str = "SELECT t FROM unnest($1::bigint[]) AS t \
     WHERE outbox.renew(ARRAY[t], $2::float8 * interval '1 second') > 0";
const DESTINATIONS: &str = "SELECT name, kind, exchange, routing_key, url, settings::text, secrets, max_attempts \
     FROM outbox.relay_destinations($1::text[]) WITH ORDINALITY";
const DISABLED: &str = "SELECT name, coalesce(last_error, '') FROM outbox.destinations WHERE name = ANY ($1::text[]) AND state = 'disabled'";
const FIGURES: &str = "SELECT outbox.metrics($1::text[], $2::int)";

/// Of `outbox.claim_for` and `outbox.claim_refs_for`.
type Parameters<'a> = [&'a (dyn ToSql + Sync); 6];

/// How long a notification may take from one session to the other.
const HEARING: Duration = Duration::from_secs(10);

/// One event of a claim, before it is given to its destinations.
pub struct Claimed {
    pub token: i64,
    pub id: i64,
    pub event_id: Uuid,
    pub destinations: Vec<String>,
    /// Attempts that failed so far, of the destinations that have any.
    pub attempts: HashMap<String, u32>,
    /// The most attempts that failed at one destination.
    retries: i32,
    /// Bytes of payload and metadata.
    pub size: usize,
    pub event: std::result::Result<Event, Unread>,
}

/// For whom a claim is.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    /// Not for these destinations.
    pub passed: Vec<Arc<str>>,
    /// For the RabbitMQ destinations of these brokers.
    pub brokers: Vec<Arc<str>>,
    /// For these destinations alone.
    pub only: Option<Vec<Arc<str>>>,
}

/// Why an event of a claim has nothing to deliver.
#[derive(Debug)]
pub enum Unread {
    /// The claim brought more bytes than were asked for, and this one was let go.
    NoRoom,
    /// Nobody can be given what it holds; the text says why.
    Unreadable(String),
}

/// A delivery that did not simply go well everywhere, in the words of `outbox.settle`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Exception {
    pub token: i64,
    pub id: i64,
    pub destination: Arc<str>,
    pub outcome: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_in: Option<f64>,
}

/// What `outbox.metrics()` says.
#[derive(Debug, Default, Deserialize)]
pub struct Figures {
    pub pending: i64,
    pub processing: i64,
    pub failed: i64,
    pub oldest_pending_s: Option<f64>,
    pub deliverable_s: Option<f64>,
    pub vacuum: Vacuum,
    pub destinations: Vec<OfDestination>,
}

/// Who holds back vacuum.
#[derive(Debug, Default, Deserialize)]
pub struct Vacuum {
    pub held_back: bool,
    /// Age of the oldest transaction.
    pub transaction_s: Option<f64>,
}

/// The figures of one destination, or of all in one state that have no name here.
#[derive(Debug, Default, Deserialize)]
pub struct OfDestination {
    pub name: Option<String>,
    pub state: String,
    pub destinations: i64,
    pub waiting: i64,
    pub dead: i64,
    pub oldest_s: Option<f64>,
}

pub struct Store {
    claims: Side,
    settles: Side,
    claim: Statement,
    settle: Statement,
    renew: Statement,
    figures: Statement,
    dialect: Dialect,
    /// LIKE patterns of the destinations that this relay serves.
    patterns: Option<Vec<String>>,
    /// Held while the figures are asked for.
    asking: Arc<Mutex<()>>,
}

/// A session, and how to cancel what it does.
struct Side {
    client: Client,
    cancel: Cancel,
}

impl Side {
    /// Does the work; if it is dropped before it is done, it ends in the server too.
    async fn on<T>(&self, work: impl Future<Output = T>) -> T {
        let mut unfinished = Unfinished(Some(&self.cancel));
        let done = work.await;
        unfinished.0 = None;
        done
    }
}

struct Unfinished<'a>(Option<&'a Cancel>);

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if let Some(cancel) = self.0 {
            cancel.spawn();
        }
    }
}

impl Store {
    /// Listens, attaches and prepares, in this order: what is committed from now on is heard of. The tasks of the two
    /// connections are handed back.
    pub async fn open(
        pair: Pair,
        consumer: &str,
        patterns: Option<Vec<String>>,
        notifications: &mut UnboundedReceiver<Notification>,
    ) -> Result<(Self, crate::postgres::Driver, crate::postgres::Driver)> {
        let dialect = Dialect { utf8: pair.claims.utf8 };
        let claims = Side { client: pair.claims.client, cancel: pair.claims.cancel };
        let settles = Side { client: pair.settles.client, cancel: pair.settles.cancel };
        fitting_version(&claims.client).await?;
        claims.client.batch_execute("LISTEN outbox_events; LISTEN outbox_destinations").await?;
        hears(&claims.client, &settles.client, notifications).await?;
        let name: &(dyn ToSql + Sync) = if dialect.utf8 { &consumer } else { &consumer.as_bytes() };
        claims.client.execute(&dialect.attach(), &[name]).await?;
        let store = Store {
            claim: claims.client.prepare(&dialect.claim()).await?,
            settle: settles.client.prepare(SETTLE).await?,
            renew: settles.client.prepare(RENEW).await?,
            figures: settles.client.prepare(FIGURES).await?,
            claims,
            settles,
            dialect,
            patterns,
            asking: Arc::default(),
        };
        Ok((store, pair.claims.driver, pair.settles.driver))
    }

    /// Claims up to `count` events and keeps the payloads of the first `bytes` of them, of one at least. When the server
    /// can't hand out what one of them holds, that one is found, and the others are claimed. A server that says nothing for
    /// so long (`silence`) is given up.
    pub async fn claim(
        &self,
        count: usize,
        wanted: &Wanted,
        lease: Duration,
        bytes: usize,
        silence: Duration,
    ) -> Result<Vec<Claimed>> {
        let count = i32::try_from(count).unwrap_or(i32::MAX);
        let lease = lease.as_secs_f64();
        let texts = |names: &[Arc<str>]| names.iter().map(|name| name.to_string()).collect::<Vec<String>>();
        let (passed, brokers) = (texts(&wanted.passed), texts(&wanted.brokers));
        let only = wanted.only.as_deref().map(texts);
        let parameters: Parameters<'_> = [&count, &lease, &passed, &self.patterns, &brokers, &only];
        let mut claimed = match self.claims.on(self.claim_whole(&parameters, bytes, silence)).await {
            Err(error) if is_about_a_value(&error) => {
                tracing::warn!(%error, "an event can't be handed out; looking for it, one by one");
                self.claims.on(self.claim_one_by_one(&parameters, bytes, silence)).await?
            }
            claimed => claimed?,
        };
        if let Some(retried) = claimed.iter().find(|one| one.retries > 0) {
            let token = retried.token;
            let attempts = self.dialect.attempts();
            let attempts = self.claims.on(within(silence, self.claims.client.query(&attempts, &[&token]))).await?;
            rows::add_attempts(&mut claimed, &attempts)?;
        }
        Ok(claimed)
    }

    async fn claim_whole(&self, parameters: &Parameters<'_>, bytes: usize, silence: Duration) -> Result<Vec<Claimed>> {
        let asking = self.claims.client.query_raw(&self.claim, parameters.iter().copied());
        let mut found = std::pin::pin!(within(silence, asking).await?);
        let (mut claimed, mut taken) = (Vec::new(), 0);
        while let Some(row) = within(silence, found.try_next()).await? {
            let one = rows::claimed(&row, taken < bytes)?;
            taken += one.size;
            claimed.push(one);
        }
        Ok(claimed)
    }

    async fn claim_one_by_one(
        &self,
        parameters: &Parameters<'_>,
        bytes: usize,
        silence: Duration,
    ) -> Result<Vec<Claimed>> {
        let client = &self.claims.client;
        let references = within(silence, client.query(&self.dialect.claim_refs(), parameters)).await?;
        let read = within(silence, client.prepare(&self.dialect.claimed())).await?;
        let (mut claimed, mut taken) = (Vec::new(), 0);
        for reference in &references {
            let mut one = rows::reference(reference)?;
            if taken < bytes {
                match within(silence, client.query_opt(&read, &[&one.token, &one.id])).await {
                    Ok(Some(row)) => one = Claimed { destinations: one.destinations, ..rows::claimed(&row, true)? },
                    // Its lease is over, or it was deleted.
                    Ok(None) => {}
                    Err(error) if is_about_a_value(&error) => {
                        tracing::error!(event_id = %one.event_id, %error, "an event that can't be handed out");
                        one.event = Err(Unread::Unreadable(format!("PostgreSQL can't hand it out: {error}")));
                    }
                    Err(error) => return Err(error),
                }
            }
            taken += one.size;
            claimed.push(one);
        }
        Ok(claimed)
    }

    /// Settles many events at once. Returns, of each that is processed now, the seconds since it could be delivered; and the
    /// deliveries that are dead letters now.
    pub async fn settle(
        &self,
        tokens: &[i64],
        ids: &[i64],
        exceptions: &[Exception],
    ) -> Result<(Vec<f64>, Vec<DeadLetter>)> {
        let exceptions: Vec<Exception> = exceptions.iter().map(|e| self.storable(e)).collect();
        let exceptions = Json(&exceptions);
        let parameters: [&(dyn ToSql + Sync); 3] = [&tokens, &ids, &exceptions];
        let row = self.settles.on(self.settles.client.query_one(&self.settle, &parameters)).await?;
        let dead: Option<Json<Vec<DeadLetter>>> = row.try_get(1)?;
        Ok((row.try_get(0)?, dead.map(|Json(dead)| dead).unwrap_or_default()))
    }

    /// Starts the leases of these claims anew; those that were still open.
    pub async fn renew(&self, tokens: &[i64], lease: Duration) -> Result<Vec<i64>> {
        let seconds = lease.as_secs_f64();
        let parameters: [&(dyn ToSql + Sync); 2] = [&tokens, &seconds];
        let rows = self.settles.on(self.settles.client.query(&self.renew, &parameters)).await?;
        rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
    }

    /// Gives back all that these claims still hold.
    pub async fn release(&self, tokens: &[i64]) -> Result<()> {
        let query = "SELECT outbox.release(t) FROM unnest($1::bigint[]) AS t";
        self.settles.on(self.settles.client.query(query, &[&tokens])).await?;
        Ok(())
    }

    /// This relay can't serve these destinations, and why.
    pub async fn destinations_unable(&self, names: &[Arc<str>], error: &str) -> Result<()> {
        let names: Vec<&str> = names.iter().map(|name| &**name).collect();
        let error = self.storable_text(error);
        let call = "SELECT outbox.destination_unable($1, $2)";
        self.settles.on(self.settles.client.query_one(call, &[&names, &error])).await?;
        Ok(())
    }

    /// This relay's connection to these destinations stands again.
    pub async fn destinations_back(&self, names: &[Arc<str>]) -> Result<()> {
        let names: Vec<&str> = names.iter().map(|name| &**name).collect();
        let call = "SELECT outbox.destination_back($1)";
        self.settles.on(self.settles.client.query_one(call, &[&names])).await?;
        Ok(())
    }

    pub async fn destinations(&self, which: &Which) -> Result<Vec<Spec>> {
        self.settles.on(destinations(&self.settles.client, which)).await
    }

    /// Why each of these destinations is disabled, of those that are.
    pub async fn disabled(&self, names: &[Arc<str>]) -> Result<Vec<(String, String)>> {
        let names: Vec<&str> = names.iter().map(|name| &**name).collect();
        let rows = self.settles.on(self.settles.client.query(DISABLED, &[&names])).await?;
        rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect()
    }

    pub async fn webhook_allow_networks(&self) -> Result<String> {
        self.settles.on(webhook_allow_networks(&self.settles.client)).await
    }

    /// `None` while the server still owes the last answer: nobody's wait makes it owe more. A caller that waits no longer
    /// cancels nothing, since a settlement may stand before the question.
    pub async fn figures(self: &Arc<Self>, named: Vec<String>, most: usize) -> Result<Option<Figures>> {
        let Ok(asking) = self.asking.clone().try_lock_owned() else { return Ok(None) };
        let store = self.clone();
        let asked = tokio::spawn(async move {
            let _asking = asking;
            let most = i32::try_from(most).unwrap_or(i32::MAX);
            let row = store.settles.client.query_one(&store.figures, &[&named, &most]).await?;
            let Json(figures) = row.try_get(0)?;
            Ok(figures)
        });
        asked.await.map_err(|error| Error::Server(error.to_string()))?.map(Some)
    }

    /// jsonb has no NUL, and a database that is not UTF-8 has no place for every character.
    fn storable(&self, exception: &Exception) -> Exception {
        let error = exception.error.as_deref().map(|error| self.storable_text(error));
        Exception { error, ..exception.clone() }
    }

    fn storable_text(&self, text: &str) -> String {
        let kept = text.chars().take(2000);
        kept.map(|c| if c == '\0' || !(self.dialect.utf8 || c.is_ascii()) { '?' } else { c }).collect()
    }
}

/// The answer, unless nothing comes for so long.
async fn within<T>(
    silence: Duration,
    answer: impl Future<Output = std::result::Result<T, tokio_postgres::Error>>,
) -> Result<T> {
    let late = |_| Error::Server(format!("PostgreSQL did not answer within {} s", silence.as_secs()));
    timeout(silence, answer).await.map_err(late)?.map_err(Error::from)
}

/// What one value makes impossible: a character that has no counterpart, a text that no message holds.
fn is_about_a_value(error: &Error) -> bool {
    let Error::Database(error) = error else { return false };
    let Some(error) = error.as_db_error() else { return false };
    let class = &error.code().code()[..2];
    // PostgreSQL has no code of its own for a request of more than 1 GB.
    let too_large = *error.code() == SqlState::INTERNAL_ERROR && error.message().contains("memory alloc request size");
    matches!(class, "22" | "54") || too_large
}

/// A relay and an extension of different minor versions may not understand each other.
pub async fn fitting_version(client: &Client) -> Result<String> {
    let row =
        client.query_opt("SELECT extversion FROM pg_extension WHERE extname = 'pg_outbox'", &[]).await?.ok_or_else(
            || Error::Server("the database has no extension pg_outbox: run CREATE EXTENSION pg_outbox".into()),
        )?;
    let version: String = row.try_get(0)?;
    let ours = env!("CARGO_PKG_VERSION");
    let minor = |v: &str| v.rsplit_once('.').map(|(minor, _)| minor.to_owned());
    match minor(&version) == minor(ours) {
        true => Ok(version),
        false => Err(Error::Configuration(format!(
            "pg_outbox {version} does not go with relay {ours}: run ALTER EXTENSION pg_outbox UPDATE, or update the relay"
        ))),
    }
}

/// Whether what one session announces reaches the other: what a relay lives from. Everything heard meanwhile is older
/// than the first claim.
pub async fn hears(
    listens: &Client,
    announces: &Client,
    notifications: &mut UnboundedReceiver<Notification>,
) -> Result<()> {
    let channel = format!("outbox_relay_{:016x}", RandomState::new().build_hasher().finish());
    listens.batch_execute(&format!("LISTEN {channel}")).await?;
    match announces.batch_execute(&format!("NOTIFY {channel}")).await {
        Err(error) if error.code() == Some(&SqlState::PROGRAM_LIMIT_EXCEEDED) => {
            tracing::warn!(%error, "nobody can be notified at the moment");
            return Ok(());
        }
        announced => announced?,
    }
    let heard = async {
        while let Some(notification) = notifications.recv().await {
            if notification.channel() == channel {
                return Ok(());
            }
        }
        Err(Error::Server("the connection was closed".into()))
    };
    timeout(HEARING, heard).await.map_err(|_| Error::Server(format!("a notification does not arrive; {POOLED}")))??;
    listens.batch_execute(&format!("UNLISTEN {channel}")).await?;
    Ok(())
}

/// These destinations, as far as there are such. One that the server can't hand out is left out, and the others are read.
pub async fn destinations(client: &Client, which: &Which) -> Result<Vec<Spec>> {
    let names: Option<Vec<&str>> = match which {
        Which::All => None,
        Which::These(names) => Some(names.iter().map(String::as_str).collect()),
    };
    match destinations_at_once(client, &names).await {
        Err(error) if is_about_a_value(&error) => destinations_one_by_one(client, &names).await,
        found => found,
    }
}

/// Row by row: there may be ten thousand.
async fn destinations_at_once(client: &Client, names: &Option<Vec<&str>>) -> Result<Vec<Spec>> {
    let parameters: [&(dyn ToSql + Sync); 1] = [names];
    let mut rows = std::pin::pin!(client.query_raw(DESTINATIONS, parameters).await?);
    let mut specs = Vec::new();
    while let Some(row) = rows.try_next().await? {
        specs.push(rows::destination(&row)?);
    }
    Ok(specs)
}

async fn destinations_one_by_one(client: &Client, names: &Option<Vec<&str>>) -> Result<Vec<Spec>> {
    let count = "SELECT count(*) FROM outbox.relay_destinations($1::text[])";
    let count: i64 = client.query_one(count, &[names]).await?.try_get(0)?;
    let one = client.prepare(&format!("{DESTINATIONS} WHERE ordinality = $2")).await?;
    let mut specs = Vec::new();
    for n in 1..=count {
        match client.query_opt(&one, &[names, &n]).await.map_err(Error::from) {
            Ok(row) => specs.extend(row.as_ref().map(rows::destination).transpose()?),
            Err(error) if is_about_a_value(&error) => {
                tracing::error!(%error, n, "a destination that can't be read is left out");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(specs)
}

pub async fn webhook_allow_networks(client: &Client) -> Result<String> {
    let row = client.query_one("SELECT outbox.webhook_allow_networks()", &[]).await?;
    Ok(row.try_get::<_, Option<String>>(0)?.unwrap_or_default())
}

//! The two sessions of a relay, made sure of: each is one backend's own for as long as it lasts, and no setting of a role
//! or a database changes what they do.

use std::time::Duration;

use tokio::sync::mpsc::UnboundedSender;
use tokio::time::timeout;
use tokio_postgres::{Client, Notification, SimpleQueryMessage};

use super::connect::{Connected, Connector};
use crate::error::{Error, Result};

/// The first listens, is attached and claims; the second settles.
pub struct Pair {
    pub claims: Connected,
    pub settles: Connected,
}

/// A pool with room for one session lets the second one wait.
const SECOND_SESSION: Duration = Duration::from_secs(10);

/// The server cancels a statement by itself this long after the relay has given it up, should the relay's own request
/// not arrive.
const AFTER_GIVING_UP: Duration = Duration::from_secs(10);

pub const POOLED: &str = "the sessions are shared with others, as by a pool in transaction mode, where nobody hears a \
     notification: use the pool in session mode, or connect to PostgreSQL itself";

/// What `ALTER ROLE … SET`, `ALTER DATABASE … SET` and the server's configuration may not change. Parameters that a
/// version lacks are left out.
const PINS: [(&str, &str); 21] = [
    // A claim or a settlement takes turns by a lock: it waits, and the relay's own limit ends the wait.
    ("lock_timeout", "0"),
    ("idle_session_timeout", "0"),
    ("idle_in_transaction_session_timeout", "0"),
    ("transaction_timeout", "0"),
    ("default_transaction_isolation", "read committed"),
    ("default_transaction_read_only", "off"),
    ("default_transaction_deferrable", "off"),
    // What was delivered in the moment before a crash may be delivered again.
    ("synchronous_commit", "off"),
    ("row_security", "on"),
    ("exit_on_error", "off"),
    ("transform_null_equals", "off"),
    ("standard_conforming_strings", "on"),
    ("array_nulls", "on"),
    ("client_min_messages", "warning"),
    ("DateStyle", "ISO, MDY"),
    ("IntervalStyle", "postgres"),
    ("TimeZone", "UTC"),
    ("bytea_output", "hex"),
    ("extra_float_digits", "1"),
    ("jit", "off"),
    ("plan_cache_mode", "auto"),
];

/// Not `SET ROLE NONE` where the login itself may not use the outbox: then somebody has given it the role that may.
const LOGIN_MAY: &str = "SELECT session_user <> current_user AND EXISTS ( \
     SELECT FROM pg_namespace WHERE nspname = 'outbox' AND has_schema_privilege(session_user, oid, 'USAGE'))";

impl Pair {
    /// Opens both with one server. `give_up`: how long the relay waits for an answer at most.
    pub async fn open(
        connector: &Connector,
        notified: Option<UnboundedSender<Notification>>,
        give_up: Duration,
    ) -> Result<Self> {
        let claims = connector.connect(notified).await?;
        let settles = connector.connect_beside(&claims).await.map_err(second)?;
        timeout(SECOND_SESSION, are_own(&claims.client, &settles.client))
            .await
            .map_err(|_| second(Error::Server(format!("no answer within {} s", SECOND_SESSION.as_secs()))))??;
        // The session that listens hears whatever anybody sends: no conversion may fail there. See `store`.
        pin(&claims.client, if claims.utf8 { "UTF8" } else { "SQL_ASCII" }, give_up).await?;
        pin(&settles.client, "UTF8", give_up).await?;
        Ok(Pair { claims, settles })
    }
}

impl Pair {
    /// One session by itself, for questions that have nothing to do with delivery. Statements that take longer than the
    /// limit are cancelled.
    pub async fn one(connector: &Connector, limit: Duration) -> Result<Connected> {
        let one = connector.connect(None).await?;
        pin(&one.client, "UTF8", limit).await?;
        one.client.batch_execute(&format!("SET statement_timeout = {}", limit.as_millis())).await?;
        Ok(one)
    }
}

fn second(error: Error) -> Error {
    Error::Server(format!("no second session, and a relay needs two at once: {error}"))
}

/// While one is in a transaction, the other keeps its backend. Nothing is changed: a shared backend stays as it was.
async fn are_own(one: &Client, other: &Client) -> Result<()> {
    let before = backend(one).await?;
    other.batch_execute("BEGIN").await?;
    let beside = backend(other).await?;
    let own = before != beside && backend(one).await? == before;
    other.batch_execute("COMMIT").await?;
    match own && backend(other).await? == beside {
        true => Ok(()),
        false => Err(Error::Server(POOLED.into())),
    }
}

/// By the simple protocol, which needs no statement of a session.
async fn backend(client: &Client) -> Result<String> {
    first_value(client, "SELECT pg_catalog.pg_backend_pid()").await
}

async fn first_value(client: &Client, query: &str) -> Result<String> {
    let rows = client.simple_query(query).await?;
    let value = rows.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    });
    value.ok_or_else(|| Error::Server("PostgreSQL answered without a value".into()))
}

async fn pin(client: &Client, encoding: &str, give_up: Duration) -> Result<()> {
    let limit = (give_up + AFTER_GIVING_UP).as_millis().to_string();
    let last = [("statement_timeout", limit.as_str()), ("client_encoding", encoding)];
    let values: Vec<String> = PINS.iter().chain(&last).map(|(name, value)| format!("('{name}', '{value}')")).collect();
    client
        .batch_execute(&format!(
            "SET search_path = pg_catalog, pg_temp; \
             SELECT set_config(p.name, p.value, false) FROM (VALUES {}) AS p (name, value) \
             WHERE EXISTS (SELECT FROM pg_settings s WHERE s.name = p.name)",
            values.join(", ")
        ))
        .await?;
    if first_value(client, LOGIN_MAY).await? == "t" {
        client.batch_execute("SET ROLE NONE").await?;
    }
    if first_value(client, "SHOW session_replication_role").await? != "origin" {
        client.batch_execute("SET session_replication_role = origin").await?;
    }
    // Not on every system; without it a statement that waits outlives a relay that was killed.
    let _unsupported = client.batch_execute("SET client_connection_check_interval = '5s'").await;
    Ok(())
}

//! One session of PostgreSQL for one command, in one transaction: it works through any pool, and a command that fails half
//! way has changed nothing. A reading command's transaction is read-only, on a standby too.

use serde_json::Value;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row};

use crate::error::{Error, Result};
use crate::postgres::{Connector, Driver};
use crate::store;

/// What a command does, and with that the grant that it needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    Looks,
    /// Looks at what events hold, too.
    Inspects,
    Changes,
}

pub struct Session {
    client: Client,
    work: Work,
    /// The role, as it is written in a statement.
    role: String,
    /// Ends the connection when dropped.
    _driver: Driver,
}

type Parameters<'a> = &'a [&'a (dyn ToSql + Sync)];

impl Session {
    /// `command` shows in `pg_stat_activity`.
    pub async fn open(connector: &Connector, command: &str, work: Work) -> Result<Self> {
        let connected = connector.connect(None).await?;
        let client = connected.client;
        let mode = match work {
            Work::Looks | Work::Inspects => "READ ONLY",
            Work::Changes => "READ WRITE",
        };
        client
            .batch_execute(&format!(
                "BEGIN ISOLATION LEVEL READ COMMITTED, {mode}; \
                 SET LOCAL search_path = pg_catalog, pg_temp; SET LOCAL application_name = 'outbox-relay {command}'; \
                 SET LOCAL client_encoding = 'UTF8'; SET LOCAL client_min_messages = 'warning'; \
                 SET LOCAL TimeZone = 'UTC'; SET LOCAL DateStyle = 'ISO, MDY'; SET LOCAL IntervalStyle = 'postgres'; \
                 SET LOCAL idle_in_transaction_session_timeout = 0"
            ))
            .await?;
        store::fitting_version(&client).await?;
        let role: String =
            client.query_one("SELECT quote_literal(quote_ident(current_user))", &[]).await?.try_get(0)?;
        Ok(Session { client, work, role, _driver: connected.driver })
    }

    /// Each row's first column, which is JSON as text.
    pub async fn rows(&self, sql: &str, parameters: Parameters<'_>) -> Result<Vec<Value>> {
        let rows = self.client.query(sql, parameters).await.map_err(|error| self.explained(error))?;
        rows.iter().map(|row| parse(row.try_get(0)?)).collect()
    }

    /// The same of the only row.
    pub async fn row(&self, sql: &str, parameters: Parameters<'_>) -> Result<Value> {
        parse(&self.value::<String>(sql, parameters).await?)
    }

    /// The only row's first column.
    pub async fn value<T>(&self, sql: &str, parameters: Parameters<'_>) -> Result<T>
    where
        T: for<'a> tokio_postgres::types::FromSql<'a>,
    {
        let row = self.client.query_one(sql, parameters).await.map_err(|error| self.explained(error))?;
        Ok(row.try_get(0)?)
    }

    /// The first row, if there is one.
    pub async fn first(&self, sql: &str, parameters: Parameters<'_>) -> Result<Option<Row>> {
        self.client.query_opt(sql, parameters).await.map_err(|error| self.explained(error))
    }

    /// Ends the transaction: from now on it is so.
    pub async fn commit(self) -> Result<()> {
        Ok(self.client.batch_execute("COMMIT").await?)
    }

    /// What the role may not do is one line that says which grant it lacks.
    fn explained(&self, error: tokio_postgres::Error) -> Error {
        match error.as_db_error() {
            Some(denied) if *denied.code() == SqlState::INSUFFICIENT_PRIVILEGE => {
                let (role, grant) = (&self.role, self.grant());
                Error::Server(format!(
                    "role {role} lacks {grant}: {}; a superuser can run SELECT outbox.{grant}({role})",
                    denied.message()
                ))
            }
            _ => error.into(),
        }
    }

    fn grant(&self) -> &'static str {
        match self.work {
            Work::Looks => "grant_monitor",
            Work::Inspects | Work::Changes => "grant_operator",
        }
    }
}

/// JSON that PostgreSQL wrote.
pub fn parse(json: &str) -> Result<Value> {
    serde_json::from_str(json).map_err(|error| Error::Server(format!("PostgreSQL's answer is no JSON: {error}")))
}

/// Whether PostgreSQL says that there is no such thing, such as a destination.
pub fn names_what_is_not_there(error: &Error) -> bool {
    matches!(error, Error::Database(error) if error.code() == Some(&SqlState::UNDEFINED_OBJECT))
}

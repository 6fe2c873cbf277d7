//! The page's own session with PostgreSQL: opened when somebody looks, one statement at a time, closed when nobody has
//! looked for a while. Delivery has its own sessions and never waits for this one.

use std::sync::{Arc, Mutex as Quick, PoisonError};
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

use crate::error::{Error, Result};
use crate::postgres::{Cancel, Connected, Connector, Pair};

/// A statement of the page that takes longer is cancelled.
const STATEMENT: Duration = Duration::from_secs(10);

/// For a turn and an answer together.
const PATIENCE: Duration = Duration::from_secs(15);

/// Without a question for so long the session is closed: while nothing happens, nothing of the page is left there.
const IDLE: Duration = Duration::from_secs(5);

#[derive(Clone)]
pub struct Database(Arc<Inner>);

struct Inner {
    connector: Connector,
    session: Mutex<Option<Connected>>,
    /// Closes the session when it has been idle for long enough.
    closing: Quick<Option<AbortHandle>>,
}

impl Database {
    pub fn new(connector: Connector) -> Self {
        Database(Arc::new(Inner { connector, session: Mutex::default(), closing: Quick::default() }))
    }

    /// Where it is, without a password.
    pub fn target(&self) -> String {
        self.0.connector.target()
    }

    /// The rows of one statement.
    pub async fn ask(&self, sql: &str, parameters: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>> {
        let late = |_| Error::Server(format!("PostgreSQL did not answer within {} s", PATIENCE.as_secs()));
        let answer = timeout(PATIENCE, self.ask_in_turn(sql, parameters)).await.map_err(late).flatten();
        self.close_when_idle();
        answer
    }

    async fn ask_in_turn(&self, sql: &str, parameters: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>> {
        let mut session = self.0.session.lock().await;
        if session.as_ref().is_none_or(|session| session.client.is_closed()) {
            *session = None;
            *session = Some(Pair::one(&self.0.connector, STATEMENT).await?);
        }
        let Some(open) = session.as_ref() else { return Err(Error::Server("no session".into())) };
        let mut unfinished = Unfinished(Some(&open.cancel));
        let rows = open.client.query(sql, parameters).await;
        unfinished.0 = None;
        Ok(rows?)
    }

    /// One timer, set anew with each question.
    fn close_when_idle(&self) {
        let inner = Arc::downgrade(&self.0);
        let timer = tokio::spawn(async move {
            tokio::time::sleep(IDLE).await;
            if let Some(inner) = inner.upgrade() {
                *inner.session.lock().await = None;
            }
        });
        let mut closing = self.0.closing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(before) = closing.replace(timer.abort_handle()) {
            before.abort();
        }
    }
}

/// A statement whose asker has left ends in the server too.
struct Unfinished<'a>(Option<&'a Cancel>);

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if let Some(cancel) = self.0 {
            cancel.spawn();
        }
    }
}

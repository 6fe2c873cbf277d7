//! What an error of a session means to it.

use std::time::Duration;

use outbox_tests::session::Session;
use tokio_postgres::error::SqlState;

#[derive(Debug)]
pub enum Trouble {
    /// The session is over: the server, its backend or the way to it.
    Lost,
    /// The transaction is over by `pg_cancel_backend`, a lock time-out or a full disk, and the session goes on.
    GivenUp,
    /// Nothing that the soak does explains it.
    Strange(String),
}

impl From<tokio_postgres::Error> for Trouble {
    fn from(error: tokio_postgres::Error) -> Self {
        let Some(code) = error.code() else { return Trouble::Lost };
        let ends = [
            SqlState::ADMIN_SHUTDOWN,
            SqlState::CRASH_SHUTDOWN,
            SqlState::CANNOT_CONNECT_NOW,
            SqlState::DATABASE_DROPPED,
            // The server came back as a standby.
            SqlState::READ_ONLY_SQL_TRANSACTION,
        ];
        if ends.contains(code) || code.code().starts_with("08") {
            Trouble::Lost
        } else if [SqlState::QUERY_CANCELED, SqlState::LOCK_NOT_AVAILABLE, SqlState::DISK_FULL].contains(code) {
            Trouble::GivenUp
        } else {
            let detail = error.as_db_error().map_or_else(
                || error.to_string(),
                |error| {
                    format!(
                        "{} {} {}",
                        error.message(),
                        error.detail().unwrap_or_default(),
                        error.where_().unwrap_or_default()
                    )
                },
            );
            Trouble::Strange(format!("{}: {detail}", code.code()))
        }
    }
}

/// A session, or none while the server is away.
pub async fn connected(url: &str) -> Option<Session> {
    match tokio::time::timeout(Duration::from_secs(5), Session::open(url)).await {
        Ok(Ok(session)) => Some(session),
        _ => {
            tokio::time::sleep(Duration::from_millis(100)).await;
            None
        }
    }
}

//! What ends a command or a session of the relay, and the exit code it stands for. How a delivery ended is no error: see
//! [`crate::destination::Outcome`].
//! No message holds a password or a secret.

use std::fmt;

/// Exit code for wrong configuration (`EX_USAGE` of sysexits.h).
pub const EXIT_CONFIGURATION: u8 = 64;

#[derive(Debug)]
pub enum Error {
    /// What the user configured can't work; trying again can't help.
    Configuration(String),
    /// PostgreSQL answered with an error, or the connection broke.
    Database(tokio_postgres::Error),
    /// PostgreSQL or the extension is not as the relay needs it.
    Server(String),
    /// The relay's own HTTP listener.
    Listen(String),
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Configuration(_) => EXIT_CONFIGURATION,
            _ => 1,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Configuration(message) | Error::Server(message) | Error::Listen(message) => f.write_str(message),
            Error::Database(error) => f.write_str(&describe(error)),
        }
    }
}

impl std::error::Error for Error {}

impl From<tokio_postgres::Error> for Error {
    fn from(error: tokio_postgres::Error) -> Self {
        Error::Database(error)
    }
}

/// One line that says what PostgreSQL said: message, hint and SQLSTATE, or the chain of causes.
fn describe(error: &tokio_postgres::Error) -> String {
    if let Some(db) = error.as_db_error() {
        let hint = db.hint().map(|hint| format!(" ({hint})")).unwrap_or_default();
        return format!("{}{hint} [SQLSTATE {}]", db.message(), db.code().code());
    }
    let mut line = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        line.push_str(": ");
        line.push_str(&cause.to_string());
        source = cause.source();
    }
    line
}

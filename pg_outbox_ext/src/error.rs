//! The errors of this library, each with its SQLSTATE, message and hint in PostgreSQL's style.

use pgrx::pg_sys::panic::ErrorReport;
use pgrx::{PgLogLevel, PgSqlErrorCode};

#[derive(Debug, Clone, Copy)]
pub enum Error {
    NotPreloaded,
    ConsumerName,
    TooManyConsumers,
    Standby,
    Definition,
    NoDefiner,
    OtherTable,
}

impl Error {
    fn parts(self) -> (PgSqlErrorCode, &'static str, &'static str) {
        match self {
            Error::NotPreloaded => (
                PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
                "pg_outbox must be loaded via shared_preload_libraries",
                "Add pg_outbox to shared_preload_libraries and restart PostgreSQL.",
            ),
            Error::ConsumerName => (
                PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
                "consumer must be a name of 1 to 63 bytes",
                "Name the consumer so that an operator recognizes it, for example 'relay@host1'.",
            ),
            Error::TooManyConsumers => (
                PgSqlErrorCode::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED,
                "too many attached consumers",
                "At most 512 sessions of a server can be attached at a time; let the others claim without attaching.",
            ),
            Error::Standby => (
                PgSqlErrorCode::ERRCODE_READ_ONLY_SQL_TRANSACTION,
                "cannot attach on a standby",
                "Connect to the primary, for example with target_session_attrs=read-write.",
            ),
            Error::Definition => (
                PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
                "the roles of pg_outbox can't change definitions or privileges",
                "A trigger of yours on outbox_events runs as outbox_owner; do this elsewhere, as another role.",
            ),
            Error::NoDefiner => (
                PgSqlErrorCode::ERRCODE_INVALID_FUNCTION_DEFINITION,
                "a function in the language outbox_plpgsql must be SECURITY DEFINER",
                "The language is for the functions of pg_outbox; use plpgsql.",
            ),
            Error::OtherTable => (
                PgSqlErrorCode::ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED,
                "the trigger functions of pg_outbox are for outbox_events alone",
                "Drop the trigger, and insert into outbox_events or call outbox.publish().",
            ),
        }
    }
}

/// Raises the error; the transaction is aborted.
pub fn raise(error: Error) -> ! {
    let (code, message, hint) = error.parts();
    ErrorReport::new(code, message, "pg_outbox").set_hint(hint).report(PgLogLevel::ERROR);
    unreachable!("an ERROR does not return")
}

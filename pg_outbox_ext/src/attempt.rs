//! A transaction of the worker's own that may fail: then it leaves nothing behind but one line in the log.

use crate::roles;
use crate::worker::BUSY;
use pgrx::pg_sys::panic::CaughtError;
use pgrx::prelude::*;
use pgrx::{PgLogLevel, PgTryBuilder};
use std::ffi::{CStr, c_int};
use std::panic::AssertUnwindSafe;
use std::sync::atomic::Ordering::SeqCst;

/// Why a transaction was undone.
#[derive(Debug, Clone)]
pub struct Failure {
    pub code: PgSqlErrorCode,
    pub message: String,
    /// All else was done.
    pub in_part: bool,
}

impl Failure {
    fn new(error: CaughtError) -> Self {
        let (CaughtError::PostgresError(report)
        | CaughtError::ErrorReport(report)
        | CaughtError::RustPanic { ereport: report, .. }) = error;
        Failure { code: report.sql_error_code(), message: report.message().to_owned(), in_part: false }
    }

    /// What a function caught, as it tells of it: the SQLSTATE, a blank, the message.
    pub fn in_part(told: &str) -> Self {
        let (state, message) = told.split_once(' ').unwrap_or(("", told));
        Failure { code: PgSqlErrorCode::from(code(state)), message: message.to_owned(), in_part: true }
    }

    /// Somebody holds a lock: not a fault, and over when they let go.
    pub fn is_lock(&self) -> bool {
        self.code == PgSqlErrorCode::ERRCODE_LOCK_NOT_AVAILABLE
    }

    /// One line, whatever line ends the message has (an application's trigger may have written it).
    pub fn log(&self, what: &CStr) {
        let message = self.message.split_whitespace().collect::<Vec<_>>().join(" ");
        ereport!(
            PgLogLevel::WARNING,
            self.code,
            format!("pg_outbox worker: {}: {message} (SQLSTATE {})", what.to_string_lossy(), sqlstate(self.code))
        );
    }
}

/// The five characters of an SQLSTATE. Source: unpack_sql_state() of PostgreSQL's elog.c.
fn sqlstate(code: PgSqlErrorCode) -> String {
    (0..5).map(|i| char::from(((code as u32 >> (6 * i) & 0x3f) as u8) + b'0')).collect()
}

/// The other way round. Source: MAKE_SQLSTATE() of PostgreSQL's elog.h.
fn code(sqlstate: &str) -> i32 {
    sqlstate.bytes().take(5).zip(0..).map(|(c, i)| (i32::from(c.wrapping_sub(b'0')) & 0x3f) << (6 * i)).sum()
}

/// What a transaction may take: milliseconds for each lock that it waits for, and for all of it (0: as long as it takes).
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    pub lock_ms: u32,
    pub all_ms: u32,
}

impl Patience {
    pub const ENDLESS: Patience = Patience { lock_ms: 0, all_ms: 0 };
}

unsafe extern "C" {
    /// PostgreSQL's timers (utils/timeout.h). Neither raises an error here.
    fn enable_timeout_after(id: c_int, delay_ms: c_int);
    fn disable_timeout(id: c_int, keep_indicator: bool);
}

/// STATEMENT_TIMEOUT of `enum TimeoutId`, the same in each supported release.
const STATEMENT_TIMEOUT: c_int = 3;

/// Work as outbox_owner, to the end of the commit, in a transaction of its own: triggers on the application's table may be
/// anybody's. No setting that they make outlives it.
pub fn attempt<R>(what: &CStr, patience: Patience, body: impl FnOnce() -> R) -> Result<R, Failure> {
    attempt_as_superuser(what, patience, || roles::as_owner(body))
}

/// Work in a transaction of its own that is visible in pg_stat_activity. For what touches no table of the application's.
pub fn attempt_as_superuser<R>(what: &CStr, patience: Patience, body: impl FnOnce() -> R) -> Result<R, Failure> {
    BUSY.store(true, SeqCst);
    // SAFETY: a plain call of PostgreSQL's statistics function.
    unsafe { pg_sys::pgstat_report_activity(pg_sys::BackendState::STATE_RUNNING, what.as_ptr()) };
    crate::worker::serve_termination();
    let work = AssertUnwindSafe(|| {
        // SAFETY: the start of a transaction as PostgreSQL's own workers make it; no transaction is running.
        unsafe {
            pg_sys::SetCurrentStatementStartTimestamp();
            pg_sys::StartTransactionCommand();
            pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
        }
        begin(patience);
        let result = body();
        // SAFETY: the end of the transaction that was started above.
        unsafe {
            pg_sys::PopActiveSnapshot();
            pg_sys::CommitTransactionCommand();
        }
        Ok(result)
    });
    let result = PgTryBuilder::new(work).catch_others(|error| Err(Failure::new(error))).execute();
    end(result.is_err());
    // SAFETY: as above.
    unsafe { pg_sys::pgstat_report_activity(pg_sys::BackendState::STATE_IDLE, std::ptr::null()) };
    BUSY.store(false, SeqCst);
    result
}

fn begin(patience: Patience) {
    if patience.lock_ms > 0 {
        set_local(c"lock_timeout", patience.lock_ms);
    }
    if patience.all_ms > 0 {
        // SAFETY: the timer was registered when the process connected to its database.
        unsafe { enable_timeout_after(STATEMENT_TIMEOUT, patience.all_ms as c_int) };
    }
}

/// After the transaction, or instead of its end. Source: the error handling of PostgresMain().
fn end(failed: bool) {
    // SAFETY: outside of any error handling: the error was copied and flushed when it was caught.
    unsafe {
        disable_timeout(STATEMENT_TIMEOUT, false);
        // It may have fired just now, for what is over.
        pg_sys::QueryCancelPending = 0;
        if failed {
            pg_sys::AbortCurrentTransaction();
        }
    }
    roles::be_oneself();
}

/// Until the transaction's end, how long it waits for each lock (0: for ever).
pub fn set_local(setting: &CStr, milliseconds: u32) {
    let value = std::ffi::CString::new(milliseconds.to_string()).unwrap_or_default();
    // SAFETY: two strings that end in NUL; PostgreSQL copies the value. In a transaction.
    unsafe {
        pg_sys::set_config_option(
            setting.as_ptr(),
            value.as_ptr(),
            pg_sys::GucContext::PGC_SUSET,
            pg_sys::GucSource::PGC_S_SESSION,
            pg_sys::GucAction::GUC_ACTION_LOCAL,
            true,
            0,
            false,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_sqlstate_is_shown_as_users_know_it() {
        assert_eq!(sqlstate(PgSqlErrorCode::ERRCODE_LOCK_NOT_AVAILABLE), "55P03");
        assert_eq!(sqlstate(PgSqlErrorCode::ERRCODE_FOREIGN_KEY_VIOLATION), "23503");
        assert!(Failure::in_part("55P03 canceling statement due to lock timeout").is_lock());
        assert_eq!(Failure::in_part("23503 still referenced").code, PgSqlErrorCode::ERRCODE_FOREIGN_KEY_VIOLATION);
    }
}

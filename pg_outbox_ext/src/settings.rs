//! What the worker depends on, whatever the administrator set for all sessions, for this database or for a role.

use crate::attempt::{Failure, Patience, attempt_as_superuser};
use pgrx::bgworkers::BackgroundWorker;
use pgrx::prelude::*;
use std::ffi::CStr;

const PINNED: &[(&CStr, &CStr)] = &[
    // It ends when it is told to, and by nothing else.
    (c"statement_timeout", c"0"),
    (c"lock_timeout", c"0"),
    (c"idle_in_transaction_session_timeout", c"0"),
    (c"idle_session_timeout", c"0"),
    #[cfg(any(feature = "pg17", feature = "pg18"))]
    (c"transaction_timeout", c"0"),
    // Each statement sees what was committed before it, and may write.
    (c"default_transaction_isolation", c"read committed"),
    (c"default_transaction_read_only", c"off"),
    (c"default_transaction_deferrable", c"off"),
    // Nothing it writes must outlive a crash: recovery does it again.
    (c"synchronous_commit", c"off"),
    // What its statements mean.
    (c"search_path", c"pg_catalog, pg_temp"),
    (c"row_security", c"on"),
    (c"session_replication_role", c"origin"),
    (c"standard_conforming_strings", c"on"),
    (c"transform_null_equals", c"off"),
    (c"array_nulls", c"on"),
    (c"DateStyle", c"ISO, MDY"),
    (c"IntervalStyle", c"postgres"),
    (c"plpgsql.variable_conflict", c"error"),
    (c"plpgsql.extra_errors", c"none"),
    (c"plpgsql.extra_warnings", c"none"),
    // It works beside the application, in one process, and its statements are few and always the same.
    (c"max_parallel_workers_per_gather", c"0"),
    (c"plan_cache_mode", c"force_generic_plan"),
    (c"enable_indexscan", c"on"),
    (c"enable_nestloop", c"on"),
    (c"enable_seqscan", c"off"),
    (c"enable_hashjoin", c"off"),
    (c"enable_mergejoin", c"off"),
    (c"jit", c"off"),
];

/// Reads the configuration files again if the postmaster said so; whether it did. In the main loop of a background worker,
/// outside a transaction.
pub fn reload() -> bool {
    let asked = BackgroundWorker::sighup_received();
    if asked {
        // SAFETY: where PostgreSQL's own background workers call it.
        unsafe { pg_sys::ProcessConfigFile(pg_sys::GucContext::PGC_SIGHUP) };
    }
    asked
}

/// Right after the worker connected. Source: AutoVacWorkerMain() of PostgreSQL's autovacuum.c, which does the same.
pub fn pin() -> Result<(), Failure> {
    for (name, value) in PINNED {
        let (context, source) = (pg_sys::GucContext::PGC_SUSET, pg_sys::GucSource::PGC_S_OVERRIDE);
        // SAFETY: two strings that end in NUL, which PostgreSQL copies; outside a transaction, as its own workers call it.
        unsafe { pg_sys::SetConfigOption(name.as_ptr(), value.as_ptr(), context, source) };
    }
    // ALTER DATABASE … SET role makes it somebody else; it is the superuser that the postmaster started.
    attempt_as_superuser(c"starting", Patience::ENDLESS, || {
        let set = "SELECT pg_catalog.set_config('session_authorization', r.rolname, false), pg_catalog.set_config('role', 'none', false)
                     FROM pg_catalog.pg_roles r WHERE r.oid OPERATOR(pg_catalog.=) 10";
        if let Err(e) = Spi::run(set) {
            error!("{e}");
        }
    })
}

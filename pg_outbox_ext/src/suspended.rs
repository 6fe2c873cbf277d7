//! Databases whose worker steps aside for a command that tolerates no other session.
//!
//! The worker ends before the command looks for other sessions, and comes back when the transaction or savepoint is over,
//! if the database is still there.

use crate::backend::{self, Local};
use crate::shmem::{self, Shared, State};
use crate::{clock, sleep, wake};
use pgrx::pg_sys;
use std::sync::atomic::Ordering::*;

/// A worker that did not end by itself in this time (microseconds) is in the middle of something, and is cut off.
const BUSY: i64 = 500_000;

/// A database suspended by the running transaction, and the nesting level of the savepoint that did it. 0: none.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Suspended {
    oid: u32,
    level: i32,
}

/// More in one transaction than any sane script renames.
static SUSPENDED: Local<[Suspended; 8]> = Local::new([Suspended { oid: 0, level: 0 }; 8]);

/// What a role needs for the command, besides being a superuser or the database's owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Right {
    Owner,
    /// CREATE DATABASE: whoever may create databases may copy one that is marked as a template.
    Template,
}

/// In `_PG_init`.
pub fn register() {
    backend::on_transaction_end(transaction_ended);
    backend::on_savepoint_end(savepoint_ended);
}

/// Ends the worker of that database, if there is one, and keeps it away until the transaction is over.
pub fn suspend(name: &[u8], right: Right) {
    let Ok(name) = std::ffi::CString::new(name) else { return };
    // SAFETY: a catalog look-up in a transaction.
    let oid = unsafe { pg_sys::get_database_oid(name.as_ptr(), true) };
    let Some(shared) = shmem::try_get() else { return };
    if oid == pg_sys::InvalidOid || !may_change(oid, right) || !list_suspended(shared, oid) {
        return;
    }
    let Some(slot) = shmem::find(oid) else { return };
    let since = clock::monotonic();
    while slot.state() != State::Idle && slot.oid.load(SeqCst) == oid.to_u32() {
        slot.stop.store(true, SeqCst);
        wake::worker_now(slot);
        if clock::monotonic() - since > BUSY {
            wake::terminate(slot);
        }
        sleep::for_latch(Some(2));
    }
}

/// False: no room, neither here (commands on databases by the dozen in one transaction) nor for all together.
fn list_suspended(shared: &Shared, oid: pg_sys::Oid) -> bool {
    let level = backend::nesting_level();
    SUSPENDED.with(|suspended| {
        if suspended.iter().any(|p| p.oid == oid.to_u32()) {
            return true;
        }
        let free = suspended.iter_mut().find(|p| p.oid == 0);
        let listed = free.filter(|_| Shared::list(&shared.suspended, oid));
        listed.map(|free| *free = Suspended { oid: oid.to_u32(), level }).is_some()
    })
}

/// Whoever may not do the command must not stop a worker with it.
fn may_change(oid: pg_sys::Oid, right: Right) -> bool {
    // SAFETY: permission look-ups in a transaction.
    unsafe {
        let user = pg_sys::GetUserId();
        #[cfg(any(feature = "pg14", feature = "pg15"))]
        let owns = pg_sys::pg_database_ownercheck(oid, user);
        #[cfg(not(any(feature = "pg14", feature = "pg15")))]
        let owns = pg_sys::object_ownercheck(pg_sys::DatabaseRelationId, oid, user);
        owns || pg_sys::superuser_arg(user)
            || (right == Right::Template && is_template(oid) && may_create_databases(user))
    }
}

/// `pg_authid.rolcreatedb`. (PostgreSQL's own function for it is not in every minor version.)
///
/// # Safety
/// In a transaction.
unsafe fn may_create_databases(user: pg_sys::Oid) -> bool {
    // SAFETY: the caller's.
    unsafe { flag(pg_sys::SysCacheIdentifier::AUTHOID as i32, user, pg_sys::Anum_pg_authid_rolcreatedb as i16) }
}

/// `pg_database.datistemplate`.
///
/// # Safety
/// In a transaction.
unsafe fn is_template(database: pg_sys::Oid) -> bool {
    // SAFETY: the caller's.
    unsafe {
        flag(pg_sys::SysCacheIdentifier::DATABASEOID as i32, database, pg_sys::Anum_pg_database_datistemplate as i16)
    }
}

/// A boolean column of the catalog's row with that identity.
///
/// # Safety
/// In a transaction; the cache is one by identity, the column a boolean one of its catalog.
unsafe fn flag(cache: i32, identity: pg_sys::Oid, column: i16) -> bool {
    // SAFETY: a tuple of the cache is valid until it is released.
    unsafe {
        let row = pg_sys::SearchSysCache1(cache, pg_sys::Datum::from(identity));
        if row.is_null() {
            return false;
        }
        let mut is_null = false;
        let value = pg_sys::SysCacheGetAttr(cache, row, column, &mut is_null);
        pg_sys::ReleaseSysCache(row);
        !is_null && value.value() != 0
    }
}

unsafe extern "C-unwind" fn transaction_ended(event: pg_sys::XactEvent::Type, _arg: *mut std::ffi::c_void) {
    use pg_sys::XactEvent::*;
    if [XACT_EVENT_COMMIT, XACT_EVENT_PREPARE, XACT_EVENT_ABORT].contains(&event) {
        resume_where(|_| true);
    }
}

unsafe extern "C-unwind" fn savepoint_ended(
    event: pg_sys::SubXactEvent::Type,
    _own: pg_sys::SubTransactionId,
    _parent: pg_sys::SubTransactionId,
    _arg: *mut std::ffi::c_void,
) {
    use pg_sys::SubXactEvent::*;
    let level = backend::nesting_level();
    match event {
        // What it did is the surrounding one's.
        SUBXACT_EVENT_COMMIT_SUB => {
            SUSPENDED.with(|all| all.iter_mut().for_each(|suspended| suspended.level = suspended.level.min(level - 1)));
        }
        SUBXACT_EVENT_ABORT_SUB => resume_where(|suspended| suspended.level >= level),
        _ => {}
    }
}

/// The launcher looks at these databases again.
fn resume_where(is_over: impl Fn(Suspended) -> bool) {
    let Some(shared) = shmem::try_get() else { return };
    let any = SUSPENDED.with(|all| {
        let over = all.iter_mut().filter(|p| p.oid != 0 && is_over(**p)).map(std::mem::take);
        over.map(|suspended| Shared::unlist(&shared.suspended, pg_sys::Oid::from(suspended.oid))).count() > 0
    });
    if any {
        wake::launcher(shared);
    }
}

//! Commands that a connected worker would stand in the way of, the end of the extension, the end of an attachment, and
//! two-phase commit.
//!
//! | command | what happens |
//! | --- | --- |
//! | DROP DATABASE, ALTER DATABASE … RENAME, … SET TABLESPACE, CREATE DATABASE (its template) | the database is suspended: its worker ends before the command looks for other sessions, and comes back when the transaction or savepoint is over, if the database is still there. Not where PostgreSQL refuses the command: for want of rights, or in a transaction block |
//! | the extension is dropped in whatever way | the worker ends at commit; until then it waits for no lock |
//! | DISCARD ALL | the session's attachment ends, as with the session |
//! | PREPARE TRANSACTION, COMMIT PREPARED, ROLLBACK PREPARED | see [`crate::prepared`] |

use crate::backend::{self, Local};
use crate::commit::note;
use crate::shmem::{self, Shared, State};
use crate::{clock, prepared, roles, session, sleep, wake};
use pgrx::pg_sys;
use std::ffi::CStr;
use std::sync::atomic::Ordering::*;

static mut PREVIOUS_UTILITY: pg_sys::ProcessUtility_hook_type = None;
static mut PREVIOUS_ACCESS: pg_sys::object_access_hook_type = None;

/// A database suspended by the running transaction, and the nesting level of the savepoint that did it. 0: none.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Suspended {
    oid: u32,
    level: i32,
}

/// More in one transaction than any sane script renames.
static SUSPENDED: Local<[Suspended; 8]> = Local::new([Suspended { oid: 0, level: 0 }; 8]);

/// Name of the transaction that is being prepared.
static PREPARING: Local<Option<Vec<u8>>> = Local::new(None);

/// What follows the running command if it succeeds. None of these commands runs inside another.
static FOLLOWS: Local<Option<Concern>> = Local::new(None);

/// In `_PG_init`.
pub fn install() {
    // SAFETY: the postmaster is single-threaded and runs this once, while it loads libraries.
    unsafe {
        PREVIOUS_UTILITY = pg_sys::ProcessUtility_hook;
        pg_sys::ProcessUtility_hook = Some(utility);
        PREVIOUS_ACCESS = pg_sys::object_access_hook;
        pg_sys::object_access_hook = Some(object_access);
    }
}

/// What of a command concerns the outbox.
enum Concern {
    Suspend(Vec<u8>, Right),
    DiscardAll,
    Prepare(Vec<u8>),
    CommitPrepared(Vec<u8>),
    RollbackPrepared(Vec<u8>),
}

/// What a role needs for the command, besides being a superuser or the database's owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Right {
    Owner,
    /// CREATE DATABASE: whoever may create databases may copy one that is marked as a template.
    Template,
}

unsafe extern "C-unwind" {
    /// PostgreSQL's own function (tcop/utility.h), without pgrx's wrapper.
    #[link_name = "standard_ProcessUtility"]
    fn postgresql_process_utility(
        statement: *mut pg_sys::PlannedStmt,
        query: *const std::ffi::c_char,
        read_only_tree: bool,
        context: pg_sys::ProcessUtilityContext::Type,
        params: pg_sys::ParamListInfo,
        environment: *mut pg_sys::QueryEnvironment,
        receiver: *mut pg_sys::DestReceiver,
        completion: *mut pg_sys::QueryCompletion,
    );
}

/// Every command of the server passes here, and so does its ERROR: as PostgreSQL raised it, by a jump over this frame,
/// which therefore owns nothing. What needs a guard of its own is in [`before`] and [`after`].
#[allow(clippy::too_many_arguments, reason = "PostgreSQL's signature")]
unsafe extern "C-unwind" fn utility(
    statement: *mut pg_sys::PlannedStmt,
    query: *const std::ffi::c_char,
    read_only_tree: bool,
    context: pg_sys::ProcessUtilityContext::Type,
    params: pg_sys::ParamListInfo,
    environment: *mut pg_sys::QueryEnvironment,
    receiver: *mut pg_sys::DestReceiver,
    completion: *mut pg_sys::QueryCompletion,
) {
    // SAFETY: the arguments go on as they came, to the hook that was there before or to PostgreSQL itself; no local of
    // this function has a destructor that a jump could skip.
    unsafe {
        before(statement, context);
        match PREVIOUS_UTILITY {
            Some(previous) => {
                previous(statement, query, read_only_tree, context, params, environment, receiver, completion);
            }
            None => postgresql_process_utility(
                statement,
                query,
                read_only_tree,
                context,
                params,
                environment,
                receiver,
                completion,
            ),
        }
        after();
    }
}

#[pgrx::pg_guard]
unsafe extern "C-unwind" fn before(statement: *mut pg_sys::PlannedStmt, context: pg_sys::ProcessUtilityContext::Type) {
    let top_level = context == pg_sys::ProcessUtilityContext::PROCESS_UTILITY_TOPLEVEL;
    // SAFETY: the statement is the parse tree that PostgreSQL is about to run.
    let concern = unsafe {
        roles::refuse_definition((*statement).utilityStmt);
        concern((*statement).utilityStmt, top_level)
    };
    // Left behind by a command that failed.
    FOLLOWS.with(|f| *f = None);
    match concern {
        Some(Concern::Suspend(name, right)) => suspend(&name, right),
        Some(Concern::Prepare(name)) => PREPARING.with(|p| *p = Some(name)),
        follows => FOLLOWS.with(|f| *f = follows),
    }
}

#[pgrx::pg_guard]
extern "C-unwind" fn after() {
    match FOLLOWS.with(Option::take) {
        Some(Concern::DiscardAll) => {
            session::detach();
        }
        Some(Concern::CommitPrepared(name)) => prepared::commit(&name),
        Some(Concern::RollbackPrepared(name)) => prepared::forget(&name),
        _ => {}
    }
}

/// # Safety
/// The node is a statement as PostgreSQL's parser made it.
unsafe fn concern(node: *mut pg_sys::Node, top_level: bool) -> Option<Concern> {
    let of_owner = |name: Vec<u8>| Concern::Suspend(name, Right::Owner);
    // SAFETY: each tag says which structure the node is.
    unsafe {
        // Where these commands fail, at once, in whatever transaction goes on.
        let refused = || pg_sys::IsInTransactionBlock(top_level);
        match (*node).type_ {
            pg_sys::NodeTag::T_DropdbStmt if !refused() => {
                text((*node.cast::<pg_sys::DropdbStmt>()).dbname).map(of_owner)
            }
            pg_sys::NodeTag::T_DiscardStmt => {
                let all = (*node.cast::<pg_sys::DiscardStmt>()).target == pg_sys::DiscardMode::DISCARD_ALL;
                all.then_some(Concern::DiscardAll)
            }
            pg_sys::NodeTag::T_RenameStmt => {
                let rename = &*node.cast::<pg_sys::RenameStmt>();
                let database = rename.renameType == pg_sys::ObjectType::OBJECT_DATABASE;
                database.then(|| text(rename.subname)).flatten().map(of_owner)
            }
            pg_sys::NodeTag::T_AlterDatabaseStmt if !refused() => {
                let alter = &*node.cast::<pg_sys::AlterDatabaseStmt>();
                option(alter.options, c"tablespace")?;
                text(alter.dbname).map(of_owner)
            }
            pg_sys::NodeTag::T_CreatedbStmt if !refused() => {
                let create = &*node.cast::<pg_sys::CreatedbStmt>();
                let template = option(create.options, c"template").map(|o| text(pg_sys::defGetString(o)));
                Some(Concern::Suspend(template.flatten().unwrap_or_else(|| b"template1".to_vec()), Right::Template))
            }
            pg_sys::NodeTag::T_TransactionStmt => {
                let transaction = &*node.cast::<pg_sys::TransactionStmt>();
                let name = text(transaction.gid);
                match transaction.kind {
                    pg_sys::TransactionStmtKind::TRANS_STMT_PREPARE => name.map(Concern::Prepare),
                    pg_sys::TransactionStmtKind::TRANS_STMT_COMMIT_PREPARED => name.map(Concern::CommitPrepared),
                    pg_sys::TransactionStmtKind::TRANS_STMT_ROLLBACK_PREPARED => name.map(Concern::RollbackPrepared),
                    _ => None,
                }
            }
            _ => None,
        }
    }
}

/// # Safety
/// Null, or a string that ends in NUL.
unsafe fn text(c: *const std::ffi::c_char) -> Option<Vec<u8>> {
    // SAFETY: as the caller promises.
    (!c.is_null()).then(|| unsafe { CStr::from_ptr(c) }.to_bytes().to_vec())
}

/// The option of that name.
///
/// # Safety
/// A list of DefElem nodes.
unsafe fn option(options: *mut pg_sys::List, name: &CStr) -> Option<*mut pg_sys::DefElem> {
    if options.is_null() {
        return None;
    }
    // SAFETY: the list has `length` elements, each a DefElem with a name.
    unsafe {
        (0..(*options).length)
            .map(|i| (*(*options).elements.add(i as usize)).ptr_value.cast::<pg_sys::DefElem>())
            .find(|element| CStr::from_ptr((**element).defname) == name)
    }
}

/// Ends the worker of that database, if there is one, and keeps it away until the transaction is over.
fn suspend(name: &[u8], right: Right) {
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

/// A worker that did not end by itself in this time (microseconds) is in the middle of something, and is cut off.
const BUSY: i64 = 500_000;

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

/// The transaction is over: the launcher looks at the databases again.
pub fn resume() {
    PREPARING.with(|p| *p = None);
    resume_where(|_| true);
}

/// The savepoint of this level rolled back.
pub fn roll_back(level: i32) {
    resume_where(|suspended| suspended.level >= level);
}

/// The savepoint of this level was released: what it did is the surrounding one's.
pub fn release(level: i32) {
    SUSPENDED.with(|suspended| suspended.iter_mut().for_each(|p| p.level = p.level.min(level - 1)));
}

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

/// Hands over the name of the transaction that has just been prepared.
pub fn with_prepared_name(f: impl FnOnce(&[u8])) {
    if let Some(name) = PREPARING.with(Option::take) {
        f(&name);
    }
}

unsafe extern "C-unwind" fn object_access(
    access: pg_sys::ObjectAccessType::Type,
    class: pg_sys::Oid,
    object: pg_sys::Oid,
    sub: std::ffi::c_int,
    argument: *mut std::ffi::c_void,
) {
    // SAFETY: the hook that was there before gets the arguments as they came; nothing here has a destructor.
    unsafe {
        if let Some(previous) = PREVIOUS_ACCESS {
            previous(access, class, object, sub, argument);
        }
    }
    if access == pg_sys::ObjectAccessType::OAT_DROP && class == pg_sys::ExtensionRelationId {
        extension_dropped(object);
    }
}

#[pgrx::pg_guard]
extern "C-unwind" fn extension_dropped(object: pg_sys::Oid) {
    // SAFETY: a catalog look-up in a transaction.
    if object == unsafe { pg_sys::get_extension_oid(c"pg_outbox".as_ptr(), true) } {
        note(|n| n.dropped = true);
    }
}

//! Commands that a connected worker would stand in the way of, the end of the extension, the end of an attachment, and
//! two-phase commit.
//!
//! | command | what happens |
//! | --- | --- |
//! | DROP DATABASE, ALTER DATABASE … RENAME, … SET TABLESPACE, CREATE DATABASE (its template) | the database is suspended: see [`crate::suspended`]. Not where PostgreSQL refuses the command: for want of rights, or in a transaction block |
//! | the extension is dropped in whatever way | the worker ends at commit; until then it waits for no lock |
//! | DISCARD ALL | the session's attachment ends, as with the session |
//! | PREPARE TRANSACTION, COMMIT PREPARED, ROLLBACK PREPARED | see [`crate::two_phase`] |

use crate::backend::Local;
use crate::commit::note;
use crate::suspended::{self, Right};
use crate::{roles, session, two_phase};
use pgrx::pg_sys;
use std::ffi::CStr;

static mut PREVIOUS_UTILITY: pg_sys::ProcessUtility_hook_type = None;
static mut PREVIOUS_ACCESS: pg_sys::object_access_hook_type = None;

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
        Some(Concern::Suspend(name, right)) => suspended::suspend(&name, right),
        Some(Concern::Prepare(name)) => two_phase::prepare(name),
        follows => FOLLOWS.with(|f| *f = follows),
    }
}

#[pgrx::pg_guard]
extern "C-unwind" fn after() {
    match FOLLOWS.with(Option::take) {
        Some(Concern::DiscardAll) => {
            session::detach();
        }
        Some(Concern::CommitPrepared(name)) => two_phase::commit(&name),
        Some(Concern::RollbackPrepared(name)) => two_phase::roll_back(&name),
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
        note(|n| n.control.dropped = true);
    }
}

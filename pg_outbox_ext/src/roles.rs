//! With whose rights code runs. Triggers, and what they call, may be anybody's who has a right to `outbox_events`; so
//! whatever touches that table runs as `outbox_owner`, a role that can do little, and leaves nothing behind that would
//! run later as somebody else:
//!
//! | left behind by a foreign trigger | would run as | kept off by |
//! | --- | --- | --- |
//! | a deferred trigger, a cursor WITH HOLD, a temporary table, a prepared statement | the session's role, at commit or later | PostgreSQL itself, in a security-restricted operation |
//! | a setting, such as `search_path` | the session's role, in its next statement | settings end with the call |
//! | a changed function, view, table or grant of the extension | whoever uses it next | `outbox_owner` changes no definition |

use crate::error::{Error, raise};
use pgrx::prelude::*;
use std::ffi::CStr;
use std::sync::OnceLock;

const OWNER: &CStr = c"outbox_owner";
const KEEPER: &CStr = c"outbox_keeper";
const DEFINER: i32 = pg_sys::SECURITY_LOCAL_USERID_CHANGE as i32;
const RESTRICTED: i32 = pg_sys::SECURITY_RESTRICTED_OPERATION as i32;

/// For the worker, in a transaction: does this as `outbox_owner`, whom it remains until [`be_oneself`]. Settings made
/// meanwhile end with it.
pub fn as_owner<R>(body: impl FnOnce() -> R) -> R {
    // SAFETY: a catalog look-up in a transaction, and assignments; an ERROR if there is no such role.
    let settings = unsafe {
        pg_sys::SetUserIdAndSecContext(pg_sys::get_role_oid(OWNER.as_ptr(), false), DEFINER | RESTRICTED);
        pg_sys::NewGUCNestLevel()
    };
    let result = body();
    // SAFETY: the level that was begun above; after an ERROR the end of the transaction ends it.
    unsafe { pg_sys::AtEOXact_GUC(false, settings) };
    result
}

/// For the worker, after the transaction.
pub fn be_oneself() {
    // SAFETY: a read of a variable and an assignment.
    unsafe { pg_sys::SetUserIdAndSecContext(pg_sys::GetSessionUserId(), 0) }
}

/// An ERROR if one of the extension's roles is about to change a definition: nothing of ours does, so it is a foreign
/// trigger that tries.
///
/// # Safety
/// The node is a statement as PostgreSQL's parser made it.
pub unsafe fn refuse_definition(statement: *mut pg_sys::Node) {
    // SAFETY: the first function reads the statement; the others are catalog look-ups, in the transaction that a
    // definition needs.
    let ours = unsafe {
        pg_sys::GetCommandLogLevel(statement) == pg_sys::LogStmtLevel::LOGSTMT_DDL && {
            let user = pg_sys::GetUserId();
            [OWNER, KEEPER].iter().any(|role| user == pg_sys::get_role_oid(role.as_ptr(), true))
        }
    };
    if ours {
        raise(Error::Definition);
    }
}

/// Runs a GRANT on what is not the extension's, from a script of the extension. PostgreSQL would take the privileges that
/// the object then has for initial ones, and pg_dump would leave them out.
#[pg_extern]
fn grant_apart(statement: &str) {
    // SAFETY: reads and assignments of a variable; after an ERROR the end of the script sets it.
    let script = unsafe { std::ptr::replace(&raw mut pg_sys::creating_extension, false) };
    if let Err(e) = Spi::run(statement) {
        error!("{statement}: {e}");
    }
    // SAFETY: as above.
    unsafe { pg_sys::creating_extension = script };
}

/// What a guarded call returns to.
#[repr(C)]
struct Outside {
    user: pg_sys::Oid,
    context: i32,
    settings: i32,
}

type Handler = unsafe extern "C-unwind" fn(pg_sys::FunctionCallInfo) -> pg_sys::Datum;

/// PL/pgSQL's own handler.
static PLPGSQL: OnceLock<Handler> = OnceLock::new();

/// Tells PostgreSQL how [`guarded_call`] is called.
#[unsafe(no_mangle)]
pub extern "C" fn pg_finfo_guarded_call() -> &'static pg_sys::Pg_finfo_record {
    static V1: pg_sys::Pg_finfo_record = pg_sys::Pg_finfo_record { api_version: 1 };
    &V1
}

/// The handler of the language `outbox_plpgsql`: a SECURITY DEFINER function in PL/pgSQL, as a security-restricted
/// operation whose settings end with it. An ERROR jumps over this frame, which owns nothing; the end of the
/// (sub)transaction then restores user and settings.
///
/// # Safety
/// Called by PostgreSQL's function manager.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn guarded_call(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    // SAFETY: PL/pgSQL's handler gets the call as it came.
    unsafe {
        let outside = enter();
        let handler = plpgsql();
        let result = handler(fcinfo);
        leave(outside);
        result
    }
}

#[pgrx::pg_guard]
extern "C-unwind" fn enter() -> Outside {
    let mut outside = Outside { user: pg_sys::InvalidOid, context: 0, settings: 0 };
    // SAFETY: reads and assignments of variables of this backend.
    unsafe {
        pg_sys::GetUserIdAndSecContext(&mut outside.user, &mut outside.context);
        if outside.context & DEFINER == 0 {
            // Nobody would end the restriction.
            raise(Error::NoDefiner);
        }
        outside.settings = pg_sys::NewGUCNestLevel();
        pg_sys::SetUserIdAndSecContext(outside.user, outside.context | RESTRICTED);
    }
    outside
}

#[pgrx::pg_guard]
extern "C-unwind" fn leave(outside: Outside) {
    // SAFETY: the counterparts of what `enter` did; false: no setting outlives the level.
    unsafe {
        pg_sys::AtEOXact_GUC(false, outside.settings);
        pg_sys::SetUserIdAndSecContext(outside.user, outside.context);
    }
}

#[pgrx::pg_guard]
extern "C-unwind" fn plpgsql() -> Handler {
    *PLPGSQL.get_or_init(|| {
        let (library, name) = (c"$libdir/plpgsql".as_ptr(), c"plpgsql_call_handler".as_ptr());
        // SAFETY: loads the library of PL/pgSQL, which is never unloaded; an ERROR if it has no such function, which is
        // one of that type.
        unsafe {
            let function = pg_sys::load_external_function(library, name, true, std::ptr::null_mut());
            std::mem::transmute::<*mut std::ffi::c_void, Handler>(function.cast())
        }
    })
}

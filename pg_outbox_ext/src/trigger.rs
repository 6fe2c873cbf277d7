//! The row triggers of outbox_events. They run in the application's transaction, so they read a few columns, leave a note,
//! and can't fail: no table is touched, nothing is waited for. The one before an insert adds the statement's trace context,
//! if there is one.

use crate::backend::Local;
use crate::commit::note;
use crate::counters::bucket;
use crate::error::{Error, raise};
use crate::marks::as_lowered;
use crate::note::{Note, Rows};
use crate::status::Status;
use crate::traceparent::{self, Traceparent};
use crate::{clock, guc};
use pgrx::pg_sys;

/// Columns by number, as `sql/10_tables.sql` creates them. Later ones only follow.
mod column {
    pub const ID: i32 = 1;
    pub const METADATA: i32 = 9;
    pub const CREATED_AT: i32 = 10;
    pub const AVAILABLE_AT: i32 = 11;
    pub const STATUS: i32 = 12;
    pub const PROCESSED_AT: i32 = 15;
    pub const CLAIM_TOKEN: i32 = 16;
    pub const LISTED: i32 = 17;
}

/// One row of outbox_events.
struct Row {
    tuple: pg_sys::HeapTuple,
    shape: pg_sys::TupleDesc,
}

impl Row {
    fn get(&self, column: i32) -> Option<pg_sys::Datum> {
        let mut null = false;
        // SAFETY: the executor gave tuple and descriptor of one relation, and they live as long as the trigger runs.
        let datum = unsafe { pg_sys::heap_getattr(self.tuple, column, self.shape, &mut null) };
        (!null).then_some(datum)
    }

    fn int(&self, column: i32) -> Option<i64> {
        self.get(column).map(|datum| datum.value() as i64)
    }

    fn status(&self) -> Option<Status> {
        let datum = self.get(column::STATUS)?;
        // SAFETY: the column is text; a CHECK holds it to words so short that they are stored as they are.
        Status::parse(unsafe { pgrx::varlena::varlena_to_byte_slice(datum.cast_mut_ptr()) })
    }

    fn is_unlisted(&self) -> bool {
        self.status() == Some(Status::Pending) && self.int(column::LISTED) == Some(0)
    }

    /// Found by walking the primary key.
    fn is_fresh(&self) -> bool {
        self.is_unlisted() && self.get(column::AVAILABLE_AT).is_none()
    }

    /// When a scheduled event that is not routed yet can go.
    fn scheduled(&self) -> Option<i64> {
        self.int(column::AVAILABLE_AT).filter(|_| self.is_unlisted())
    }
}

/// What the executor says of the change: the old and the new row where there are any. `truncated`: all rows are gone, or a
/// statement added rows that only the tables can tell about.
struct Change {
    old: Option<Row>,
    new: Option<Row>,
    truncated: bool,
}

impl Change {
    /// None: not called as a trigger. An ERROR if the table is not the extension's.
    fn read(fcinfo: pg_sys::FunctionCallInfo) -> Option<Change> {
        // SAFETY: the executor passes a TriggerData as context of a trigger call, which its node tag confirms.
        unsafe {
            let data = (*fcinfo).context.cast::<pg_sys::TriggerData>();
            if data.is_null() || (*data).type_ != pg_sys::NodeTag::T_TriggerData {
                return None;
            }
            check_table((*(*data).tg_relation).rd_id);
            let shape = (*(*data).tg_relation).rd_att;
            let row = |tuple: pg_sys::HeapTuple| (!tuple.is_null()).then_some(Row { tuple, shape });
            let (first, second) = (row((*data).tg_trigtuple), row((*data).tg_newtuple));
            Some(match (*data).tg_event & pg_sys::TRIGGER_EVENT_OPMASK {
                pg_sys::TRIGGER_EVENT_INSERT => Change { old: None, truncated: first.is_none(), new: first },
                pg_sys::TRIGGER_EVENT_UPDATE => Change { old: first, new: second, truncated: false },
                pg_sys::TRIGGER_EVENT_DELETE => Change { old: first, new: None, truncated: false },
                _ => Change { old: None, new: None, truncated: true },
            })
        }
    }
}

/// The table that was found to be the extension's.
static OURS: Local<pg_sys::Oid> = Local::new(pg_sys::InvalidOid);

/// Whoever may execute the trigger functions may attach them to any table of its own, whose columns are others.
#[pgrx::pg_guard]
extern "C-unwind" fn check_table(table: pg_sys::Oid) {
    if OURS.with(|ours| *ours == table) {
        return;
    }
    // SAFETY: catalog look-ups in a transaction.
    let ours = unsafe {
        let extension = pg_sys::get_extension_oid(c"pg_outbox".as_ptr(), true);
        extension != pg_sys::InvalidOid && pg_sys::getExtensionOfObject(pg_sys::RelationRelationId, table) == extension
    };
    if !ours {
        raise(Error::OtherTable);
    }
    OURS.with(|last| *last = table);
}

fn inserted(row: &Row, note: &mut Note) {
    let id = row.int(column::ID).unwrap_or(0);
    if !row.is_unlisted() {
        // A restore, or rows copied by hand: only the tables can tell what is owed.
        note.control.recover = true;
        return;
    }
    let rows = &mut note.rows;
    rows.by_status[Status::Pending] += 1;
    rows.published += 1;
    match row.scheduled() {
        Some(at) if at > clock::now() => rows.due_at(at),
        Some(_) => rows.list(id),
        None => {
            rows.lower(as_lowered(id));
            rows.list(id);
        }
    }
}

fn changed(old: &Row, new: &Row, rows: &mut Rows) {
    let (from, to) = (old.status(), new.status());
    if from != to {
        count(from, -1, rows);
        count(to, 1, rows);
        match to {
            Some(Status::Processed) => {
                rows.processed += 1;
                if let (Some(at), Some(kept)) = (new.int(column::PROCESSED_AT), guc::retention()) {
                    rows.retain_until(at.saturating_add(kept));
                }
                rows.latency(bucket(latency(new)));
            }
            Some(Status::Failed) => rows.failed += 1,
            _ => {}
        }
    }
    if new.is_fresh() && !old.is_fresh() {
        rows.lower(as_lowered(new.int(column::ID).unwrap_or(0)));
        rows.wake_released |= old.get(column::CLAIM_TOKEN).is_none();
    }
    if let Some(at) = new.scheduled() {
        rows.due_at(at);
    }
}

/// Microseconds from when the event could be delivered to when it was.
fn latency(row: &Row) -> i64 {
    let from = row.int(column::CREATED_AT).max(row.int(column::AVAILABLE_AT));
    match (row.int(column::PROCESSED_AT), from) {
        (Some(processed), Some(from)) => processed.saturating_sub(from),
        _ => 0,
    }
}

fn count(status: Option<Status>, by: i64, rows: &mut Rows) {
    if let Some(status) = status {
        rows.by_status[status] += by;
    }
}

static V1: pg_sys::Pg_finfo_record = pg_sys::Pg_finfo_record { api_version: 1 };

/// Tells PostgreSQL how [`notify_outbox_event`] is called.
#[unsafe(no_mangle)]
pub extern "C" fn pg_finfo_notify_outbox_event() -> &'static pg_sys::Pg_finfo_record {
    &V1
}

/// AFTER INSERT FOR EACH ROW.
///
/// # Safety
/// Called by PostgreSQL's executor.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn notify_outbox_event(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    if let Some(Change { new: Some(row), .. }) = Change::read(fcinfo) {
        note(|n| inserted(&row, n));
    }
    pg_sys::Datum::null()
}

/// Tells PostgreSQL how [`track_outbox_change`] is called.
#[unsafe(no_mangle)]
pub extern "C" fn pg_finfo_track_outbox_change() -> &'static pg_sys::Pg_finfo_record {
    &V1
}

/// AFTER UPDATE OR DELETE FOR EACH ROW, and AFTER TRUNCATE.
///
/// # Safety
/// Called by PostgreSQL's executor.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn track_outbox_change(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    match Change::read(fcinfo) {
        Some(Change { truncated: true, .. }) => note(|n| n.control.recover = true),
        Some(Change { old: Some(old), new: Some(new), .. }) => note(|n| changed(&old, &new, &mut n.rows)),
        Some(Change { old: Some(old), new: None, .. }) => note(|n| count(old.status(), -1, &mut n.rows)),
        _ => {}
    }
    pg_sys::Datum::null()
}

/// Bytes of metadata to which nothing is added any more.
const MOST_METADATA: usize = 1 << 20;

/// Bytes before the contents of a value that is not compressed.
const HEADER: usize = 4;

/// The row with the context in its metadata. None: the metadata is no object, or large.
///
/// # Safety
/// In a trigger, with the tuple that the executor gave it.
unsafe fn with_context(row: &Row, context: &Traceparent) -> Option<pg_sys::HeapTuple> {
    let datum = row.get(column::METADATA)?;
    // SAFETY: the column is jsonb, whose value is fetched before its first word is read; the functions are PostgreSQL's
    // own, with arguments of their types, and what they return lives as long as the trigger's memory.
    unsafe {
        if pg_sys::toast_raw_datum_size(datum) as usize > MOST_METADATA {
            return None;
        }
        let metadata = pg_sys::pg_detoast_datum(datum.cast_mut_ptr());
        let container = metadata.cast::<u8>().add(HEADER).cast::<u32>().read_unaligned();
        if container & pg_sys::JB_FOBJECT == 0 {
            return None;
        }
        let text = [&b"{\"traceparent\": \""[..], context, b"\"}\0"].concat();
        let call = |function: u32, first, second| {
            pg_sys::OidFunctionCall2Coll(function.into(), pg_sys::InvalidOid, first, second)
        };
        let ours = pg_sys::OidFunctionCall1Coll(pg_sys::F_JSONB_IN.into(), pg_sys::InvalidOid, text.as_ptr().into());
        // What the metadata says itself comes last, and wins.
        let mut both = call(pg_sys::F_JSONB_CONCAT, ours, metadata.into());
        let (mut which, mut null) = (column::METADATA, false);
        Some(pg_sys::heap_modify_tuple_by_cols(row.tuple, row.shape, 1, &mut which, &mut both, &mut null))
    }
}

/// Tells PostgreSQL how [`take_trace_context`] is called.
#[unsafe(no_mangle)]
pub extern "C" fn pg_finfo_take_trace_context() -> &'static pg_sys::Pg_finfo_record {
    &V1
}

/// BEFORE INSERT FOR EACH ROW: the trace context of the statement becomes the event's, unless its metadata has one.
///
/// # Safety
/// Called by PostgreSQL's executor.
#[unsafe(no_mangle)]
#[pgrx::pg_guard]
pub unsafe extern "C-unwind" fn take_trace_context(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    let Some(Change { new: Some(row), .. }) = Change::read(fcinfo) else {
        return pg_sys::Datum::null();
    };
    // SAFETY: the tuple is the executor's, for the time of this call.
    let changed = traceparent::of_statement().and_then(|context| unsafe { with_context(&row, &context) });
    changed.unwrap_or(row.tuple).into()
}

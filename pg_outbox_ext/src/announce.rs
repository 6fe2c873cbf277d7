//! What the worker says of new events: their descriptions, in bounded steps, as notifications.

use crate::attempt::set_local;
use crate::guc::NotifyPayload;
use crate::pack::{Described, Packer};
use pgrx::prelude::*;
use pgrx::spi::OwnedPreparedStatement;
use std::ffi::CString;

unsafe extern "C-unwind" {
    /// Queues a notification for the commit of this transaction (commands/async.h).
    fn Async_Notify(channel: *const std::ffi::c_char, payload: *const std::ffi::c_char);
}

/// Whoever holds the table of events longer than that has them announced without a description.
const LOCK_MS: u32 = 20;

/// Events described in one call: what a call may take in memory is so often what `outbox._describe()` renders of one.
fn at_a_time(mode: NotifyPayload) -> usize {
    match mode {
        NotifyPayload::full => 64,
        _ => 256,
    }
}

/// The statement that describes events, prepared when the first are announced.
#[derive(Default)]
pub struct Describer(Option<OwnedPreparedStatement>);

impl Describer {
    /// Payloads for these events, in their order. In a transaction; nothing is waited for.
    pub fn payloads(&mut self, ids: &[i64], mode: NotifyPayload) -> Vec<Vec<u8>> {
        if ids.is_empty() {
            return Vec::new();
        }
        set_local(c"lock_timeout", LOCK_MS);
        let mut packer = Packer::default();
        for some in ids.chunks(at_a_time(mode)) {
            match self.describe(some.to_vec(), mode.name()) {
                Ok(events) => events.iter().for_each(|event| packer.add(event)),
                Err(e) => error!("describing events: {e}"),
            }
            if packer.is_full() {
                break;
            }
        }
        set_local(c"lock_timeout", 0);
        packer.finish()
    }

    fn describe(&mut self, ids: Vec<i64>, mode: &str) -> spi::Result<Vec<Described>> {
        Spi::connect(|client| {
            let statement = match &mut self.0 {
                Some(statement) => statement,
                nothing => {
                    let text = "SELECT d.bodies, d.cuts, d.shorts FROM outbox._describe($1, $2) d";
                    let types = [PgBuiltInOids::INT8ARRAYOID.into(), PgBuiltInOids::TEXTOID.into()];
                    nothing.insert(client.prepare(text, &types)?.keep())
                }
            };
            let row = client.select(&*statement, None, &[ids.into(), mode.into()])?.first();
            // As arrays: each value that is read by itself has its type looked up.
            let texts = |column| -> spi::Result<Vec<Option<Vec<u8>>>> {
                let all = row.get::<pgrx::Array<&[u8]>>(column)?;
                Ok(all.map(|all| all.iter().map(|text| text.map(<[u8]>::to_vec)).collect()).unwrap_or_default())
            };
            let all = texts(1)?.into_iter().zip(texts(2)?).zip(texts(3)?);
            Ok(all.map(|((body, cut), short)| Described { body, cut, short: short.unwrap_or_default() }).collect())
        })
    }
}

/// In a transaction, which sends them when it commits.
pub fn send(payloads: &[Vec<u8>]) {
    for payload in payloads {
        match CString::new(payload.as_slice()) {
            // SAFETY: two strings that end in NUL; the function copies them.
            Ok(text) => unsafe { Async_Notify(c"outbox_events".as_ptr(), text.as_ptr()) },
            Err(e) => error!("a payload with a zero byte: {e}"),
        }
    }
}

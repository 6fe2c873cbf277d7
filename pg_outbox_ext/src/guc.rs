//! The settings.

use pgrx::{GucContext, GucFlags, GucRegistry, GucSetting, PostgresGucEnum};
use std::ffi::CString;

/// What a notification says of each event.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PostgresGucEnum)]
#[allow(non_camel_case_types, reason = "the variants are the values that users write")]
pub enum NotifyPayload {
    id,
    metadata,
    full,
}

impl NotifyPayload {
    pub fn name(self) -> &'static str {
        match self {
            NotifyPayload::id => "id",
            NotifyPayload::metadata => "metadata",
            NotifyPayload::full => "full",
        }
    }
}

pub static NOTIFY_PAYLOAD: GucSetting<NotifyPayload> = GucSetting::<NotifyPayload>::new(NotifyPayload::metadata);
static RETENTION: GucSetting<i32> = GucSetting::<i32>::new(7 * 24 * 3600);
static INBOX_RETENTION: GucSetting<i32> = GucSetting::<i32>::new(30 * 24 * 3600);
static TRACEPARENT: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(None);
static WEBHOOK_ALLOW_NETWORKS: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(Some(c""));

/// How long processed events are kept, in microseconds; none: for ever.
pub fn retention() -> Option<i64> {
    let seconds = RETENTION.get();
    (seconds >= 0).then_some(i64::from(seconds) * 1_000_000)
}

/// What the application says of the transaction's trace context, unchecked.
pub fn traceparent() -> Option<CString> {
    TRACEPARENT.get()
}

pub fn define() {
    GucRegistry::define_enum_guc(
        c"outbox.notify_payload",
        c"What a notification says of each event.",
        c"id: id and event_id; metadata: all but the data; full: with event_data and metadata.",
        &NOTIFY_PAYLOAD,
        GucContext::Suset,
        GucFlags::default(),
    );
    GucRegistry::define_int_guc(
        c"outbox.retention",
        c"How long processed events are kept.",
        c"-1 keeps them for ever. Dead letters stay in any case.",
        &RETENTION,
        -1,
        i32::MAX,
        GucContext::Suset,
        GucFlags::UNIT_S,
    );
    GucRegistry::define_int_guc(
        c"outbox.inbox_retention",
        c"How long outbox.first_time() remembers an event.",
        c"-1 remembers it for ever.",
        &INBOX_RETENTION,
        -1,
        i32::MAX,
        GucContext::Suset,
        GucFlags::UNIT_S,
    );
    GucRegistry::define_string_guc(
        c"outbox.traceparent",
        c"Trace context of the events that are inserted from now on.",
        c"A W3C traceparent, for events whose metadata has none. What is not well-formed is ignored.",
        &TRACEPARENT,
        GucContext::Userset,
        GucFlags::default(),
    );
    GucRegistry::define_string_guc(
        c"outbox.webhook_allow_networks",
        c"Networks that webhooks may reach although they are not public.",
        c"CIDR notation, separated by commas.",
        &WEBHOOK_ALLOW_NETWORKS,
        GucContext::Suset,
        GucFlags::default(),
    );
}

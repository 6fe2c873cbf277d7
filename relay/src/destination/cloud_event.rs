//! An event as CloudEvents 1.0 describes it: the attributes that all of its modes share.
//!
//! Source: <https://github.com/cloudevents/spec>, version 1.0: the core specification, the extension "Distributed Tracing",
//! and for names and values the bindings of HTTP and AMQP.

use std::borrow::Cow;
use std::time::UNIX_EPOCH;

use chrono::{DateTime, SecondsFormat};
use serde::{Serialize, Serializer};

use super::Event;

/// 0000-01-01 and the end of 9999-12-31, the range of RFC 3339, in microseconds since 1970.
const YEAR_0: i64 = -62_167_219_200_000_000;
const YEAR_9999: i64 = 253_402_300_799_999_999;

/// The type of the data. In binary mode it is the message's own content type and no attribute.
pub const DATA_TYPE: &str = "application/json";

/// The attributes of one event but for `datacontenttype`.
pub struct Attributes<'a>(Vec<(&'static str, Cow<'a, str>)>);

impl<'a> Attributes<'a> {
    /// `source`: the operator's own.
    pub fn of(event: &'a Event, source: Option<&'a str>) -> Self {
        let given = |text: &'a Option<String>| text.as_deref().map(Cow::Borrowed);
        let all = [
            ("specversion", Some(Cow::Borrowed("1.0"))),
            ("id", Some(Cow::Owned(event.event_id.to_string()))),
            ("source", Some(source.map_or_else(|| Cow::Owned(source_of(event)), Cow::Borrowed))),
            ("type", Some(Cow::Borrowed(event.event_type.as_str()))),
            ("time", Some(Cow::Owned(timestamp(event)))),
            ("subject", given(&event.aggregate_id)),
            ("eventversion", Some(Cow::Borrowed(event.event_version.as_str()))),
            ("tenantid", given(&event.tenant_id)),
            ("traceparent", event.metadata.string("traceparent")),
            ("tracestate", event.metadata.string("tracestate")),
        ];
        // An attribute is absent or has a value that is not empty.
        let present = all.into_iter().filter_map(|(name, value)| Some((name, value.filter(|text| !text.is_empty())?)));
        Attributes(present.collect())
    }

    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.0.iter().map(|(name, value)| (*name, &**value))
    }
}

/// As the JSON format writes them.
impl Serialize for Attributes<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter().chain([("datacontenttype", DATA_TYPE)]))
    }
}

/// RFC 3339, in UTC. A moment that it can't write is the nearest that it can.
pub fn timestamp(event: &Event) -> String {
    let micros = match event.created_at.duration_since(UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_micros()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_micros()).map_or(i64::MIN, |micros| -micros),
    };
    let at = DateTime::from_timestamp_micros(micros.clamp(YEAR_0, YEAR_9999)).unwrap_or_default();
    at.to_rfc3339_opts(SecondsFormat::Micros, true)
}

/// A relative URI reference, as CloudEvents allows.
fn source_of(event: &Event) -> String {
    match &event.aggregate_type {
        Some(kind) => {
            format!("/pg_outbox/{}", kind.replace(|c: char| !c.is_ascii_alphanumeric() && !"-._~".contains(c), "-"))
        }
        None => "/pg_outbox".into(),
    }
}

/// A value as a header of HTTP holds it: spaces, double quotes, percent signs and all beyond visible ASCII are the percent
/// signs and hexadecimal digits of their UTF-8.
pub fn header_value(value: &str) -> String {
    let mut text = String::with_capacity(value.len());
    for byte in value.bytes() {
        match byte {
            b'"' | b'%' => text.push_str(&format!("%{byte:02X}")),
            b'!'..=b'~' => text.push(byte.into()),
            _ => text.push_str(&format!("%{byte:02X}")),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::destination::{json::Object, sample_event};

    #[test]
    fn moments_that_no_timestamp_can_name_are_the_nearest_that_one_can() {
        let mut event = sample_event();
        event.created_at = UNIX_EPOCH + std::time::Duration::from_secs(9_000_000_000_000);
        assert_eq!(timestamp(&event), "9999-12-31T23:59:59.999999Z");
        event.created_at = UNIX_EPOCH - std::time::Duration::from_secs(200_000_000_000);
        assert_eq!(timestamp(&event), "0000-01-01T00:00:00.000000Z");
        event.created_at = UNIX_EPOCH + std::time::Duration::from_micros(1_764_019_107_000_042);
        assert_eq!(timestamp(&event), "2025-11-24T21:18:27.000042Z");
    }

    #[test]
    fn an_event_has_the_attributes_that_the_standard_requires() {
        let mut event = sample_event();
        event.metadata = Object::new(r#"{"traceparent": "00-a-b-01", "tracestate": 7}"#);
        (event.aggregate_id, event.tenant_id) = (Some(String::new()), Some("acme".into()));
        let id = event.event_id.to_string();
        let attributes = Attributes::of(&event, None);
        assert_eq!(
            attributes.iter().collect::<Vec<_>>(),
            [
                ("specversion", "1.0"),
                ("id", &id),
                ("source", "/pg_outbox/contact"),
                ("type", "contact.created"),
                ("time", "1970-01-01T00:00:00.000000Z"),
                ("eventversion", "v1"),
                ("tenantid", "acme"),
                ("traceparent", "00-a-b-01"),
            ]
        );
        let own = Attributes::of(&event, Some("https://shop.example/orders"));
        assert!(own.iter().any(|pair| pair == ("source", "https://shop.example/orders")));
    }

    /// The examples of the HTTP binding, section 3.1.3.2.
    #[test]
    fn values_are_encoded_as_the_http_binding_says() {
        assert_eq!(header_value("Euro € 😀"), "Euro%20%E2%82%AC%20%F0%9F%98%80");
        assert_eq!(header_value("a\"b%c\r\n\u{7f}~!"), "a%22b%25c%0D%0A%7F~!");
    }
}

//! Bodies of webhooks: the project's own, after Standard Webhooks, or CloudEvents 1.0 in structured mode.

use std::time::UNIX_EPOCH;

use chrono::{DateTime, SecondsFormat};
use serde_json::value::RawValue;

use super::{ConfigError, Event};

/// 0000-01-01 and the end of 9999-12-31, the range of RFC 3339, in microseconds since 1970.
const YEAR_0: i64 = -62_167_219_200_000_000;
const YEAR_9999: i64 = 253_402_300_799_999_999;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Standard,
    CloudEvents,
}

impl Format {
    pub fn parse(text: Option<&str>) -> Result<Self, ConfigError> {
        match text {
            None | Some("standard") => Ok(Format::Standard),
            Some("cloudevents") => Ok(Format::CloudEvents),
            Some(other) => Err(ConfigError(format!("settings.format is standard or cloudevents, not {other:?}"))),
        }
    }

    pub fn content_type(self) -> &'static str {
        match self {
            Format::Standard => "application/json",
            Format::CloudEvents => "application/cloudevents+json",
        }
    }

    /// The JSON text. `event_data` goes in as PostgreSQL printed it.
    pub fn body(self, event: &Event) -> Result<Vec<u8>, serde_json::Error> {
        let data: &RawValue = serde_json::from_str(&event.event_data)?;
        match self {
            Format::Standard => serde_json::to_vec(&Standard {
                kind: &event.event_type,
                timestamp: timestamp(event),
                data,
                id: event.event_id,
                version: &event.event_version,
                aggregate_type: event.aggregate_type.as_deref(),
                aggregate_id: event.aggregate_id.as_deref(),
                tenant_id: event.tenant_id.as_deref(),
            }),
            Format::CloudEvents => serde_json::to_vec(&CloudEvent {
                specversion: "1.0",
                id: event.event_id,
                source: source(event),
                kind: &event.event_type,
                time: timestamp(event),
                subject: event.aggregate_id.as_deref(),
                datacontenttype: "application/json",
                eventversion: &event.event_version,
                tenantid: event.tenant_id.as_deref(),
                traceparent: event.metadata.get("traceparent").and_then(|v| v.as_str()),
                tracestate: event.metadata.get("tracestate").and_then(|v| v.as_str()),
                data,
            }),
        }
    }
}

/// RFC 3339, in UTC. A moment that it can't write is the nearest that it can.
fn timestamp(event: &Event) -> String {
    let micros = match event.created_at.duration_since(UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_micros()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_micros()).map_or(i64::MIN, |micros| -micros),
    };
    let at = DateTime::from_timestamp_micros(micros.clamp(YEAR_0, YEAR_9999)).unwrap_or_default();
    at.to_rfc3339_opts(SecondsFormat::Micros, true)
}

/// A relative URI reference, as CloudEvents allows.
fn source(event: &Event) -> String {
    match &event.aggregate_type {
        Some(kind) => {
            format!("/pg_outbox/{}", kind.replace(|c: char| !c.is_ascii_alphanumeric() && !"-._~".contains(c), "-"))
        }
        None => "/pg_outbox".into(),
    }
}

#[derive(serde::Serialize)]
struct Standard<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    timestamp: String,
    data: &'a RawValue,
    id: uuid::Uuid,
    version: &'a str,
    aggregate_type: Option<&'a str>,
    aggregate_id: Option<&'a str>,
    tenant_id: Option<&'a str>,
}

#[derive(serde::Serialize)]
struct CloudEvent<'a> {
    specversion: &'static str,
    id: uuid::Uuid,
    source: String,
    #[serde(rename = "type")]
    kind: &'a str,
    time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    subject: Option<&'a str>,
    datacontenttype: &'static str,
    eventversion: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    tenantid: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    traceparent: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tracestate: Option<&'a str>,
    data: &'a RawValue,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::destination::sample_event;

    #[test]
    fn numbers_arrive_digit_for_digit() {
        let mut event = sample_event();
        event.event_data = r#"{"amount": 123456789012345678901234567890.10}"#.into();
        let body = String::from_utf8(Format::Standard.body(&event).expect("a body")).expect("text");
        assert!(body.contains("123456789012345678901234567890.10"), "{body}");
    }

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
    fn a_cloud_event_has_what_the_standard_requires() {
        let mut event = sample_event();
        event.metadata = serde_json::json!({"traceparent": "00-a-b-01"});
        let body: serde_json::Value =
            serde_json::from_slice(&Format::CloudEvents.body(&event).expect("a body")).expect("JSON");
        assert_eq!(body["specversion"], "1.0");
        assert_eq!(body["id"], event.event_id.to_string());
        assert_eq!(body["type"], "contact.created");
        assert_eq!(body["source"], "/pg_outbox/contact");
        assert_eq!(body["traceparent"], "00-a-b-01");
    }
}

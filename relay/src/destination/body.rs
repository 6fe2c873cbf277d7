//! Bodies of webhooks: the project's own, after Standard Webhooks, or CloudEvents 1.0 in structured mode.

use serde_json::value::RawValue;

use super::{ConfigError, Event};

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

/// RFC 3339, in UTC.
fn timestamp(event: &Event) -> String {
    let at: chrono::DateTime<chrono::Utc> = event.created_at.into();
    at.to_rfc3339_opts(chrono::SecondsFormat::Micros, true)
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

//! Bodies of webhooks: the project's own, after Standard Webhooks, or CloudEvents 1.0 in structured mode.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::UNIX_EPOCH;

use bytes::Bytes;
use chrono::{DateTime, SecondsFormat};

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

    /// The JSON text in parts. `event_data` is shared with the event: however many destinations and attempts there are, it
    /// is in memory once.
    pub fn body(self, event: &Event) -> Result<Parts, serde_json::Error> {
        let (before, after) = match self {
            Format::Standard => (
                open(&Head { kind: &event.event_type, timestamp: timestamp(event) })?,
                close(&Tail {
                    id: event.event_id,
                    version: &event.event_version,
                    aggregate_type: event.aggregate_type.as_deref(),
                    aggregate_id: event.aggregate_id.as_deref(),
                    tenant_id: event.tenant_id.as_deref(),
                })?,
            ),
            Format::CloudEvents => (
                open(&CloudEvent {
                    specversion: "1.0",
                    id: event.event_id,
                    source: source(event),
                    kind: &event.event_type,
                    time: timestamp(event),
                    subject: event.aggregate_id.as_deref(),
                    datacontenttype: "application/json",
                    eventversion: &event.event_version,
                    tenantid: event.tenant_id.as_deref(),
                    traceparent: event.metadata.string("traceparent"),
                    tracestate: event.metadata.string("tracestate"),
                })?,
                b"}".to_vec(),
            ),
        };
        Ok(Parts([before.into(), event.event_data.clone(), after.into()]))
    }
}

/// An object whose last member `data` is still to come.
fn open(object: &impl serde::Serialize) -> Result<Vec<u8>, serde_json::Error> {
    let mut text = serde_json::to_vec(object)?;
    text.pop();
    text.extend_from_slice(b",\"data\":");
    Ok(text)
}

/// The members that follow.
fn close(object: &impl serde::Serialize) -> Result<Vec<u8>, serde_json::Error> {
    let mut text = serde_json::to_vec(object)?;
    text[0] = b',';
    Ok(text)
}

/// A body as it is sent: what precedes the event's data, the data, and what follows it.
#[derive(Debug, Clone)]
pub struct Parts([Bytes; 3]);

impl Parts {
    pub fn len(&self) -> usize {
        self.0.iter().map(Bytes::len).sum()
    }

    pub fn slices(&self) -> impl Iterator<Item = &[u8]> + Clone {
        self.0.iter().map(|part| &part[..])
    }

    /// Small ones go out in one piece, large ones without being copied together.
    pub fn into_body(self) -> reqwest::Body {
        match self.len() {
            0..=MAX_JOINED => self.0.concat().into(),
            _ => reqwest::Body::wrap(Stream { left: self.len() as u64, parts: self.0.into() }),
        }
    }
}

/// Up to here a copy is cheaper than a write of its own for each part.
const MAX_JOINED: usize = 64 * 1024;

/// Sent with its length: receivers need not understand chunks.
struct Stream {
    parts: VecDeque<Bytes>,
    left: u64,
}

impl http_body::Body for Stream {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, Self::Error>>> {
        let this = self.get_mut();
        let part = this.parts.pop_front();
        this.left -= part.as_ref().map_or(0, |part| part.len() as u64);
        Poll::Ready(part.map(|part| Ok(http_body::Frame::data(part))))
    }

    fn is_end_stream(&self) -> bool {
        self.parts.is_empty()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        http_body::SizeHint::with_exact(self.left)
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
struct Head<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    timestamp: String,
}

#[derive(serde::Serialize)]
struct Tail<'a> {
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
    traceparent: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tracestate: Option<Cow<'a, str>>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::destination::{json::Object, sample_event};

    fn text(format: Format, event: &Event) -> String {
        let parts = format.body(event).expect("a body");
        String::from_utf8(parts.slices().collect::<Vec<_>>().concat()).expect("text")
    }

    #[test]
    fn numbers_arrive_digit_for_digit() {
        let mut event = sample_event();
        event.event_data = r#"{"amount": 123456789012345678901234567890.10}"#.into();
        let body = text(Format::Standard, &event);
        assert!(body.contains("123456789012345678901234567890.10"), "{body}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&body).expect("JSON")["id"], event.event_id.to_string());
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
        event.metadata = Object::new(r#"{"traceparent": "00-a-b-01"}"#);
        let body: serde_json::Value = serde_json::from_str(&text(Format::CloudEvents, &event)).expect("JSON");
        assert_eq!(body["specversion"], "1.0");
        assert_eq!(body["id"], event.event_id.to_string());
        assert_eq!(body["type"], "contact.created");
        assert_eq!(body["source"], "/pg_outbox/contact");
        assert_eq!(body["traceparent"], "00-a-b-01");
    }
}

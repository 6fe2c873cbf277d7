//! Bodies of webhooks and messages: the event's data alone, in the project's own envelope after Standard Webhooks, or in
//! that of CloudEvents.

use std::collections::{BTreeMap, VecDeque};
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use serde_json::value::RawValue;

use super::cloud_event::{Attributes, DATA_TYPE, timestamp};
use super::json::Object;
use super::patterns::Patterns;
use super::{ConfigError, Event};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The data in an envelope of ours.
    Standard,
    /// The data alone.
    Data,
    /// CloudEvents in structured mode: the data in an envelope of JSON.
    CloudEvents,
    /// CloudEvents in binary mode: the data alone, its attributes beside it.
    CloudEventsBinary,
}

/// How a destination writes events.
#[derive(Debug, Clone)]
pub struct Style {
    pub format: Format,
    /// CloudEvents' `source`, unless it follows from the event.
    pub source: Option<String>,
    /// Which members of an event's metadata go along.
    pub metadata: Patterns,
}

impl Style {
    /// Webhooks: an envelope that holds no metadata, unless the settings say otherwise.
    pub fn of_webhook(settings: &Object) -> Result<Self, ConfigError> {
        Self::parse(settings, Format::Standard, &[])
    }

    /// Messages: the data alone and all that fits of the metadata as headers, unless the settings say otherwise.
    pub fn of_message(settings: &Object) -> Result<Self, ConfigError> {
        let style = Self::parse(settings, Format::Data, &["*"])?;
        match style.format {
            Format::Standard => Err(ConfigError("settings.format is standard, which is for webhooks".into())),
            _ => Ok(style),
        }
    }

    fn parse(settings: &Object, fallback: Format, metadata: &[&str]) -> Result<Self, ConfigError> {
        let format = match settings.string("format").as_deref() {
            None if settings.member("format").is_some() => {
                return Err(ConfigError("settings.format is no text".into()));
            }
            None => fallback,
            Some("standard") => Format::Standard,
            Some("data") => Format::Data,
            Some("cloudevents") => Format::CloudEvents,
            Some("cloudevents-binary") => Format::CloudEventsBinary,
            Some(other) => return Err(ConfigError(format!("unknown settings.format {other:?}"))),
        };
        let source = settings.string("source").map(Into::into);
        Ok(Style { format, source, metadata: Patterns::parse(settings, "metadata", metadata)? })
    }

    pub fn content_type(&self) -> &'static str {
        match self.format {
            Format::Standard | Format::Data | Format::CloudEventsBinary => DATA_TYPE,
            Format::CloudEvents => "application/cloudevents+json",
        }
    }

    /// What binary mode puts beside the body; none in other formats.
    pub fn attributes<'a>(&'a self, event: &'a Event) -> Option<Attributes<'a>> {
        (self.format == Format::CloudEventsBinary).then(|| Attributes::of(event, self.source.as_deref()))
    }

    /// The JSON text in parts. `event_data` is shared with the event: however many destinations and attempts there are, it
    /// is in memory once.
    pub fn body(&self, event: &Event) -> Result<Parts, serde_json::Error> {
        let (before, after) = match self.format {
            Format::Data | Format::CloudEventsBinary => (Vec::new(), Vec::new()),
            Format::Standard => (
                open(&Head { kind: &event.event_type, timestamp: timestamp(event) })?,
                close(&Tail {
                    id: event.event_id,
                    version: &event.event_version,
                    aggregate_type: event.aggregate_type.as_deref(),
                    aggregate_id: event.aggregate_id.as_deref(),
                    tenant_id: event.tenant_id.as_deref(),
                    metadata: (!self.metadata.is_empty()).then(|| self.metadata_of(event)),
                })?,
            ),
            Format::CloudEvents => (open(&Attributes::of(event, self.source.as_deref()))?, b"}".to_vec()),
        };
        Ok(Parts([before.into(), event.event_data.clone(), after.into()]))
    }

    fn metadata_of<'a>(&self, event: &'a Event) -> BTreeMap<&'a str, &'a RawValue> {
        event.metadata.members().filter(|(name, _)| self.metadata.match_name(name)).collect()
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
    #[cfg(test)]
    pub fn of(text: &'static str) -> Self {
        Parts([Bytes::new(), Bytes::from_static(text.as_bytes()), Bytes::new()])
    }

    pub fn len(&self) -> usize {
        self.0.iter().map(Bytes::len).sum()
    }

    pub fn slices(&self) -> impl Iterator<Item = &[u8]> + Clone {
        self.0.iter().map(|part| &part[..])
    }

    /// In one piece; copied unless it is the data alone.
    pub fn joined(self) -> Bytes {
        match self.0 {
            [before, data, after] if before.is_empty() && after.is_empty() => data,
            parts => parts.concat().into(),
        }
    }

    /// Small ones go out in one piece, large ones without being copied together.
    pub fn into_body(self) -> reqwest::Body {
        match self.len() {
            0..=MAX_JOINED => self.joined().into(),
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
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<BTreeMap<&'a str, &'a RawValue>>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::destination::sample_event;

    fn webhook(settings: &str) -> Style {
        Style::of_webhook(&Object::new(settings)).expect("settings")
    }

    fn text(style: &Style, event: &Event) -> String {
        let parts = style.body(event).expect("a body");
        String::from_utf8(parts.slices().collect::<Vec<_>>().concat()).expect("text")
    }

    #[test]
    fn numbers_arrive_digit_for_digit() {
        let mut event = sample_event();
        event.event_data = r#"{"amount": 123456789012345678901234567890.10}"#.into();
        let body = text(&webhook("{}"), &event);
        assert!(body.contains("123456789012345678901234567890.10") && !body.contains("metadata"), "{body}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&body).expect("JSON")["id"], event.event_id.to_string());
    }

    #[test]
    fn metadata_goes_along_where_it_was_asked_for() {
        let mut event = sample_event();
        event.metadata =
            Object::new(r#"{"region": "eu", "n": 1.50, "x-a": [1e400, null], "x-b": null, "secret": "s"}"#);
        let body = text(&webhook(r#"{"metadata": ["region", "n", "x-*"]}"#), &event);
        let expected = r#""metadata":{"n":1.50,"region":"eu","x-a":[1e400, null],"x-b":null}}"#;
        assert!(body.ends_with(expected), "{body}");
        event.metadata = Object::new("[1]");
        assert!(text(&webhook(r#"{"metadata": ["*"]}"#), &event).ends_with(r#""metadata":{}}"#));
    }

    #[test]
    fn the_data_alone_is_what_the_event_holds() {
        let mut event = sample_event();
        event.event_data = r#"{"n": 1.50}"#.into();
        for format in ["data", "cloudevents-binary"] {
            let style = webhook(&format!(r#"{{"format": "{format}"}}"#));
            assert_eq!((&*text(&style, &event), style.content_type()), (r#"{"n": 1.50}"#, "application/json"));
            assert_eq!(style.attributes(&event).is_some(), format == "cloudevents-binary");
            assert_eq!(style.body(&event).expect("a body").joined().as_ptr(), event.event_data.as_ptr(), "no copy");
        }
    }

    #[test]
    fn a_cloud_event_is_one_json_object() {
        let event = sample_event();
        let style = webhook(r#"{"format": "cloudevents", "source": "urn:shop"}"#);
        let body: serde_json::Value = serde_json::from_str(&text(&style, &event)).expect("JSON");
        assert_eq!((&body["specversion"], &body["source"]), (&"1.0".into(), &"urn:shop".into()));
        assert_eq!((&body["datacontenttype"], &body["data"]), (&"application/json".into(), &serde_json::json!({})));
        assert_eq!(style.content_type(), "application/cloudevents+json");
    }

    #[test]
    fn each_kind_knows_its_formats() {
        let message = |text: &str| Style::of_message(&Object::new(text));
        assert_eq!(message("{}").map(|style| style.format).ok(), Some(Format::Data));
        assert!(message(r#"{"format": "standard"}"#).is_err());
        for wrong in [r#"{"format": "xml"}"#, r#"{"format": 1}"#, r#"{"metadata": "*"}"#] {
            assert!(Style::of_webhook(&Object::new(wrong)).is_err() && message(wrong).is_err(), "{wrong}");
        }
    }
}

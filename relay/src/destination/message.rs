//! A message as RabbitMQ gets it: its body, properties and headers, and what the broker says of it.

use std::borrow::Cow;
use std::time::UNIX_EPOCH;

use bytes::Bytes;
use lapin::BasicProperties;
use lapin::message::BasicReturnMessage;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use uuid::Uuid;

use super::body::Style;
use super::channel::Open;
use super::headers::{self, Header};
use super::{Event, Outcome};

const PERSISTENT: u8 = 2;

/// Bytes of a frame that are kept for all properties but the headers: each is a short string or less.
const OTHER_PROPERTIES: usize = 2048;

/// Where a message goes.
pub struct Names {
    pub exchange: ShortString,
    pub key: ShortString,
}

/// One attempt to publish an event.
pub struct Message<'a> {
    pub event: &'a Event,
    pub names: Names,
    pub body: Bytes,
    style: &'a Style,
    attempt: u32,
    /// The trace context, in place of the event's own.
    span: Option<&'a str>,
}

impl<'a> Message<'a> {
    pub fn new(
        event: &'a Event,
        names: Names,
        style: &'a Style,
        attempt: u32,
        span: Option<&'a str>,
    ) -> Result<Self, serde_json::Error> {
        Ok(Message { event, names, body: style.body(event)?.joined(), style, attempt, span })
    }

    /// The event's end, if what its headers have to say does not fit.
    pub fn too_many_headers(&self, open: &Open) -> Option<Outcome> {
        let (bytes, limit) = (headers::size(&self.own_headers()), room(open));
        (bytes > limit).then(|| Outcome::Rejected {
            error: format!("too large for RabbitMQ: headers of {bytes} bytes, where a frame holds {limit}"),
        })
    }

    /// As they go out on that channel.
    pub fn properties(&self, open: &Open) -> BasicProperties {
        self.properties_within(room(open))
    }

    fn properties_within(&self, room: usize) -> BasicProperties {
        let mut all = self.own_headers();
        let left = room.saturating_sub(headers::size(&all));
        let binary = self.style.attributes(self.event).is_some();
        all.extend(headers::of_metadata(&self.event.metadata, &self.style.metadata, binary, left));
        let mut table = FieldTable::default();
        for header in all {
            table.insert(header.name, header.value);
        }
        let seconds = self.event.created_at.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let properties = BasicProperties::default()
            .with_delivery_mode(PERSISTENT)
            .with_content_type(self.style.content_type().into())
            .with_message_id(self.event.event_id.to_string().into())
            .with_timestamp(seconds)
            .with_app_id("pg_outbox".into())
            .with_headers(table);
        let properties = match ShortString::try_new(self.event.event_type.as_str()) {
            Ok(kind) => properties.with_type(kind),
            Err(_) => properties,
        };
        self.with_metadata(properties)
    }

    /// Those of the event's own, and in binary mode the attributes of CloudEvents. A type that AMQP's own property can't
    /// hold is a header too.
    fn own_headers(&self) -> Vec<Header> {
        let event = self.event;
        let given = |text: &'a Option<String>| text.as_deref().map(Cow::Borrowed);
        let own = [
            ("event_version", Some(Cow::Borrowed(event.event_version.as_str()))),
            ("event_type", (!fits(&event.event_type)).then_some(Cow::Borrowed(event.event_type.as_str()))),
            ("aggregate_type", given(&event.aggregate_type)),
            ("aggregate_id", given(&event.aggregate_id)),
            ("tenant_id", given(&event.tenant_id)),
            ("traceparent", self.span.map(Cow::Borrowed).or_else(|| event.metadata.string("traceparent"))),
            ("tracestate", event.metadata.string("tracestate")),
        ];
        let mut all: Vec<Header> =
            own.iter().filter_map(|(name, text)| Some(Header::text((*name).into(), text.as_deref()?))).collect();
        let attempt = AMQPValue::LongInt(i32::try_from(self.attempt).unwrap_or(i32::MAX));
        all.push(Header { name: "attempt".into(), value: attempt });
        for (name, value) in self.style.attributes(event).iter().flat_map(|attributes| attributes.iter()) {
            all.push(Header::text(format!("{}{name}", headers::CLOUD_EVENTS).into(), value));
        }
        all
    }

    /// What metadata says of the properties that it may set. What one of them can't hold, or the broker would close the
    /// channel for, is none.
    fn with_metadata(&self, mut properties: BasicProperties) -> BasicProperties {
        let shown = |key: &str| {
            let metadata = &self.event.metadata;
            let scalar = metadata.member(key).filter(|text| !text.starts_with(['{', '[', 't', 'f']));
            scalar.filter(|_| self.style.metadata.match_name(key)).and_then(|_| metadata.shown(key))
        };
        if let Some(id) = shown("correlation_id").and_then(|text| ShortString::try_new(text).ok()) {
            properties = properties.with_correlation_id(id);
        }
        if let Some(to) = shown("reply_to").filter(|to| to != DIRECT_REPLY).and_then(|to| ShortString::try_new(to).ok())
        {
            properties = properties.with_reply_to(to);
        }
        if let Some(priority) = shown("priority").and_then(|text| text.parse().ok()) {
            properties = properties.with_priority(priority);
        }
        if let Some(millis) = shown("expiration").filter(|text| is_expiration(text)) {
            properties = properties.with_expiration(ShortString::from(&*millis));
        }
        properties
    }
}

/// Not a queue but the channel's own consumer; without one the broker closes the channel.
const DIRECT_REPLY: &str = "amq.rabbitmq.reply-to";

/// Milliseconds, at most as many as RabbitMQ takes.
fn is_expiration(text: &str) -> bool {
    (1..=10).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit()) && text.parse::<u32>().is_ok()
}

/// Bytes that headers may take: AMQP sends a message's properties in one frame, and a larger one would close the connection
/// for all.
fn room(open: &Open) -> usize {
    match open.link.connection.configuration().frame_max() {
        0 => usize::MAX,
        limit => (limit as usize).saturating_sub(OTHER_PROPERTIES),
    }
}

/// AMQP keeps names and some properties in short strings: one byte of length.
pub fn fits(text: &str) -> bool {
    ShortString::try_new(text).is_ok()
}

/// "message size 200 is larger than configured max size 100"; others in flight on the channel are not to blame.
pub fn too_large(text: &str, bytes: usize) -> bool {
    let limit =
        text.rsplit("max size ").next().and_then(|rest| rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok());
    text.contains("larger than configured max size") && limit.is_some_and(|limit: usize| bytes > limit)
}

/// Whose return it is, and why.
pub fn read_return(message: &BasicReturnMessage) -> (Uuid, String) {
    let id = message.delivery.properties.message_id().as_ref().and_then(|id| id.as_str().parse().ok());
    (id.unwrap_or_default(), format!("{} {}", message.reply_code, message.reply_text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::destination::{json::Object, sample_event};

    #[test]
    fn only_the_message_that_is_too_large_is_rejected() {
        let text = "406 PRECONDITION_FAILED - message size 200 is larger than configured max size 100";
        assert!(too_large(text, 200));
        assert!(!too_large(text, 100));
        assert!(!too_large("406 PRECONDITION_FAILED - inequivalent arg 'type'", 200));
    }

    fn style(settings: &str) -> Style {
        Style::of_message(&Object::new(settings)).expect("settings")
    }

    fn properties(event: &Event, settings: &str, room: usize) -> BasicProperties {
        let names = Names { exchange: "x".into(), key: "k".into() };
        Message::new(event, names, &style(settings), u32::MAX, None).expect("a message").properties_within(room)
    }

    #[test]
    fn any_text_that_an_event_can_hold_makes_a_message() {
        let mut event = sample_event();
        for text in ["x".repeat(300), "é".repeat(128), "a\r\nb".into(), "\u{7f}\u{1}".into()] {
            event.event_type.clone_from(&text);
            event.event_version.clone_from(&text);
            event.aggregate_id = Some(text.clone());
            event.metadata = Object::new(serde_json::json!({ "traceparent": text }).to_string());
            let properties = properties(&event, "{}", usize::MAX);
            let table = properties.headers().clone().unwrap_or_default();
            assert_eq!(table.inner().contains_key("event_type"), properties.kind().is_none());
            assert_eq!(properties.kind().is_none(), text.len() > 255);
        }
    }

    #[test]
    fn metadata_sets_the_properties_that_it_can_set() {
        let mut event = sample_event();
        let mut set = |metadata: serde_json::Value| {
            event.metadata = Object::new(metadata.to_string());
            let p = properties(&event, r#"{"metadata": ["c*", "priority", "expiration", "reply_to"]}"#, usize::MAX);
            let text = |value: &Option<ShortString>| value.as_ref().map(ToString::to_string);
            (text(p.correlation_id()), *p.priority(), text(p.expiration()), text(p.reply_to()))
        };
        let given =
            serde_json::json!({"correlation_id": "c", "priority": 9, "expiration": 60000, "reply_to": "answers"});
        assert_eq!(set(given), (Some("c".into()), Some(9), Some("60000".into()), Some("answers".into())));
        let texts = serde_json::json!({"correlation_id": 7, "priority": "255", "expiration": "4294967295"});
        assert_eq!(set(texts), (Some("7".into()), Some(255), Some("4294967295".into()), None));
        for wrong in [
            serde_json::json!({"correlation_id": "x".repeat(256), "priority": 256, "expiration": "4294967296"}),
            serde_json::json!({"correlation_id": [1], "priority": -1, "expiration": -1, "reply_to": {}}),
            serde_json::json!({"correlation_id": null, "priority": 1.5, "expiration": "1 s", "reply_to": DIRECT_REPLY}),
            serde_json::json!({"correlation_id": true, "priority": "high", "expiration": "", "reply_to": false}),
        ] {
            assert_eq!(set(wrong.clone()), (None, None, None, None), "{wrong}");
        }
    }

    #[test]
    fn only_what_was_asked_for_of_the_metadata_goes_along() {
        let mut event = sample_event();
        event.metadata = Object::new(r#"{"correlation_id": "c", "region": "eu", "traceparent": "00-a-b-01"}"#);
        let none = properties(&event, r#"{"metadata": []}"#, usize::MAX);
        assert!(none.correlation_id().is_none());
        let table = none.headers().clone().unwrap_or_default();
        assert!(!table.contains_key("region") && table.contains_key("traceparent"));
    }

    #[test]
    fn binary_cloud_events_have_their_attributes_as_headers() {
        let mut event = sample_event();
        event.metadata = Object::new(r#"{"cloudEvents:id": "forged", "cloudEvents_type": "forged", "region": "eu"}"#);
        let binary = properties(&event, r#"{"format": "cloudevents-binary"}"#, usize::MAX);
        let table = binary.headers().clone().unwrap_or_default();
        let text = |name: &str| match table.inner().get(name) {
            Some(AMQPValue::LongString(text)) => String::from_utf8_lossy(text.as_bytes()).into_owned(),
            other => format!("{other:?}"),
        };
        assert_eq!(
            (text("cloudEvents:id"), text("cloudEvents:specversion")),
            (event.event_id.to_string(), "1.0".into())
        );
        assert!(!table.contains_key("cloudEvents_type") && table.contains_key("region"));
        assert_eq!(binary.content_type().as_ref().map(ToString::to_string).as_deref(), Some("application/json"));
    }

    #[test]
    fn what_a_frame_has_no_room_for_is_no_header() {
        let mut event = sample_event();
        let metadata = serde_json::json!({"a": "x".repeat(1000), "b": "short", "c": "x".repeat(100)});
        event.metadata = Object::new(metadata.to_string());
        let table = properties(&event, "{}", 400).headers().clone().unwrap_or_default();
        assert_eq!(["a", "b", "c", "attempt"].map(|name| table.contains_key(name)), [false, true, true, true]);
    }
}

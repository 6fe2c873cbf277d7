//! A message as RabbitMQ gets it: its properties, and what the broker says of it.

use std::borrow::Cow;
use std::time::UNIX_EPOCH;

use lapin::BasicProperties;
use lapin::message::BasicReturnMessage;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use uuid::Uuid;

use super::channel::Open;
use super::{Event, Outcome};

const PERSISTENT: u8 = 2;

/// Those that the event has. A type that AMQP's own property can't hold is a header too.
fn headers(event: &Event) -> impl Iterator<Item = (&'static str, Cow<'_, str>)> {
    let borrowed = |text: &'_ Option<String>| text.as_deref().map(|text| Cow::Owned(text.to_owned()));
    [
        ("event_version", Some(Cow::Borrowed(event.event_version.as_str()))),
        ("event_type", (!fits(&event.event_type)).then_some(Cow::Borrowed(event.event_type.as_str()))),
        ("aggregate_type", borrowed(&event.aggregate_type)),
        ("aggregate_id", borrowed(&event.aggregate_id)),
        ("tenant_id", borrowed(&event.tenant_id)),
        ("traceparent", event.metadata.string("traceparent")),
        ("tracestate", event.metadata.string("tracestate")),
    ]
    .into_iter()
    .filter_map(|(key, text)| Some((key, text?)))
}

/// AMQP keeps names and some properties in short strings: one byte of length.
pub fn fits(text: &str) -> bool {
    ShortString::try_new(text).is_ok()
}

pub fn properties(event: &Event, attempt: u32) -> BasicProperties {
    let mut table = FieldTable::default();
    for (key, text) in headers(event) {
        table.insert(ShortString::from(key), AMQPValue::LongString((*text).into()));
    }
    table.insert("attempt".into(), AMQPValue::LongInt(i32::try_from(attempt).unwrap_or(i32::MAX)));
    let seconds = event.created_at.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let properties = BasicProperties::default()
        .with_delivery_mode(PERSISTENT)
        .with_content_type("application/json".into())
        .with_message_id(event.event_id.to_string().into())
        .with_timestamp(seconds)
        .with_app_id("pg_outbox".into())
        .with_headers(table);
    match ShortString::try_new(event.event_type.as_str()) {
        Ok(kind) => properties.with_type(kind),
        Err(_) => properties,
    }
}

/// AMQP sends a message's properties in one frame; a larger one would close the connection for all.
pub fn too_many_headers(open: &Open, event: &Event) -> Option<Outcome> {
    let bytes: usize = headers(event).map(|(key, text)| key.len() + text.len() + 6).sum();
    let limit = match open.link.connection.configuration().frame_max() {
        0 => return None,
        limit => (limit as usize).saturating_sub(2048),
    };
    (bytes > limit).then(|| Outcome::Rejected {
        error: format!("too large for RabbitMQ: headers of {bytes} bytes, where a frame holds {limit}"),
    })
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

    #[test]
    fn any_text_that_an_event_can_hold_makes_a_message() {
        let mut event = sample_event();
        for text in ["x".repeat(300), "é".repeat(128), "a\r\nb".into(), "\u{7f}\u{1}".into()] {
            event.event_type.clone_from(&text);
            event.event_version.clone_from(&text);
            event.aggregate_id = Some(text.clone());
            event.metadata = Object::new(serde_json::json!({ "traceparent": text }).to_string());
            let properties = properties(&event, u32::MAX);
            let table = properties.headers().clone().unwrap_or_default();
            assert_eq!(table.inner().contains_key("event_type"), properties.kind().is_none());
            assert_eq!(properties.kind().is_none(), text.len() > 255);
        }
    }
}

//! Headers of a message, and what becomes one of an event's metadata.

use lapin::types::{AMQPValue, ShortString};

use super::json::{Object, unescape};
use super::patterns::Patterns;

/// The prefix of CloudEvents' attributes. Its successor `cloudEvents_` is younger: who knows that one knows both.
/// Source: AMQP Protocol Binding for CloudEvents, section 3.1.3.1.
pub const CLOUD_EVENTS: &str = "cloudEvents:";

/// Ours: where the event has nothing to say, nobody else says it.
const OURS: [&str; 8] = [
    "aggregate_id",
    "aggregate_type",
    "attempt",
    "event_type",
    "event_version",
    "tenant_id",
    "traceparent",
    "tracestate",
];

/// RabbitMQ reads lists from these, and closes the channel over anything else in the first two.
const OF_RABBITMQ: [&str; 3] = ["CC", "BCC", "x-death"];

pub struct Header {
    pub name: ShortString,
    pub value: AMQPValue,
}

impl Header {
    pub fn text(name: ShortString, text: &str) -> Self {
        Header { name, value: AMQPValue::LongString(text.into()) }
    }

    /// Bytes in the frame.
    fn size(&self) -> usize {
        let value = match &self.value {
            AMQPValue::LongString(text) => 4 + text.len(),
            _ => 8,
        };
        self.name.as_str().len() + 2 + value
    }
}

pub fn size(headers: &[Header]) -> usize {
    headers.iter().map(Header::size).sum()
}

/// Scalars of the metadata whose names match: as many as there is room for, the smallest first. `binary`: attributes of
/// CloudEvents are headers as well, and ours.
pub fn of_metadata(metadata: &Object, patterns: &Patterns, binary: bool, room: usize) -> Vec<Header> {
    let wanted = |name: &str| !is_taken(name, binary) && patterns.match_name(name);
    let named = metadata.members().filter(|(name, _)| wanted(name));
    let mut found: Vec<Header> = named.filter_map(|(name, value)| header(name, value.get())).collect();
    if size(&found) > room {
        found.sort_by_key(Header::size);
        let mut used = 0;
        found.retain(|header| {
            used += header.size();
            used <= room
        });
    }
    found
}

fn is_taken(name: &str, binary: bool) -> bool {
    let of_cloud_events = binary && (name.starts_with(CLOUD_EVENTS) || name.starts_with("cloudEvents_"));
    of_cloud_events || OURS.contains(&name) || OF_RABBITMQ.contains(&name)
}

/// None for null, for an object or a list, and for a name that AMQP can't carry.
fn header(name: &str, text: &str) -> Option<Header> {
    let name = ShortString::try_new(name).ok().filter(|name| !name.as_str().is_empty())?;
    let value = match text.as_bytes().first()? {
        b'"' => AMQPValue::LongString((*unescape(text)?).into()),
        b't' => AMQPValue::Boolean(true),
        b'f' => AMQPValue::Boolean(false),
        b'-' | b'0'..=b'9' => number(text),
        _ => return None,
    };
    Some(Header { name, value })
}

/// Digits that a double holds, whatever they are.
const EXACT_DIGITS: usize = 15;

/// A number where 64 bits hold all of its digits, else these digits as text.
fn number(text: &str) -> AMQPValue {
    if let Ok(whole) = text.parse() {
        return AMQPValue::LongLongInt(whole);
    }
    let plain = text.bytes().all(|b| matches!(b, b'-' | b'.' | b'0'..=b'9'));
    match text.parse() {
        Ok(double) if plain && text.bytes().filter(u8::is_ascii_digit).count() <= EXACT_DIGITS => {
            AMQPValue::Double(double)
        }
        _ => AMQPValue::LongString(text.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(value: &AMQPValue) -> String {
        match value {
            AMQPValue::LongString(text) => String::from_utf8_lossy(text.as_bytes()).into_owned(),
            other => format!("{other:?}"),
        }
    }

    fn found(metadata: &str, patterns: &str, binary: bool, room: usize) -> Vec<(String, String)> {
        let patterns = Patterns::parse(&Object::new(patterns), "metadata", &["*"]).expect("patterns");
        let headers = of_metadata(&Object::new(metadata), &patterns, binary, room);
        headers.iter().map(|header| (header.name.to_string(), shown(&header.value))).collect()
    }

    fn names(found: &[(String, String)]) -> Vec<&str> {
        found.iter().map(|(name, _)| name.as_str()).collect()
    }

    #[test]
    fn scalars_keep_their_types_and_their_digits() {
        let metadata = r#"{"text": "a\"é", "whole": -7, "half": 1.50, "yes": true, "no": false, "none": null, "list": [],
                           "object": {}, "big": 12345678901234567890, "long": 0.1234567890123456, "huge": 1e400}"#;
        let found = found(metadata, "{}", false, usize::MAX);
        let expected = [
            ("big", "12345678901234567890"),
            ("half", "Double(1.5)"),
            ("huge", "1e400"),
            ("long", "0.1234567890123456"),
            ("no", "Boolean(false)"),
            ("text", "a\"é"),
            ("whole", "LongLongInt(-7)"),
            ("yes", "Boolean(true)"),
        ];
        assert_eq!(found, expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
    }

    #[test]
    fn no_name_breaks_a_channel_or_takes_the_place_of_ours() {
        let long = "x".repeat(256);
        let metadata = format!(
            r#"{{"attempt": 9, "tenant_id": "forged", "CC": "queue", "BCC": "queue", "x-death": 1, "": 1, "{long}": 1,
                 "cloudEvents:id": 1, "cloudEvents_id": 1, "region": "eu"}}"#
        );
        assert_eq!(names(&found(&metadata, "{}", false, usize::MAX)), ["cloudEvents:id", "cloudEvents_id", "region"]);
        assert_eq!(names(&found(&metadata, "{}", true, usize::MAX)), ["region"]);
        assert!(found("[1, 2]", "{}", false, usize::MAX).is_empty());
    }

    #[test]
    fn names_are_those_that_were_asked_for() {
        let metadata = r#"{"region": "eu", "x-a": 1, "x-b": 2, "secret": "s"}"#;
        assert_eq!(names(&found(metadata, r#"{"metadata": ["x-*", "region"]}"#, false, 100)), ["region", "x-a", "x-b"]);
        assert!(found(metadata, r#"{"metadata": []}"#, false, 100).is_empty());
    }

    #[test]
    fn the_smallest_go_along_where_there_is_no_room_for_all() {
        let metadata = format!(r#"{{"a": "{}", "b": "x", "c": "{}"}}"#, "x".repeat(100), "x".repeat(10));
        assert_eq!(names(&found(&metadata, "{}", false, 40)), ["b", "c"]);
        assert!(found(&metadata, "{}", false, 7).is_empty());
    }
}

//! Templates of exchange and routing key: `{event_type}`, `{aggregate_type}`, `{aggregate_id}`, `{tenant_id}` and
//! `{metadata.key}`, replaced by what the event holds there; by nothing where it holds nothing.

use std::borrow::Cow;

use super::{ConfigError, Event};

/// AMQP 0-9-1 keeps exchange and routing key in short strings: one byte of length.
const MAX_BYTES: usize = 255;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    EventType,
    AggregateType,
    AggregateId,
    TenantId,
    Metadata(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template(Vec<Part>);

impl Template {
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('{') {
            let (name, after) = after
                .split_once('}')
                .ok_or_else(|| ConfigError(format!("template {text:?}: a '{{' without its '}}'")))?;
            parts.push(Part::Text(before.to_owned()));
            parts.push(
                placeholder(name)
                    .ok_or_else(|| ConfigError(format!("template {text:?}: unknown placeholder {{{name}}}")))?,
            );
            rest = after;
        }
        parts.push(Part::Text(rest.to_owned()));
        parts.retain(|part| *part != Part::Text(String::new()));
        Ok(Template(parts))
    }

    /// Whether the text depends on the event.
    pub fn varies(&self) -> bool {
        self.0.iter().any(|part| !matches!(part, Part::Text(_)))
    }

    /// The text, if it is the same for each event.
    pub fn fixed(&self) -> Option<String> {
        let text = |part: &Part| match part {
            Part::Text(text) => Some(text.clone()),
            _ => None,
        };
        self.0.iter().map(text).collect()
    }

    /// How many words of a binding key stand for any other.
    fn wildcards(text: &str) -> usize {
        text.split('.').filter(|word| matches!(*word, "#" | "*")).count()
    }

    /// Whether a value of the event, and not the template itself, makes this rendered text match more than itself when a
    /// topic exchange takes it for a binding.
    pub fn is_pattern_by(&self, rendered: &str) -> bool {
        let own: String = self.0.iter().map(|part| if let Part::Text(text) = part { text } else { "x" }).collect();
        Self::wildcards(rendered) > Self::wildcards(&own)
    }

    /// The text for this event; an error if it is longer than AMQP allows.
    pub fn render(&self, event: &Event) -> Result<String, String> {
        let text: String = self.0.iter().map(|part| value(part, event)).collect();
        if text.len() > MAX_BYTES {
            return Err(format!("exchange or routing key has {} bytes; RabbitMQ allows {MAX_BYTES}", text.len()));
        }
        Ok(text)
    }
}

fn placeholder(name: &str) -> Option<Part> {
    match name {
        "event_type" => Some(Part::EventType),
        "aggregate_type" => Some(Part::AggregateType),
        "aggregate_id" => Some(Part::AggregateId),
        "tenant_id" => Some(Part::TenantId),
        _ => name.strip_prefix("metadata.").filter(|key| !key.is_empty()).map(|key| Part::Metadata(key.to_owned())),
    }
}

fn value<'a>(part: &'a Part, event: &'a Event) -> Cow<'a, str> {
    let text = match part {
        Part::Text(text) => Some(text.as_str()),
        Part::EventType => Some(event.event_type.as_str()),
        Part::AggregateType => event.aggregate_type.as_deref(),
        Part::AggregateId => event.aggregate_id.as_deref(),
        Part::TenantId => event.tenant_id.as_deref(),
        Part::Metadata(key) => return event.metadata.shown(key).unwrap_or_default(),
    };
    Cow::Borrowed(text.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::destination::{json::Object, sample_event};

    #[test]
    fn every_placeholder_is_replaced() {
        let mut event = sample_event();
        event.metadata = Object::new(r#"{"region": "eu", "shard": 7.50}"#);
        let all = Template::parse(
            "{event_type}/{aggregate_type}.{aggregate_id}-{tenant_id}{metadata.region}{metadata.shard}{metadata.none}!",
        );
        assert_eq!(all.expect("valid").render(&event).expect("short"), "contact.created/contact.42-eu7.50!");
    }

    #[test]
    fn only_values_of_events_can_make_a_key_a_pattern() {
        let by_tenant = Template::parse("{tenant_id}.events").expect("valid");
        assert!(by_tenant.is_pattern_by("#.events") && by_tenant.is_pattern_by("a.*.events"));
        assert!(!by_tenant.is_pattern_by("a#.events") && !by_tenant.is_pattern_by("acme.events"));
        assert!(!Template::parse("{tenant_id}.#").expect("valid").is_pattern_by("acme.#"));
    }

    #[test]
    fn what_is_no_placeholder_is_refused() {
        assert!(Template::parse("{event_typ}").is_err());
        assert!(Template::parse("a{event_type").is_err());
        assert!(Template::parse("{metadata.}").is_err());
    }

    #[test]
    fn a_key_that_amqp_cannot_carry_is_an_error() {
        let mut event = sample_event();
        event.event_type = "x".repeat(256);
        assert!(Template::parse("{event_type}").expect("valid").render(&event).is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_a_template_or_refused(text in "([a-z.#*{}]|\\{event_type\\}|\\{metadata\\.[a-z]\\}|.){0,20}") {
            if let Ok(template) = Template::parse(&text) {
                prop_assert_eq!(template.varies(), template.fixed().is_none());
                // Without a placeholder it is what was written.
                prop_assert!(template.fixed().is_none_or(|fixed| fixed == text));
            }
        }
    }
}

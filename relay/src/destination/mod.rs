//! What the dispatcher needs of a destination: build it from its row, deliver one event, say how it ended.
//!
//! A destination holds no state that it could not lose: whatever it was given and did not report back is
//! handed out again when the claim ends.

mod address;
mod body;
mod broker;
mod rabbitmq;
mod signature;
mod template;
mod webhook;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use uuid::Uuid;

use self::rabbitmq::{Broker, RabbitMq};
use self::webhook::{Networks, Webhook};
use crate::config::Config;

/// One event as a claim hands it out, shared by all of its destinations.
#[derive(Debug)]
pub struct Event {
    pub event_id: Uuid,
    pub event_type: String,
    pub event_version: String,
    pub aggregate_type: Option<String>,
    pub aggregate_id: Option<String>,
    pub tenant_id: Option<String>,
    /// The JSON text, as PostgreSQL prints it. Always valid JSON.
    pub event_data: String,
    pub metadata: serde_json::Value,
    pub created_at: SystemTime,
    /// 1 for the first attempt.
    pub attempt: u32,
}

/// How one delivery ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The destination has confirmed it.
    Delivered,
    /// This event did not get through; uses up one attempt.
    Failed { error: String, retry_in: Option<Duration> },
    /// This event can never get through: a dead letter.
    Rejected { error: String },
    /// The destination as a whole is down: opens its circuit, uses up no attempt.
    Unavailable { error: String, retry_in: Option<Duration> },
    /// The receiver wants nothing more: a dead letter, and the destination is disabled.
    Gone { error: String },
}

/// One row of `outbox.relay_destinations()`.
#[derive(Clone, PartialEq)]
pub struct Spec {
    pub name: String,
    /// `rabbitmq` or `webhook`.
    pub kind: String,
    pub exchange: Option<String>,
    pub routing_key: Option<String>,
    pub url: Option<String>,
    pub settings: serde_json::Value,
    /// Signing secrets, the current one first.
    pub secrets: Vec<String>,
    pub max_attempts: Option<i32>,
}

impl std::fmt::Debug for Spec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Spec").field("name", &self.name).field("kind", &self.kind).finish_non_exhaustive()
    }
}

/// A destination, the broker or a network that can't work as it is configured. Shows no password and no secret.
#[derive(Debug)]
pub struct ConfigError(pub String);

impl std::fmt::Display for ConfigError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ConfigError {}

/// What all destinations share: the connection to the broker, and which addresses a webhook may reach.
pub struct Environment {
    broker: Option<Arc<Broker>>,
    networks: Arc<Networks>,
}

impl Environment {
    /// Connects to nothing yet.
    pub fn new(config: &Config) -> Result<Self, ConfigError> {
        // The one provider for all TLS of the process; an error only says that it is installed already.
        let _installed = rustls::crypto::ring::default_provider().install_default();
        let broker = config.amqp.as_ref().map(Broker::new).transpose()?.map(Arc::new);
        let networks = Arc::new(Networks::new(&config.webhook_allow_networks)?);
        Ok(Environment { broker, networks })
    }

    /// Whether this relay serves destinations of that kind.
    pub fn serves(&self, kind: &str) -> bool {
        kind == "webhook" || (kind == "rabbitmq" && self.broker.is_some())
    }

    /// Takes up the server's setting `outbox.webhook_allow_networks`, in addition to the relay's own.
    pub fn allow_networks_of_database(&self, list: &str) {
        if let Err(error) = self.networks.set_of_database(list) {
            tracing::error!(%error, "outbox.webhook_allow_networks");
        }
    }

    /// Tries the connection to the broker.
    pub async fn check_broker(&self) -> Result<(), String> {
        match &self.broker {
            Some(broker) => broker.check().await,
            None => Ok(()),
        }
    }
}

/// Somewhere events go.
pub enum Destination {
    RabbitMq(RabbitMq),
    Webhook(Webhook),
}

impl Destination {
    /// Connects to nothing yet.
    pub fn build(spec: &Spec, environment: &Environment) -> Result<Self, ConfigError> {
        match (spec.kind.as_str(), &environment.broker) {
            ("rabbitmq", Some(broker)) => RabbitMq::build(spec, broker.clone()).map(Destination::RabbitMq),
            ("rabbitmq", None) => Err(ConfigError("AMQP_URL is not set".into())),
            ("webhook", _) => Webhook::build(spec, environment.networks.clone()).map(Destination::Webhook),
            (kind, _) => Err(ConfigError(format!("this relay does not know destinations of kind {kind}"))),
        }
    }

    /// One attempt. Ends by itself within the destination's timeout, whatever the other side does.
    pub async fn deliver(&self, event: &Event) -> Outcome {
        match self {
            Destination::RabbitMq(destination) => destination.deliver(event).await,
            Destination::Webhook(destination) => destination.deliver(event).await,
        }
    }

    /// How many attempts may be under way at once.
    pub fn concurrency(&self) -> usize {
        match self {
            Destination::RabbitMq(destination) => destination.concurrency(),
            Destination::Webhook(destination) => destination.concurrency(),
        }
    }

    /// Tries to reach it without delivering anything.
    pub async fn check(&self) -> Result<(), String> {
        match self {
            Destination::RabbitMq(destination) => destination.check().await,
            Destination::Webhook(destination) => destination.check().await,
        }
    }
}

/// A duration of a destination's settings, as SQL takes it: seconds as a number, or an amount and a unit.
fn duration(settings: &serde_json::Value, key: &str) -> Result<Option<Duration>, ConfigError> {
    let wrong = || ConfigError(format!("settings.{key} is a duration: seconds, or such as \"5 minutes\""));
    let seconds = match settings.get(key) {
        None | Some(serde_json::Value::Null) => return Ok(None),
        Some(serde_json::Value::Number(seconds)) => seconds.as_f64(),
        Some(serde_json::Value::String(text)) => interval(text),
        Some(_) => None,
    };
    let valid = seconds.filter(|s| *s > 0.0 && *s < 1e9).ok_or_else(wrong)?;
    Ok(Some(Duration::from_secs_f64(valid)))
}

/// Seconds of an interval such as "30 s", "500 ms", "1 hour 30 minutes" or "00:01:30".
fn interval(text: &str) -> Option<f64> {
    let mut rest = text.trim();
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let number = prefix(rest, |c| c.is_ascii_digit() || c == '.' || c == ':');
        rest = rest[number.len()..].trim_start();
        if number.contains(':') {
            seconds += clock(number)?;
            continue;
        }
        let unit = prefix(rest, |c| c.is_ascii_alphabetic());
        rest = rest[unit.len()..].trim_start();
        seconds += number.parse::<f64>().ok()? * unit_seconds(unit)?;
    }
    Some(seconds)
}

fn prefix(text: &str, of: impl Fn(char) -> bool) -> &str {
    &text[..text.find(|c| !of(c)).unwrap_or(text.len())]
}

/// "hours:minutes" or "hours:minutes:seconds".
fn clock(text: &str) -> Option<f64> {
    let parts: Vec<f64> = text.split(':').map(|part| part.parse().ok()).collect::<Option<_>>()?;
    match parts[..] {
        [hours, minutes] => Some(hours * 3600.0 + minutes * 60.0),
        [hours, minutes, seconds] => Some(hours * 3600.0 + minutes * 60.0 + seconds),
        _ => None,
    }
}

fn unit_seconds(unit: &str) -> Option<f64> {
    Some(match unit.to_ascii_lowercase().as_str() {
        "us" | "usec" | "usecs" | "microsecond" | "microseconds" => 0.000_001,
        "ms" | "msec" | "msecs" | "millisecond" | "milliseconds" => 0.001,
        "" | "s" | "sec" | "secs" | "second" | "seconds" => 1.0,
        "m" | "min" | "mins" | "minute" | "minutes" => 60.0,
        "h" | "hr" | "hrs" | "hour" | "hours" => 3600.0,
        "d" | "day" | "days" => 86_400.0,
        "w" | "week" | "weeks" => 604_800.0,
        _ => return None,
    })
}

#[cfg(test)]
fn sample_event() -> Event {
    Event {
        event_id: Uuid::nil(),
        event_type: "contact.created".into(),
        event_version: "v1".into(),
        aggregate_type: Some("contact".into()),
        aggregate_id: Some("42".into()),
        tenant_id: None,
        event_data: "{}".into(),
        metadata: serde_json::json!({}),
        created_at: SystemTime::UNIX_EPOCH,
        attempt: 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_sql_reads_them() {
        for (value, seconds) in [
            (serde_json::json!(2.5), 2.5),
            (serde_json::json!("30 s"), 30.0),
            (serde_json::json!("500ms"), 0.5),
            (serde_json::json!("5 minutes"), 300.0),
            (serde_json::json!("00:01:30"), 90.0),
            (serde_json::json!("1:30"), 5400.0),
            (serde_json::json!("1 hour 30 minutes"), 5400.0),
            (serde_json::json!("1 day 00:00:01"), 86_401.0),
            (serde_json::json!("2 Hours"), 7200.0),
            (serde_json::json!("15"), 15.0),
        ] {
            let settings = serde_json::json!({ "timeout": value });
            let read = duration(&settings, "timeout").expect("a duration");
            assert_eq!(read, Some(Duration::from_secs_f64(seconds)), "{settings}");
        }
        for wrong in
            [serde_json::json!("soon"), serde_json::json!("5 parsecs"), serde_json::json!(""), serde_json::json!(0)]
        {
            assert!(duration(&serde_json::json!({ "timeout": wrong }), "timeout").is_err(), "{wrong}");
        }
    }
}

//! What the dispatcher needs of a destination: build it from its row, deliver one event, say how it ended.
//!
//! A destination holds no state that it could not lose: whatever it was given and did not report back is
//! handed out again when the claim ends.

mod address;
mod body;
mod broker;
mod dial;
mod rabbitmq;
mod returns;
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
    /// Why its row could not be read as a whole.
    pub unreadable: Option<String>,
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
        if let Some(error) = &spec.unreadable {
            return Err(ConfigError(error.clone()));
        }
        match (spec.kind.as_str(), &environment.broker) {
            ("rabbitmq", Some(broker)) => RabbitMq::build(spec, broker.clone()).map(Destination::RabbitMq),
            ("rabbitmq", None) => Err(ConfigError("AMQP_URL is not set".into())),
            ("webhook", _) => Webhook::build(spec, environment.networks.clone()).map(Destination::Webhook),
            (kind, _) => Err(ConfigError(format!("this relay does not know destinations of kind {kind}"))),
        }
    }

    /// One attempt. Ends by itself within the destination's timeout, whatever the other side does.
    pub async fn deliver(&self, event: &Event, attempt: u32) -> Outcome {
        match self {
            Destination::RabbitMq(destination) => destination.deliver(event, attempt).await,
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

    /// Makes ready what can be before the first event.
    pub async fn prepare(&self) -> Result<(), String> {
        match self {
            Destination::RabbitMq(destination) => destination.prepare().await,
            Destination::Webhook(_) => Ok(()),
        }
    }

    /// Tries to reach it without delivering anything. At RabbitMQ this declares what `settings.declare` asks for.
    pub async fn check(&self) -> Result<(), String> {
        match self {
            Destination::RabbitMq(destination) => destination.prepare().await,
            Destination::Webhook(destination) => destination.check().await,
        }
    }
}

/// A duration of a destination's settings, in seconds: SQL has read what the operator wrote.
fn duration(settings: &serde_json::Value, key: &str) -> Result<Option<Duration>, ConfigError> {
    let Some(seconds) = settings.get(key).filter(|value| !value.is_null()) else { return Ok(None) };
    let valid = seconds.as_f64().filter(|s| *s > 0.0 && *s < 1e9);
    let wrong = || ConfigError(format!("settings.{key} is not a number of seconds above zero"));
    Ok(Some(Duration::from_secs_f64(valid.ok_or_else(wrong)?)))
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
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_seconds() {
        let read = |value| duration(&serde_json::json!({ "timeout": value }), "timeout");
        assert_eq!(read(serde_json::json!(2.5)).ok(), Some(Some(Duration::from_secs_f64(2.5))));
        assert_eq!(read(serde_json::json!(null)).ok(), Some(None));
        assert!(read(serde_json::json!("soon")).is_err());
        assert!(read(serde_json::json!(0)).is_err());
    }
}

//! What the dispatcher needs of a destination: build it from its row, deliver one event, say how it ended.
//!
//! A destination holds no state that it could not lose: whatever it was given and did not report back is
//! handed out again when the claim ends.

mod address;
mod answer;
mod body;
mod broker;
mod channel;
mod clients;
mod cloud_event;
mod connecting;
mod dial;
mod headers;
mod json;
mod keep;
mod message;
mod patterns;
mod publish;
mod rabbitmq;
mod returns;
mod route;
pub mod signature;
mod template;
mod topology;
mod webhook;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use tokio::sync::watch;
use uuid::Uuid;

use self::address::Networks;
use self::broker::Broker;
pub use self::broker::Standing;
use self::clients::Clients;
pub use self::json::Object;
use self::rabbitmq::RabbitMq;
use self::route::Routes;
use self::webhook::Webhook;
pub use self::webhook::causes;
use crate::config::{Amqp, BROKER, Config};
use crate::pattern::Patterns;
use crate::spans::Attribute;

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
    pub event_data: Bytes,
    pub metadata: Object,
    pub created_at: SystemTime,
}

/// How one delivery ended, and whose fault that was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The destination has confirmed it.
    Delivered,
    /// This event did not get through; uses up one attempt.
    Failed { error: String, retry_in: Option<Duration> },
    /// This event can never get through: a dead letter.
    Rejected { error: String },
    /// The destination as a whole is down, as far as this relay can see: uses up no attempt, and opens the circuit unless
    /// another relay has just delivered there.
    Unavailable { error: String },
    /// The receiver itself asks to be left alone for a while: opens the circuit, uses up no attempt.
    Throttled { error: String, retry_in: Option<Duration> },
    /// The receiver wants nothing more: a dead letter, and the destination is disabled. Only it can say so.
    Gone { error: String },
    /// This relay can't deliver to the destination: uses up no attempt, and another relay may do better.
    Unable { error: String },
}

impl Outcome {
    /// As the metrics name it.
    pub fn name(&self) -> &'static str {
        match self {
            Outcome::Delivered => "delivered",
            Outcome::Failed { .. } => "failed",
            Outcome::Rejected { .. } => "rejected",
            Outcome::Unavailable { .. } => "unavailable",
            Outcome::Throttled { .. } => "throttled",
            Outcome::Gone { .. } => "gone",
            Outcome::Unable { .. } => "unable",
        }
    }

    pub fn error(&self) -> Option<&str> {
        match self {
            Outcome::Delivered => None,
            Outcome::Failed { error, .. }
            | Outcome::Rejected { error }
            | Outcome::Unavailable { error }
            | Outcome::Throttled { error, .. }
            | Outcome::Gone { error }
            | Outcome::Unable { error } => Some(error),
        }
    }
}

/// An attempt that has ended, and what was answered over HTTP, if it was that far.
pub struct Attempted {
    pub outcome: Outcome,
    pub status: Option<u16>,
}

impl From<Outcome> for Attempted {
    fn from(outcome: Outcome) -> Self {
        Attempted { outcome, status: None }
    }
}

/// One row of `outbox.relay_destinations()`.
#[derive(Clone, Default, PartialEq)]
pub struct Spec {
    pub name: Arc<str>,
    /// `rabbitmq` or `webhook`.
    pub kind: String,
    pub exchange: Option<String>,
    pub routing_key: Option<String>,
    pub url: Option<String>,
    /// A JSON object, as text: what is wrong in one destination's settings costs no other anything.
    pub settings: String,
    /// Of a RabbitMQ destination: the name of its broker, if it has one.
    pub broker: Option<Arc<str>>,
    /// Signing secrets, the current one first.
    pub secrets: Vec<String>,
    pub max_attempts: Option<i32>,
}

impl Spec {
    pub fn is_rabbitmq(&self) -> bool {
        self.kind == "rabbitmq"
    }

    /// The name of its broker; none of a webhook.
    pub fn broker(&self) -> Option<&str> {
        self.is_rabbitmq().then(|| self.broker.as_deref().unwrap_or(BROKER))
    }
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

/// What all destinations share: the connections to the brokers, HTTP clients, and which addresses a webhook may reach.
pub struct Environment {
    brokers: BTreeMap<Arc<str>, Arc<Broker>>,
    networks: Arc<Networks>,
    clients: Arc<Clients>,
    /// Destinations of other names are left to others.
    patterns: Patterns,
}

impl Environment {
    /// Connects to nothing yet.
    pub fn new(config: &Config) -> Result<Self, ConfigError> {
        // The one provider for all TLS of the process; an error only says that it is installed already.
        let _installed = rustls::crypto::ring::default_provider().install_default();
        let broker = |amqp: &Amqp| Ok((amqp.name.clone(), Arc::new(Broker::new(amqp)?)));
        let brokers = config.amqp.iter().map(broker).collect::<Result<_, ConfigError>>()?;
        let networks = Arc::new(Networks::new(&config.webhook_allow_networks)?);
        let (proxy, authorities) = (config.webhook_proxy.as_deref(), config.webhook_ca_cert.as_deref());
        let routes = Routes::new(proxy, authorities, config.webhook_https_only)?;
        let clients = Arc::new(Clients::new(networks.clone(), routes));
        Ok(Environment { brokers, networks, clients, patterns: config.destinations.clone() })
    }

    /// Whether this relay serves that destination, as far as it can be served at all.
    pub fn serves(&self, spec: &Spec) -> bool {
        let of_kind = match spec.kind.as_str() {
            "webhook" => true,
            "rabbitmq" => spec.broker().is_some_and(|name| self.brokers.contains_key(name)),
            _ => false,
        };
        of_kind && self.patterns.matches(&spec.name)
    }

    /// The broker without which this relay can't serve that destination, whose name is one of its own.
    pub fn unknown_broker<'a>(&self, spec: &'a Spec) -> Option<&'a str> {
        spec.broker().filter(|name| !self.brokers.contains_key(*name) && self.patterns.matches(&spec.name))
    }

    /// The names of destinations that this relay serves, for the database.
    pub fn patterns(&self) -> &Patterns {
        &self.patterns
    }

    /// The names of the brokers.
    pub fn brokers(&self) -> Vec<Arc<str>> {
        self.brokers.keys().cloned().collect()
    }

    /// Takes up the server's setting `outbox.webhook_allow_networks`, in addition to the relay's own.
    pub fn allow_networks_of_database(&self, list: &str) {
        if let Err(error) = self.networks.set_of_database(list) {
            tracing::error!(%error, "outbox.webhook_allow_networks");
        }
    }

    /// Another number after each change of the allowed networks: connections that were made before may lead to where
    /// nobody may go any more.
    pub fn generation_of_networks(&self) -> u64 {
        self.networks.generation()
    }

    /// How the connection to a broker stands, which is made and kept from now on; none if there is no such broker.
    pub fn broker_standing(&self, name: &str) -> Option<watch::Receiver<Standing>> {
        self.brokers.get(name).map(|broker| broker.standing())
    }

    /// Tries the connection to each broker.
    pub async fn check_brokers(&self) -> Vec<(Arc<str>, Result<(), String>)> {
        let checks = self.brokers.iter().map(|(name, broker)| async { (name.clone(), broker.check().await) });
        futures_util::future::join_all(checks).await
    }
}

/// Somewhere events go.
pub enum Destination {
    RabbitMq(RabbitMq),
    Webhook(Webhook),
    #[cfg(test)]
    Fake(fn(&Event) -> Outcome),
}

impl Destination {
    /// Whether there can be such a destination.
    pub fn validate(spec: &Spec, environment: &Environment) -> Result<(), ConfigError> {
        match spec.kind.as_str() {
            "webhook" => webhook::Settings::parse(spec).map(drop),
            _ => Destination::build(spec, environment).map(drop),
        }
    }

    /// Connects to nothing yet.
    pub fn build(spec: &Spec, environment: &Environment) -> Result<Self, ConfigError> {
        let broker = spec.broker().map(|name| (name, environment.brokers.get(name)));
        match (spec.kind.as_str(), broker) {
            (_, Some((_, Some(broker)))) => RabbitMq::build(spec, broker.clone()).map(Destination::RabbitMq),
            (_, Some((name, None))) => {
                Err(ConfigError(format!("this relay has no broker {name}: AMQP_URL names none")))
            }
            ("webhook", _) => Webhook::build(spec, environment.clients.clone()).map(Destination::Webhook),
            (kind, _) => Err(ConfigError(format!("this relay does not know destinations of kind {kind}"))),
        }
    }

    /// One attempt. Ends by itself within the destination's timeout, whatever the other side does. `span`: what the receiver
    /// is told of the trace, in place of what the event says.
    pub async fn deliver(&self, event: &Event, attempt: u32, span: Option<&str>) -> Attempted {
        match self {
            Destination::RabbitMq(destination) => destination.deliver(event, attempt, span).await.into(),
            Destination::Webhook(destination) => destination.deliver(event, span).await,
            #[cfg(test)]
            Destination::Fake(deliver) => deliver(event).into(),
        }
    }

    /// What a span says of it, and of the status with which it answered.
    pub fn attributes(&self, event: &Event, status: Option<u16>) -> Vec<Attribute> {
        match self {
            Destination::RabbitMq(destination) => destination.attributes(event),
            Destination::Webhook(destination) => destination.attributes(status),
            #[cfg(test)]
            Destination::Fake(_) => Vec::new(),
        }
    }

    /// How many attempts may be under way at once.
    pub fn concurrency(&self) -> usize {
        match self {
            Destination::RabbitMq(destination) => destination.concurrency(),
            Destination::Webhook(destination) => destination.concurrency(),
            #[cfg(test)]
            Destination::Fake(_) => 1,
        }
    }

    /// Makes ready what can be before the first event.
    pub async fn prepare(&self) -> Result<(), String> {
        match self {
            Destination::RabbitMq(destination) => destination.prepare().await,
            Destination::Webhook(_) => Ok(()),
            #[cfg(test)]
            Destination::Fake(_) => Ok(()),
        }
    }

    /// Tries to reach it. Delivers nothing, declares nothing, changes nothing.
    pub async fn check(&self) -> Result<(), String> {
        match self {
            Destination::RabbitMq(destination) => destination.check().await,
            Destination::Webhook(destination) => destination.check().await,
            #[cfg(test)]
            Destination::Fake(_) => Ok(()),
        }
    }
}

/// A duration of a destination's settings, in seconds: SQL has read what the operator wrote.
fn duration(settings: &Object, key: &str) -> Result<Option<Duration>, ConfigError> {
    let Some(seconds) = settings.member(key) else { return Ok(None) };
    let valid = seconds.parse::<f64>().ok().filter(|s| *s > 0.0 && s.is_finite());
    let wrong = || ConfigError(format!("settings.{key} is not a number of seconds above zero"));
    Ok(Some(Duration::from_secs_f64(valid.ok_or_else(wrong)?.clamp(SHORTEST, LONGEST))))
}

/// Seconds. SQL refuses what is outside; this is for rows that are older than that.
const SHORTEST: f64 = 0.001;
const LONGEST: f64 = 86_400.0;

fn concurrency(settings: &Object, fallback: usize) -> usize {
    settings.member("concurrency").and_then(|text| text.parse().ok()).map_or(fallback, |n: usize| n.clamp(1, 99_999))
}

#[cfg(test)]
pub fn sample_event() -> Event {
    Event {
        event_id: Uuid::nil(),
        event_type: "contact.created".into(),
        event_version: "v1".into(),
        aggregate_type: Some("contact".into()),
        aggregate_id: Some("42".into()),
        tenant_id: None,
        event_data: Bytes::from_static(b"{}"),
        metadata: Object::new("{}"),
        created_at: SystemTime::UNIX_EPOCH,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_seconds() {
        let read = |value: &str| duration(&Object::new(format!(r#"{{"timeout": {value}}}"#)), "timeout");
        assert_eq!(read("2.5").ok(), Some(Some(Duration::from_secs_f64(2.5))));
        assert_eq!(read("null").ok(), Some(None));
        assert_eq!(read("0.0000001").ok(), Some(Some(Duration::from_millis(1))));
        assert_eq!(read("1e30").ok(), Some(Some(Duration::from_secs(86_400))));
        for wrong in ["\"soon\"", "0", "-1", "[]", &format!("1{}", "0".repeat(400))] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_wrong_setting_is_an_error_of_its_destination_alone() {
        let settings = Object::new(r#"{"unknown": 1e400, "concurrency": 3}"#);
        assert_eq!(concurrency(&settings, 10), 3);
        assert_eq!(duration(&settings, "timeout").ok(), Some(None));
    }
}

//! Exchange, queue and bindings: what `settings.declare` asks for, made on a channel that nothing else depends on.

use std::sync::Arc;

use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Channel, ExchangeKind};

use super::broker::Broker;
use super::channel::{Declared, Known};
use super::json::Object;
use super::{ConfigError, Spec};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Declare {
    Nothing,
    Exchange,
    Queue,
}

pub struct Topology {
    broker: Arc<Broker>,
    pub declare: Declare,
    exchange_type: String,
    queue: ShortString,
    queue_type: String,
}

/// Why a declaration failed.
pub enum Undeclared {
    /// On the channel that was given, which is closed now.
    OnChannel(lapin::Error),
    /// In a connection of its own.
    Apart(String),
}

impl From<lapin::Error> for Undeclared {
    fn from(error: lapin::Error) -> Self {
        Undeclared::OnChannel(error)
    }
}

impl Topology {
    pub fn parse(spec: &Spec, settings: &Object, broker: Arc<Broker>) -> Result<Self, ConfigError> {
        let text = |key: &str, fallback: &str| settings.string(key).as_deref().unwrap_or(fallback).to_owned();
        let declare = match text("declare", "exchange").as_str() {
            "none" => Declare::Nothing,
            "exchange" => Declare::Exchange,
            "queue" => Declare::Queue,
            other => {
                return Err(ConfigError(format!("settings.declare is none, exchange or queue, not {other:?}")));
            }
        };
        let queue = ShortString::try_new(text("queue", &spec.name))
            .map_err(|error| ConfigError(format!("settings.queue: {error}")))?;
        Ok(Topology {
            broker,
            declare,
            exchange_type: text("exchange_type", "topic"),
            queue,
            queue_type: text("queue_type", "quorum"),
        })
    }

    /// Whether an exchange of this type takes `*` and `#` in a binding for wildcards. Of a plugin's type that is not known.
    pub fn binds_by_pattern(&self) -> bool {
        self.exchange_type == "topic" || !self.is_builtin()
    }

    fn is_builtin(&self) -> bool {
        matches!(self.exchange_type.as_str(), "topic" | "direct" | "fanout" | "headers")
    }

    /// On the default exchange a message goes to the queue that its routing key names.
    pub fn queue_for(&self, exchange: &str, key: &ShortString) -> ShortString {
        if exchange.is_empty() { key.clone() } else { self.queue.clone() }
    }

    /// What a message with these names needs to be there. Without the key: what no event changes.
    pub fn needs(&self, exchange: &str, key: Option<&ShortString>) -> Vec<Declared> {
        let mut needed = Vec::new();
        if self.declare != Declare::Nothing && !exchange.is_empty() {
            needed.push(Declared::Exchange(exchange.to_owned()));
        }
        if self.declare == Declare::Queue {
            match (exchange.is_empty(), key) {
                (true, Some(key)) => needed.push(Declared::Queue(key.to_string())),
                (true, None) => {}
                (false, key) => {
                    needed.push(Declared::Queue(self.queue.to_string()));
                    needed.extend(key.map(|key| Declared::Binding {
                        queue: self.queue.to_string(),
                        exchange: exchange.to_owned(),
                        key: key.to_string(),
                    }));
                }
            }
        }
        needed
    }

    /// Whether all is there for a message to an exchange that has taken one before.
    pub fn is_ready(&self, known: &Known, exchange: &str, key: &ShortString) -> bool {
        self.declare != Declare::Queue || self.needs(exchange, Some(key)).iter().all(|what| known.is_declared(what))
    }

    /// Makes what is missing, and remembers it.
    pub async fn declare(&self, channel: &Channel, known: &Known, needed: Vec<Declared>) -> Result<(), Undeclared> {
        for what in needed {
            if !known.is_declared(&what) {
                self.declare_one(channel, &what).await?;
                known.declared(what);
            }
        }
        Ok(())
    }

    async fn declare_one(&self, channel: &Channel, what: &Declared) -> Result<(), Undeclared> {
        match what {
            Declared::Exchange(name) => {
                let kind = ExchangeKind::Custom(self.exchange_type.clone());
                if !self.is_builtin() {
                    return self.broker.declare_apart(short(name)?, kind).await.map_err(Undeclared::Apart);
                }
                let options = ExchangeDeclareOptions { durable: true, ..Default::default() };
                channel.exchange_declare(short(name)?, kind, options, FieldTable::default()).await?;
            }
            Declared::Queue(name) => {
                let options = QueueDeclareOptions { durable: true, ..Default::default() };
                channel.queue_declare(short(name)?, options, self.arguments()).await?;
            }
            Declared::Binding { queue, exchange, key } => {
                let options = QueueBindOptions::default();
                let (queue, exchange, key) = (short(queue)?, short(exchange)?, short(key)?);
                channel.queue_bind(queue, exchange, key, options, FieldTable::default()).await?;
            }
        }
        Ok(())
    }

    fn arguments(&self) -> FieldTable {
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString(self.queue_type.clone().into()));
        arguments
    }

    /// Whether it is there, asked without making it. On an error the channel is closed.
    pub async fn exists(&self, channel: &Channel, what: &Declared) -> Result<(), Undeclared> {
        match what {
            Declared::Exchange(name) => {
                let options = ExchangeDeclareOptions { passive: true, ..Default::default() };
                let kind = ExchangeKind::Custom(self.exchange_type.clone());
                channel.exchange_declare(short(name)?, kind, options, FieldTable::default()).await?;
            }
            Declared::Queue(name) => {
                let options = QueueDeclareOptions { passive: true, ..Default::default() };
                channel.queue_declare(short(name)?, options, FieldTable::default()).await?;
            }
            Declared::Binding { .. } => {}
        }
        Ok(())
    }

    /// Whether what is there is what would be made; changes nothing, as it is there.
    pub async fn agrees(&self, channel: &Channel, what: &Declared) -> Result<(), Undeclared> {
        match what {
            Declared::Binding { .. } => Ok(()),
            what => self.declare_one(channel, what).await,
        }
    }
}

fn short(name: &str) -> Result<ShortString, Undeclared> {
    ShortString::try_new(name).map_err(|error| Undeclared::Apart(error.to_string()))
}

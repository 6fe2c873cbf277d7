//! RabbitMQ: persistent messages, publisher confirms, `mandatory`.
//!
//! | what happens | outcome |
//! | --- | --- |
//! | confirmed, and routed to a queue | delivered |
//! | returned: no queue is bound for the key | failed, "unroutable" |
//! | negatively acknowledged (a full queue that rejects) | failed, "nacked" |
//! | larger than the broker allows; a key longer than AMQP allows | rejected |
//! | alarm: the broker takes no messages | unavailable, "blocked" |
//! | channel closed by the broker: no such exchange, another type, no permission | unavailable, "channel closed"; failed if the name is a template's, for others may work |
//! | connection refused, lost, login refused, no confirm in time | unavailable |

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use lapin::options::{
    BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Confirmation, ErrorKind, ExchangeKind};
use tokio::sync::Mutex;
use tokio::time::timeout;

pub use super::broker::Broker;
use super::broker::{Link, describe};
use super::template::Template;
use super::{ConfigError, Event, Outcome, Spec};

/// No confirm for this long: the connection is given up.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(30);

/// Publishes under way at once, unless `settings.concurrency` says otherwise.
const CONCURRENCY: usize = 2000;

/// The broker closes a channel for one event's sake and takes along what else is under way on it. That is published
/// again on a new channel, at most so many times.
const MAX_TRIES: usize = 5;

/// Exchanges and queues remembered as declared; templates can yield any number.
const MAX_DECLARED: usize = 10_000;

const PERSISTENT: u8 = 2;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Declare {
    Nothing,
    Exchange,
    Queue,
}

pub struct RabbitMq {
    broker: Arc<Broker>,
    exchange: Template,
    routing_key: Template,
    declare: Declare,
    exchange_type: String,
    queue: String,
    queue_type: String,
    concurrency: usize,
    timeout: Duration,
    open: Mutex<Option<Arc<Open>>>,
}

/// A channel in confirm mode.
struct Open {
    link: Arc<Link>,
    channel: Channel,
    declared: Mutex<HashSet<(String, String)>>,
}

impl RabbitMq {
    /// Connects to nothing yet.
    pub fn build(spec: &Spec, broker: Arc<Broker>) -> Result<Self, ConfigError> {
        let text =
            |key: &str, fallback: &str| spec.settings.get(key).and_then(|v| v.as_str()).unwrap_or(fallback).to_owned();
        let declare = match text("declare", "exchange").as_str() {
            "none" => Declare::Nothing,
            "exchange" => Declare::Exchange,
            "queue" => Declare::Queue,
            other => {
                return Err(ConfigError(format!(
                    "destination {}: settings.declare is none, exchange or queue, not {other:?}",
                    spec.name
                )));
            }
        };
        let concurrency =
            spec.settings.get("concurrency").and_then(|v| v.as_u64()).map_or(CONCURRENCY, |n| n.max(1) as usize);
        Ok(RabbitMq {
            broker,
            exchange: Template::parse(spec.exchange.as_deref().unwrap_or("outbox_events"))?,
            routing_key: Template::parse(spec.routing_key.as_deref().unwrap_or("{event_type}"))?,
            declare,
            exchange_type: text("exchange_type", "topic"),
            queue: text("queue", &spec.name),
            queue_type: text("queue_type", "quorum"),
            concurrency,
            timeout: super::duration(&spec.settings, "timeout")?.unwrap_or(CONFIRM_TIMEOUT),
            open: Mutex::default(),
        })
    }

    pub fn concurrency(&self) -> usize {
        self.concurrency
    }

    /// Opens a channel if there is none.
    pub async fn check(&self) -> Result<(), String> {
        self.open().await.map(|_| ())
    }

    pub async fn deliver(&self, event: &Event) -> Outcome {
        let (exchange, routing_key) = match (self.exchange.render(event), self.routing_key.render(event)) {
            (Ok(exchange), Ok(routing_key)) => (exchange, routing_key),
            (Err(error), _) | (_, Err(error)) => return Outcome::Rejected { error },
        };
        let mut closed = String::new();
        for _ in 0..MAX_TRIES {
            let open = match self.open().await {
                Ok(open) => open,
                Err(error) => return unavailable(error),
            };
            if let Some(reason) = open.link.blocked.borrow().clone() {
                return blocked(&reason);
            }
            match timeout(self.timeout, self.publish(&open, &exchange, &routing_key, event)).await {
                Ok(Ok(outcome)) => return outcome,
                Ok(Err(error)) => {
                    self.forget(&open).await;
                    closed = format!("channel closed by RabbitMQ: {}", describe(&error));
                    if !open.link.connection.status().connected() {
                        return unavailable(format!("connection to RabbitMQ lost: {}", describe(&error)));
                    }
                    if let Some(outcome) = self.blame(&error, &exchange, &routing_key, event) {
                        return outcome;
                    }
                }
                Err(_) => {
                    self.broker.abandon(&open.link).await;
                    self.forget(&open).await;
                    return unavailable(format!("no confirm from RabbitMQ within {} s", self.timeout.as_secs_f32()));
                }
            }
        }
        unavailable(closed)
    }

    /// What becomes of the event if it was the one for which the broker closed the channel; none if it was another.
    fn blame(&self, error: &lapin::Error, exchange: &str, routing_key: &str, event: &Event) -> Option<Outcome> {
        let ErrorKind::ProtocolError(_) = error.kind() else { return None };
        let text = describe(error);
        if too_large(&text, event.event_data.len()) {
            return Some(Outcome::Rejected { error: format!("too large for RabbitMQ: {text}") });
        }
        let (queue, queue_varies) = self.queue_for(exchange, routing_key);
        // "access to topic 'k' in exchange 'x'": the first that is named is the one it is about.
        let subjects = [
            ("topic", routing_key, self.routing_key.varies()),
            ("queue", queue, queue_varies),
            ("exchange", exchange, self.exchange.varies()),
        ];
        let (kind, name, varies) = subjects.into_iter().find(|(kind, ..)| text.contains(&format!("{kind} '")))?;
        if !text.contains(&format!("{kind} '{name}'")) {
            return None;
        }
        let error = format!("channel closed by RabbitMQ: {text}");
        Some(if varies { Outcome::Failed { error, retry_in: None } } else { unavailable(error) })
    }

    /// The queue that `settings.declare` means, and whether it depends on the event. On the default exchange a message
    /// goes to the queue that its routing key names.
    fn queue_for<'a>(&'a self, exchange: &str, routing_key: &'a str) -> (&'a str, bool) {
        match exchange.is_empty() {
            true => (routing_key, self.routing_key.varies()),
            false => (&self.queue, false),
        }
    }

    async fn publish(&self, open: &Open, exchange: &str, routing_key: &str, event: &Event) -> lapin::Result<Outcome> {
        self.declare(open, exchange, routing_key).await?;
        let confirm = open
            .channel
            .basic_publish(
                exchange.into(),
                routing_key.into(),
                BasicPublishOptions { mandatory: true, ..Default::default() },
                event.event_data.as_bytes(),
                properties(event),
            )
            .await?;
        let mut alarm = open.link.blocked.clone();
        tokio::select! {
            biased;
            confirmation = confirm => Ok(judge(confirmation?, exchange, routing_key)),
            Ok(reason) = alarm.wait_for(Option::is_some) => Ok(blocked(reason.as_deref().unwrap_or_default())),
        }
    }

    /// The channel, made anew after it was closed.
    async fn open(&self) -> Result<Arc<Open>, String> {
        let mut current = self.open.lock().await;
        if let Some(open) = current
            .as_ref()
            .filter(|open| open.channel.status().connected() && open.link.connection.status().connected())
        {
            return Ok(open.clone());
        }
        *current = None;
        let link = self.broker.link().await?;
        let opening = async {
            let channel = link.connection.create_channel().await?;
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            Ok::<_, lapin::Error>(channel)
        };
        let channel = timeout(self.timeout, opening)
            .await
            .map_err(|_| "RabbitMQ opens no channel".to_owned())?
            .map_err(|error| format!("RabbitMQ opens no channel: {}", describe(&error)))?;
        let open = Arc::new(Open { link, channel, declared: Mutex::default() });
        *current = Some(open.clone());
        Ok(open)
    }

    async fn forget(&self, open: &Arc<Open>) {
        let mut current = self.open.lock().await;
        if current.as_ref().is_some_and(|c| Arc::ptr_eq(c, open)) {
            *current = None;
        }
    }

    /// Declares what `settings.declare` asks for, once a channel. The default exchange is always there.
    async fn declare(&self, open: &Open, exchange: &str, routing_key: &str) -> lapin::Result<()> {
        if self.declare == Declare::Nothing || (self.declare == Declare::Exchange && exchange.is_empty()) {
            return Ok(());
        }
        let by_key = self.declare == Declare::Queue;
        let key = (exchange.to_owned(), if by_key { routing_key.to_owned() } else { String::new() });
        let mut declared = open.declared.lock().await;
        if declared.contains(&key) {
            return Ok(());
        }
        if !exchange.is_empty() {
            let kind = ExchangeKind::Custom(self.exchange_type.clone());
            let options = ExchangeDeclareOptions { durable: true, ..Default::default() };
            open.channel.exchange_declare(exchange.into(), kind, options, FieldTable::default()).await?;
        }
        if by_key {
            self.declare_queue(open, exchange, routing_key).await?;
        }
        if declared.len() < MAX_DECLARED {
            declared.insert(key);
        }
        Ok(())
    }

    async fn declare_queue(&self, open: &Open, exchange: &str, routing_key: &str) -> lapin::Result<()> {
        let (queue, _) = self.queue_for(exchange, routing_key);
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString(self.queue_type.clone().into()));
        let options = QueueDeclareOptions { durable: true, ..Default::default() };
        open.channel.queue_declare(queue.into(), options, arguments).await?;
        if !exchange.is_empty() {
            open.channel
                .queue_bind(
                    queue.into(),
                    exchange.into(),
                    routing_key.into(),
                    QueueBindOptions::default(),
                    FieldTable::default(),
                )
                .await?;
        }
        Ok(())
    }
}

/// "message size 200 is larger than configured max size 100"; others in flight on the channel are not to blame.
fn too_large(text: &str, bytes: usize) -> bool {
    let limit =
        text.rsplit("max size ").next().and_then(|rest| rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok());
    text.contains("larger than configured max size") && limit.is_some_and(|limit: usize| bytes > limit)
}

fn judge(confirmation: Confirmation, exchange: &str, routing_key: &str) -> Outcome {
    let failed = |error: String| Outcome::Failed { error, retry_in: None };
    match confirmation {
        Confirmation::Ack(None) => Outcome::Delivered,
        Confirmation::Ack(Some(returned)) => failed(format!(
            "unroutable: no queue is bound to exchange {exchange:?} for routing key {routing_key:?} ({} {})",
            returned.reply_code, returned.reply_text
        )),
        Confirmation::Nack(_) => failed(format!(
            "nacked by RabbitMQ: a queue for routing key {routing_key:?} rejects messages, it may be full"
        )),
        Confirmation::NotRequested => failed("RabbitMQ confirms nothing on this channel".into()),
    }
}

fn unavailable(error: String) -> Outcome {
    Outcome::Unavailable { error, retry_in: None }
}

fn blocked(reason: &str) -> Outcome {
    unavailable(format!("RabbitMQ blocks publishers: {reason}"))
}

fn properties(event: &Event) -> BasicProperties {
    let mut headers = FieldTable::default();
    let mut put = |key: &str, text: Option<&str>| {
        if let Some(text) = text {
            headers.insert(ShortString::from(key), AMQPValue::LongString(text.into()));
        }
    };
    put("event_version", Some(&event.event_version));
    put("aggregate_type", event.aggregate_type.as_deref());
    put("aggregate_id", event.aggregate_id.as_deref());
    put("tenant_id", event.tenant_id.as_deref());
    for key in ["traceparent", "tracestate"] {
        put(key, event.metadata.get(key).and_then(|v| v.as_str()));
    }
    headers.insert("attempt".into(), AMQPValue::LongInt(event.attempt as i32));
    let seconds = event.created_at.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let properties = BasicProperties::default()
        .with_delivery_mode(PERSISTENT)
        .with_content_type("application/json".into())
        .with_message_id(event.event_id.to_string().into())
        .with_timestamp(seconds)
        .with_app_id("pg_outbox".into())
        .with_headers(headers);
    // A type that AMQP's short string can't hold stays out; the routing key would refuse it anyway.
    if event.event_type.len() <= 255 { properties.with_type(event.event_type.as_str().into()) } else { properties }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_message_that_is_too_large_is_rejected() {
        let text = "406 PRECONDITION_FAILED - message size 200 is larger than configured max size 100";
        assert!(too_large(text, 200));
        assert!(!too_large(text, 100));
        assert!(!too_large("406 PRECONDITION_FAILED - inequivalent arg 'type'", 200));
    }
}

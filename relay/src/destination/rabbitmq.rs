//! RabbitMQ: persistent messages, publisher confirms, `mandatory`.
//!
//! | what happens | outcome |
//! | --- | --- |
//! | confirmed, and routed to a queue | delivered |
//! | returned: no queue is bound for the key | failed, "unroutable" (whose return it is: see `returns`) |
//! | negatively acknowledged (a full queue that rejects) | failed, "nacked" |
//! | larger than the broker allows; a key longer than AMQP allows | rejected |
//! | alarm: the broker takes no messages | unavailable, "blocked" |
//! | channel closed by the broker: no such exchange, another type, no permission | unavailable, "channel closed"; failed if the name is a template's, for others may work |
//! | connection refused, lost, login refused, no confirm in time | unavailable |

use std::collections::HashSet;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, UNIX_EPOCH};

use lapin::message::BasicReturnMessage;
use lapin::options::{
    BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Confirmation, ErrorKind, ExchangeKind};
use tokio::sync::Mutex;
use tokio::time::timeout;
use uuid::Uuid;

pub use super::broker::Broker;
use super::broker::{Link, PAUSE, describe};
use super::returns::Returns;
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
    current: Mutex<Current>,
}

#[derive(Default)]
struct Current {
    open: Option<Arc<Open>>,
    /// Why no channel could be opened, and when: many deliveries fail together.
    failed: Option<(Instant, String)>,
}

/// A channel in confirm mode.
struct Open {
    link: Arc<Link>,
    channel: Channel,
    declared: Mutex<HashSet<(String, String)>>,
    returns: Returns,
    /// A confirm was given up, and with it perhaps the return of another message: nothing that follows is believed.
    retired: AtomicBool,
}

/// How one try on one channel ended.
enum Try {
    Over(Outcome),
    /// The channel was retired meanwhile.
    Again,
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
            current: Mutex::default(),
        })
    }

    pub fn concurrency(&self) -> usize {
        self.concurrency
    }

    /// Opens a channel if there is none, and declares what does not depend on an event: consumers can bind to it before
    /// the first event comes.
    pub async fn prepare(&self) -> Result<(), String> {
        let open = self.open().await?;
        let (Some(exchange), Some(routing_key)) = (self.exchange.fixed(), self.fixed_key()) else { return Ok(()) };
        let declaring = timeout(self.timeout, self.declare(&open, &exchange, &routing_key));
        match open.link.unless_blocked(declaring).await? {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => {
                self.forget(&open).await;
                Err(format!("channel closed by RabbitMQ: {}", describe(&error)))
            }
            Err(_) => Err(self.no_confirm(&open).await),
        }
    }

    /// The routing key, if it takes part in what is declared and no event changes it.
    fn fixed_key(&self) -> Option<String> {
        if self.declare == Declare::Queue { self.routing_key.fixed() } else { Some(String::new()) }
    }

    pub async fn deliver(&self, event: &Event, attempt: u32) -> Outcome {
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
            if let Some(outcome) = too_many_headers(&open, event) {
                return outcome;
            }
            let publishing = pin!(timeout(self.timeout, self.publish(&open, &exchange, &routing_key, event, attempt)));
            match open.link.unless_blocked(publishing).await {
                Ok(Ok(Ok(Try::Over(outcome)))) => return outcome,
                Ok(Ok(Ok(Try::Again))) => closed = "the channel was given up".into(),
                Ok(Ok(Err(error))) => {
                    self.forget(&open).await;
                    closed = format!("channel closed by RabbitMQ: {}", describe(&error));
                    if !open.link.connection.status().connected() {
                        return unavailable(format!("connection to RabbitMQ lost: {}", describe(&error)));
                    }
                    if let Some(outcome) = self.blame(&error, &exchange, &routing_key, event) {
                        return outcome;
                    }
                }
                Ok(Err(_)) => return unavailable(self.no_confirm(&open).await),
                Err(blocked) => {
                    open.retired.store(true, Ordering::SeqCst);
                    return unavailable(blocked);
                }
            }
        }
        // Others may work where the names are a template's.
        if self.exchange.varies() || self.routing_key.varies() { failed(closed) } else { unavailable(closed) }
    }

    /// The broker does not answer: the connection is given up.
    async fn no_confirm(&self, open: &Arc<Open>) -> String {
        open.retired.store(true, Ordering::SeqCst);
        self.broker.abandon(&open.link).await;
        self.forget(open).await;
        format!("no confirm from RabbitMQ within {} s", self.timeout.as_secs_f32())
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
        Some(if varies { failed(error) } else { unavailable(error) })
    }

    /// The queue that `settings.declare` means, and whether it depends on the event. On the default exchange a message
    /// goes to the queue that its routing key names.
    fn queue_for<'a>(&'a self, exchange: &str, routing_key: &'a str) -> (&'a str, bool) {
        match exchange.is_empty() {
            true => (routing_key, self.routing_key.varies()),
            false => (&self.queue, false),
        }
    }

    async fn publish(
        &self,
        open: &Open,
        exchange: &str,
        routing_key: &str,
        event: &Event,
        attempt: u32,
    ) -> lapin::Result<Try> {
        self.declare(open, exchange, routing_key).await?;
        let published = open.returns.published(event.event_id);
        let options = BasicPublishOptions { mandatory: true, ..Default::default() };
        let body = event.event_data.as_bytes();
        let confirm =
            open.channel.basic_publish(exchange.into(), routing_key.into(), options, body, properties(event, attempt));
        let confirmation = confirm.await?.await?;
        let (acknowledged, carried) = match confirmation {
            Confirmation::Ack(carried) => (true, carried),
            Confirmation::Nack(carried) => (false, carried),
            Confirmation::NotRequested => {
                return Ok(Try::Over(failed("RabbitMQ confirms nothing on this channel".into())));
            }
        };
        let returned = published.confirmed(carried.map(|message| read_return(&message))).await;
        Ok(if let Some(why) = returned {
            // A queue that was declared may have been deleted since.
            open.declared.lock().await.remove(&self.declared_key(exchange, routing_key));
            Try::Over(failed(format!(
                "unroutable: no queue is bound to exchange {exchange:?} for routing key {routing_key:?} ({why})"
            )))
        } else if !acknowledged {
            Try::Over(failed(format!(
                "nacked by RabbitMQ: a queue for routing key {routing_key:?} rejects messages, it may be full"
            )))
        } else if open.retired.load(Ordering::SeqCst) {
            Try::Again
        } else {
            Try::Over(Outcome::Delivered)
        })
    }

    /// The channel, made anew after it was closed or given up. The error says why there is none.
    async fn open(&self) -> Result<Arc<Open>, String> {
        let mut current = self.current.lock().await;
        let alive = |open: &Arc<Open>| open.channel.status().connected() && open.link.connection.status().connected();
        let kept = current.open.take().filter(alive);
        if let Some(open) = kept.as_ref().filter(|open| !open.retired.load(Ordering::SeqCst)) {
            current.open = kept.clone();
            return open.link.unless_blocked(std::future::ready(open.clone())).await;
        }
        // Thousands of deliveries are under way at a time: what is rare takes no room in each of them.
        Box::pin(self.reopen(&mut current, kept)).await
    }

    async fn reopen(&self, current: &mut Current, kept: Option<Arc<Open>>) -> Result<Arc<Open>, String> {
        if let Some((_, error)) = current.failed.clone().filter(|(at, _)| at.elapsed() < PAUSE) {
            current.open = kept;
            return Err(error);
        }
        let link = self.broker.link().await?;
        let opening = timeout(self.timeout, open_channel(&link, kept.as_deref()));
        let opened = link.unless_blocked(opening).await.and_then(|opened| match opened {
            Ok(Ok(channel)) => Ok(channel),
            Ok(Err(error)) => Err(format!("RabbitMQ opens no channel: {}", describe(&error))),
            Err(_) => Err(format!("RabbitMQ opens no channel within {} s", self.timeout.as_secs_f32())),
        });
        match opened {
            Ok(channel) => {
                let open = Arc::new(Open {
                    link,
                    channel,
                    declared: Mutex::default(),
                    returns: Returns::default(),
                    retired: AtomicBool::new(false),
                });
                *current = Current { open: Some(open.clone()), failed: None };
                Ok(open)
            }
            Err(error) => {
                *current = Current { open: kept, failed: Some((Instant::now(), error.clone())) };
                Err(error)
            }
        }
    }

    async fn forget(&self, open: &Arc<Open>) {
        let mut current = self.current.lock().await;
        if current.open.as_ref().is_some_and(|c| Arc::ptr_eq(c, open)) {
            current.open = None;
        }
    }

    fn declared_key(&self, exchange: &str, routing_key: &str) -> (String, String) {
        let by_key = self.declare == Declare::Queue;
        (exchange.to_owned(), if by_key { routing_key.to_owned() } else { String::new() })
    }

    /// Declares what `settings.declare` asks for, once a channel. The default exchange is always there.
    async fn declare(&self, open: &Open, exchange: &str, routing_key: &str) -> lapin::Result<()> {
        if self.declare == Declare::Nothing || (self.declare == Declare::Exchange && exchange.is_empty()) {
            return Ok(());
        }
        let key = self.declared_key(exchange, routing_key);
        let mut declared = open.declared.lock().await;
        if declared.contains(&key) {
            return Ok(());
        }
        Box::pin(self.declare_all(open, exchange, routing_key)).await?;
        if declared.len() < MAX_DECLARED {
            declared.insert(key);
        }
        Ok(())
    }

    async fn declare_all(&self, open: &Open, exchange: &str, routing_key: &str) -> lapin::Result<()> {
        if !exchange.is_empty() {
            let kind = ExchangeKind::Custom(self.exchange_type.clone());
            let options = ExchangeDeclareOptions { durable: true, ..Default::default() };
            open.channel.exchange_declare(exchange.into(), kind, options, FieldTable::default()).await?;
        }
        if self.declare == Declare::Queue {
            self.declare_queue(open, exchange, routing_key).await?;
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

/// What is left of the channel before goes first: its messages keep their place before those of the new one.
async fn open_channel(link: &Link, before: Option<&Open>) -> lapin::Result<Channel> {
    if let Some(before) = before {
        before.channel.close(200, "OK".into()).await?;
    }
    let channel = link.connection.create_channel().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    Ok(channel)
}

/// Whose return it is, and why.
fn read_return(message: &BasicReturnMessage) -> (Uuid, String) {
    let id = message.delivery.properties.message_id().as_ref().and_then(|id| id.as_str().parse().ok());
    (id.unwrap_or_default(), format!("{} {}", message.reply_code, message.reply_text))
}

/// AMQP sends a message's properties in one frame; a larger one would close the connection for all.
fn too_many_headers(open: &Open, event: &Event) -> Option<Outcome> {
    let bytes: usize = headers(event).map(|(key, text)| key.len() + text.len() + 6).sum();
    let limit = match open.link.connection.configuration().frame_max() {
        0 => return None,
        limit => (limit as usize).saturating_sub(2048),
    };
    (bytes > limit).then(|| Outcome::Rejected {
        error: format!("too large for RabbitMQ: headers of {bytes} bytes, where a frame holds {limit}"),
    })
}

fn failed(error: String) -> Outcome {
    Outcome::Failed { error, retry_in: None }
}

fn unavailable(error: String) -> Outcome {
    Outcome::Unavailable { error, retry_in: None }
}

/// Those that the event has.
fn headers(event: &Event) -> impl Iterator<Item = (&'static str, &str)> {
    let of_metadata = |key| event.metadata.get(key).and_then(|v| v.as_str());
    [
        ("event_version", Some(event.event_version.as_str())),
        ("aggregate_type", event.aggregate_type.as_deref()),
        ("aggregate_id", event.aggregate_id.as_deref()),
        ("tenant_id", event.tenant_id.as_deref()),
        ("traceparent", of_metadata("traceparent")),
        ("tracestate", of_metadata("tracestate")),
    ]
    .into_iter()
    .filter_map(|(key, text)| Some((key, text?)))
}

fn properties(event: &Event, attempt: u32) -> BasicProperties {
    let mut table = FieldTable::default();
    for (key, text) in headers(event) {
        table.insert(ShortString::from(key), AMQPValue::LongString(text.into()));
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

//! What a consumer sees of RabbitMQ: queues that a test binds, and the messages that arrive in them.

use std::collections::BTreeMap;
use std::ops::Deref;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow};
use futures_util::StreamExt;
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Connection, ConnectionProperties, Consumer, ExchangeKind};
use uuid::Uuid;

/// Dereferences to its `lapin::Channel`. Dropped, its connection closes.
pub struct Channel {
    channel: lapin::Channel,
    connection: Connection,
}

/// A queue being consumed, each message acknowledged as it is taken.
pub struct Queue {
    consumer: Consumer,
    channel: Channel,
}

/// A message as it arrived.
#[derive(Debug, Clone)]
pub struct Message {
    pub at: SystemTime,
    pub exchange: String,
    pub routing_key: String,
    pub redelivered: bool,
    pub message_id: Option<String>,
    pub kind: Option<String>,
    pub content_type: Option<String>,
    pub delivery_mode: Option<u8>,
    pub timestamp: Option<u64>,
    pub correlation_id: Option<String>,
    pub priority: Option<u8>,
    pub expiration: Option<String>,
    pub reply_to: Option<String>,
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
}

impl Channel {
    pub async fn open(url: &str) -> Result<Self> {
        let connection = Connection::connect(url, ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        Ok(Channel { channel, connection })
    }

    /// Declares a durable topic exchange as the relay does, and binds a durable queue to it.
    pub async fn bind(&self, exchange: &str, routing_key: &str, queue: &str) -> Result<()> {
        let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
        self.channel.exchange_declare(exchange.into(), ExchangeKind::Topic, durable, FieldTable::default()).await?;
        self.declare(queue, &[]).await?;
        let bind = QueueBindOptions::default();
        Ok(self
            .channel
            .queue_bind(queue.into(), exchange.into(), routing_key.into(), bind, FieldTable::default())
            .await?)
    }

    /// Declares a durable queue with arguments such as `("x-overflow", "reject-publish")`; numbers are sent as such.
    pub async fn declare(&self, queue: &str, arguments: &[(&str, &str)]) -> Result<()> {
        let mut table = FieldTable::default();
        for (name, value) in arguments {
            let value = value.parse().map_or_else(|_| AMQPValue::LongString((*value).into()), AMQPValue::LongLongInt);
            table.insert((*name).into(), value);
        }
        let durable = QueueDeclareOptions { durable: true, ..Default::default() };
        self.channel.queue_declare(queue.into(), durable, table).await?;
        Ok(())
    }

    /// Consumes a queue that exists.
    pub async fn consume(self, queue: &str) -> Result<Queue> {
        let consumer = self
            .channel
            .basic_consume(queue.into(), "".into(), BasicConsumeOptions::default(), FieldTable::default())
            .await?;
        Ok(Queue { consumer, channel: self })
    }

    /// Whether the connection is still open.
    pub fn is_open(&self) -> bool {
        self.connection.status().connected()
    }
}

impl Deref for Channel {
    type Target = lapin::Channel;

    fn deref(&self) -> &lapin::Channel {
        &self.channel
    }
}

impl Queue {
    /// Whether its connection is still open.
    pub fn is_open(&self) -> bool {
        self.channel.is_open()
    }

    /// The next message, or an error after the limit.
    pub async fn next(&mut self, limit: Duration) -> Result<Message> {
        let delivery = tokio::time::timeout(limit, self.consumer.next())
            .await
            .map_err(|_| anyhow!("no message within {limit:?}"))?
            .context("the consumer was cancelled")??;
        delivery.ack(BasicAckOptions::default()).await?;
        Ok(Message::from(delivery))
    }

    /// The next `count` messages, in the order of arrival; the limit is for each.
    pub async fn take(&mut self, count: usize, limit: Duration) -> Result<Vec<Message>> {
        let mut messages = Vec::with_capacity(count);
        while messages.len() < count {
            let message = self.next(limit).await;
            messages.push(message.with_context(|| format!("{} of {count} messages arrived", messages.len()))?);
        }
        Ok(messages)
    }
}

impl Message {
    /// The event's identity.
    pub fn event_id(&self) -> Result<Uuid> {
        Ok(self.message_id.as_deref().context("no message_id")?.parse()?)
    }

    pub fn json(&self) -> Result<serde_json::Value> {
        Ok(serde_json::from_slice(&self.body)?)
    }
}

impl From<Delivery> for Message {
    fn from(delivery: Delivery) -> Self {
        let properties = &delivery.properties;
        let text = |value: &Option<lapin::types::ShortString>| value.as_ref().map(|text| text.as_str().to_owned());
        let headers = properties.headers().as_ref().map(|table| table.inner());
        Message {
            at: SystemTime::now(),
            exchange: delivery.exchange.as_str().to_owned(),
            routing_key: delivery.routing_key.as_str().to_owned(),
            redelivered: delivery.redelivered,
            message_id: text(properties.message_id()),
            kind: text(properties.kind()),
            content_type: text(properties.content_type()),
            delivery_mode: *properties.delivery_mode(),
            timestamp: *properties.timestamp(),
            correlation_id: text(properties.correlation_id()),
            priority: *properties.priority(),
            expiration: text(properties.expiration()),
            reply_to: text(properties.reply_to()),
            headers: headers
                .into_iter()
                .flatten()
                .map(|(name, value)| (name.as_str().to_owned(), show(value)))
                .collect(),
            body: delivery.data,
        }
    }
}

fn show(value: &AMQPValue) -> String {
    match value {
        AMQPValue::LongString(text) => String::from_utf8_lossy(text.as_bytes()).into_owned(),
        AMQPValue::ShortString(text) => text.as_str().to_owned(),
        AMQPValue::LongInt(number) => number.to_string(),
        AMQPValue::LongLongInt(number) => number.to_string(),
        AMQPValue::Double(number) => number.to_string(),
        AMQPValue::Boolean(truth) => truth.to_string(),
        other => format!("{other:?}"),
    }
}

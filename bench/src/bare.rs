//! Publishing with nothing behind it: what RabbitMQ and the client library can do here and now.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Result, bail};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Confirmation, PublisherConfirm};
use outbox_tests::broker::Broker;
use outbox_tests::queue::Channel;
use uuid::Uuid;

use crate::stage::EXCHANGE;

const PERSISTENT: u8 = 2;

/// A channel in confirm mode that sends messages like the relay's: persistent, mandatory, the same properties.
pub struct Publisher(Channel);

impl Publisher {
    pub async fn open(broker: &Broker) -> Result<Self> {
        let channel = broker.channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        Ok(Publisher(channel))
    }

    /// Publishes one message and waits for its confirm.
    pub async fn one(&self, event_id: &Uuid, body: &[u8]) -> Result<Duration> {
        let started = Instant::now();
        check(self.publish(event_id, body).await?.await?)?;
        Ok(started.elapsed())
    }

    /// Publishes many, with so many confirms awaited at once.
    pub async fn many(&self, count: usize, in_flight: usize, body: &[u8]) -> Result<Duration> {
        let started = Instant::now();
        let mut confirms = FuturesUnordered::new();
        for number in 0..count {
            if confirms.len() >= in_flight
                && let Some(confirmation) = confirms.next().await
            {
                check(confirmation?)?;
            }
            confirms.push(self.publish(&Uuid::from_u128(number as u128), body).await?);
        }
        while let Some(confirmation) = confirms.next().await {
            check(confirmation?)?;
        }
        Ok(started.elapsed())
    }

    async fn publish(&self, event_id: &Uuid, body: &[u8]) -> lapin::Result<PublisherConfirm> {
        let options = BasicPublishOptions { mandatory: true, ..Default::default() };
        self.0.basic_publish(EXCHANGE.into(), "bench.bare".into(), options, body, properties(event_id)).await
    }
}

fn properties(event_id: &Uuid) -> BasicProperties {
    let mut headers = FieldTable::default();
    headers.insert("event_version".into(), AMQPValue::LongString("v1".into()));
    headers.insert("aggregate_type".into(), AMQPValue::LongString("bench".into()));
    headers.insert("attempt".into(), AMQPValue::LongInt(1));
    BasicProperties::default()
        .with_delivery_mode(PERSISTENT)
        .with_content_type("application/json".into())
        .with_message_id(event_id.to_string().into())
        .with_timestamp(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()))
        .with_app_id("pg_outbox".into())
        .with_type("bench.bare".into())
        .with_headers(headers)
}

fn check(confirmation: Confirmation) -> Result<()> {
    match confirmation {
        Confirmation::Ack(None) => Ok(()),
        other => bail!("RabbitMQ did not take a message: {other:?}"),
    }
}

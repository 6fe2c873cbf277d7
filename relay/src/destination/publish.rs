//! One message on one channel: published as `mandatory`, and followed to its confirm.

use lapin::Confirmation;
use lapin::options::BasicPublishOptions;

use super::Outcome;
use super::channel::Open;
use super::message::{Message, read_return};
use super::topology::Undeclared;

/// How one try on one channel ended.
pub enum Try {
    Over(Outcome),
    /// No queue is bound for it: why.
    Unroutable(String),
    /// The channel was retired meanwhile.
    Again,
}

/// Why a try came to no end.
pub enum Fault {
    /// The broker closed the channel, or the connection broke.
    Closed(lapin::Error),
    /// What was to be declared first.
    Undeclared(String),
    NoConfirm,
    Blocked(String),
}

impl From<Undeclared> for Fault {
    fn from(error: Undeclared) -> Self {
        match error {
            Undeclared::OnChannel(error) => Fault::Closed(error),
            Undeclared::Apart(error) => Fault::Undeclared(error),
        }
    }
}

pub async fn publish(open: &Open, message: &Message<'_>) -> Result<Try, Fault> {
    let (names, published) = (&message.names, open.returns.published(message.event.event_id));
    let options = BasicPublishOptions { mandatory: true, ..Default::default() };
    let (exchange, key) = (names.exchange.clone(), names.key.clone());
    let publishing = open.channel.basic_publish(exchange, key, options, &message.body, message.properties(open));
    let confirm = publishing.await.map_err(Fault::Closed)?;
    let (acknowledged, carried) = match confirm.await.map_err(Fault::Closed)? {
        Confirmation::Ack(carried) => (true, carried),
        Confirmation::Nack(carried) => (false, carried),
        Confirmation::NotRequested => {
            return Ok(Try::Over(failed("RabbitMQ confirms nothing on this channel".into())));
        }
    };
    let returned = published.confirmed(carried.map(|message| read_return(&message))).await;
    let (exchange, key) = (names.exchange.as_str(), names.key.as_str());
    Ok(if let Some(why) = returned {
        Try::Unroutable(format!(
            "unroutable: no queue is bound to exchange {exchange:?} for routing key {key:?} ({why})"
        ))
    } else if !acknowledged {
        Try::Over(failed(format!(
            "nacked by RabbitMQ: a queue for routing key {key:?} rejects messages, it may be full"
        )))
    } else if open.is_retired() {
        Try::Again
    } else {
        Try::Over(Outcome::Delivered)
    })
}

pub fn failed(error: String) -> Outcome {
    Outcome::Failed { error, retry_in: None }
}

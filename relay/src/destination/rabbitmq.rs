//! RabbitMQ: persistent messages, publisher confirms, `mandatory`.
//!
//! | what happens | outcome |
//! | --- | --- |
//! | confirmed, and routed to a queue | delivered |
//! | returned: no queue is bound for the key | failed, "unroutable" (whose return it is: see `returns`) |
//! | negatively acknowledged (a full queue that rejects) | failed, "nacked" |
//! | larger than the broker allows; names that AMQP can't carry, or that would mean something else | rejected |
//! | alarm: the broker takes no messages | unavailable, "blocked" |
//! | channel closed by the broker: no such exchange, another type, no permission | unavailable, "channel closed"; failed if the name is a template's, for others may work |
//! | no connection, or it is lost, or it does not confirm in time | unable: other relays have connections of their own |
//!
//! The broker closes a channel for one message's sake, and takes along what else is under way on it. So only what it is
//! known to take goes out on the channel that all deliveries share: the first message to an exchange and the largest so far
//! are tried out, one at a time, on a second one, and so is whatever has to be declared.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lapin::ErrorKind;
use lapin::types::ShortString;
use tokio::sync::Mutex;
use tokio::time::timeout;

use super::body::Style;
use super::broker::{Broker, describe};
use super::channel::{Declared, Open, PAUSE, Slot};
use super::json::Object;
use super::message::{Message, Names, too_large};
use super::publish::{Fault, Try, failed, publish};
use super::template::Template;
use super::topology::{Declare, Topology};
use super::{ConfigError, Event, Outcome, Spec, concurrency, duration};
use crate::spans::{self, Attribute};

/// No confirm for this long: the connection is given up.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(30);

/// Publishes under way at once, unless `settings.concurrency` says otherwise.
const CONCURRENCY: usize = 2000;

/// What was under way on a channel that closed for another's sake is published again, at most so many times.
const MAX_TRIES: usize = 5;

pub struct RabbitMq {
    broker: Arc<Broker>,
    exchange: Template,
    routing_key: Template,
    topology: Topology,
    style: Style,
    concurrency: usize,
    timeout: Duration,
    main: Slot,
    /// For what might close its channel; whoever has it is alone there.
    trial: Mutex<Trial>,
    /// The broker has refused a routing key: each is tried out from now on.
    by_key: AtomicBool,
}

#[derive(Default)]
struct Trial {
    slot: Slot,
    /// What is wrong with the destination as a whole, and when that was found out: it holds for all who wait.
    failed: Option<(Instant, String)>,
}

impl RabbitMq {
    /// Connects to nothing yet.
    pub fn build(spec: &Spec, broker: Arc<Broker>) -> Result<Self, ConfigError> {
        let of = |error: ConfigError| ConfigError(format!("destination {}: {error}", spec.name));
        let settings = Object::new(spec.settings.as_str());
        Ok(RabbitMq {
            exchange: Template::parse(spec.exchange.as_deref().unwrap_or("outbox_events")).map_err(of)?,
            routing_key: Template::parse(spec.routing_key.as_deref().unwrap_or("{event_type}")).map_err(of)?,
            topology: Topology::parse(spec, &settings, broker.clone()).map_err(of)?,
            style: Style::of_message(&settings).map_err(of)?,
            concurrency: concurrency(&settings, CONCURRENCY),
            timeout: duration(&settings, "timeout").map_err(of)?.unwrap_or(CONFIRM_TIMEOUT),
            broker,
            main: Slot::default(),
            trial: Mutex::default(),
            by_key: AtomicBool::new(false),
        })
    }

    pub fn concurrency(&self) -> usize {
        self.concurrency
    }

    /// Opens a channel if there is none, and declares what no event changes: consumers can start before the first event.
    /// Without a fixed routing key the queue is there and bound to nothing yet.
    pub async fn prepare(&self) -> Result<(), String> {
        let open = self.main.open(&self.broker, self.timeout).await.map_err(|why| why.text())?;
        let Some(needed) = self.fixed_needs()? else { return Ok(()) };
        if needed.iter().all(|what| open.known.is_declared(what)) {
            return Ok(());
        }
        let trial = self.trial.lock().await;
        let trial = &trial.slot;
        let apart = trial.open(&self.broker, self.timeout).await.map_err(|why| why.text())?;
        let declaring = self.topology.declare(&apart.channel, &open.known, needed);
        match self.bounded(&apart, declaring).await {
            Ok(()) => Ok(()),
            Err(fault) => Err(self.text(&apart, trial, fault).await),
        }
    }

    /// What no event changes; none if that is nothing.
    fn fixed_needs(&self) -> Result<Option<Vec<Declared>>, String> {
        let Some(exchange) = self.exchange.fixed() else { return Ok(None) };
        let key = self.routing_key.fixed();
        let key =
            key.map(|key| ShortString::try_new(key).map_err(|error| format!("routing key: {error}"))).transpose()?;
        Ok(Some(self.topology.needs(&exchange, key.as_ref())))
    }

    /// Whether exchange and queue are as `run` would make them. What is missing is made by `run`, unless `settings.declare`
    /// leaves it to others.
    pub async fn check(&self) -> Result<(), String> {
        let needed = match (self.topology.declare, self.exchange.fixed()) {
            (Declare::Nothing, Some(exchange)) if !exchange.is_empty() => vec![Declared::Exchange(exchange)],
            (Declare::Nothing, _) => Vec::new(),
            _ => self.fixed_needs()?.unwrap_or_default(),
        };
        let trial = self.trial.lock().await;
        let trial = &trial.slot;
        for what in &needed {
            let open = trial.open(&self.broker, self.timeout).await.map_err(|why| why.text())?;
            match self.bounded(&open, self.topology.exists(&open.channel, what)).await {
                Ok(()) if self.topology.declare == Declare::Nothing => continue,
                Ok(()) => {}
                Err(fault) => {
                    let text = self.text(&open, trial, fault).await;
                    if text.contains("NOT_FOUND") && self.topology.declare != Declare::Nothing {
                        continue;
                    }
                    return Err(text);
                }
            }
            if let Err(fault) = self.bounded(&open, self.topology.agrees(&open.channel, what)).await {
                return Err(self.text(&open, trial, fault).await);
            }
        }
        trial.open(&self.broker, self.timeout).await.map(|_| ()).map_err(|why| why.text())
    }

    /// The names for this event, or its end: they can't be carried, or would mean something else.
    fn names(&self, event: &Event) -> Result<Names, Outcome> {
        let rejected = |error| Outcome::Rejected { error };
        let exchange = self.exchange.render(event).map_err(rejected)?;
        let key = self.routing_key.render(event).map_err(rejected)?;
        if exchange.is_empty() && self.exchange.varies() {
            return Err(rejected(
                "the exchange's template yields nothing, which is RabbitMQ's default exchange".into(),
            ));
        }
        let binds = self.topology.declare == Declare::Queue;
        if binds && exchange.is_empty() && key.is_empty() {
            return Err(rejected("the routing key's template yields nothing, which is no name of a queue".into()));
        }
        if binds && !exchange.is_empty() && self.topology.binds_by_pattern() && self.routing_key.is_pattern_by(&key) {
            return Err(rejected(format!(
                "routing key {key:?} holds a wildcard from the event: the queue would be bound to other events' keys"
            )));
        }
        let short = |text| ShortString::try_new(text).map_err(|error| rejected(error.to_string()));
        Ok(Names { exchange: short(exchange)?, key: short(key)? })
    }

    pub fn attributes(&self, event: &Event) -> Vec<Attribute> {
        let mut all = vec![spans::text("messaging.system", "rabbitmq")];
        // An event that has no such name is rejected, which its span says.
        if let Ok(names) = self.names(event) {
            all.push(spans::text("messaging.rabbitmq.destination.exchange", names.exchange.as_str()));
            all.push(spans::text("messaging.rabbitmq.destination.routing_key", names.key.as_str()));
        }
        all
    }

    pub async fn deliver(&self, event: &Event, attempt: u32, span: Option<&str>) -> Outcome {
        let message = match self.message(event, attempt, span) {
            Ok(message) => message,
            Err(outcome) => return outcome,
        };
        let mut closed = String::new();
        for _ in 0..MAX_TRIES {
            let open = match self.main.open(&self.broker, self.timeout).await {
                Ok(open) => open,
                Err(why) => return why.into(),
            };
            if let Some(outcome) = message.too_many_headers(&open) {
                return outcome;
            }
            if !self.is_known(&open, &message)
                && let Some(outcome) = Box::pin(self.try_out(&open, &message)).await
            {
                return outcome;
            }
            match self.bounded(&open, publish(&open, &message)).await {
                Ok(Try::Over(outcome)) => return outcome,
                Ok(Try::Unroutable(error)) => {
                    self.doubt(&open, &message.names);
                    return failed(error);
                }
                Ok(Try::Again) => closed = "the channel was given up".into(),
                Err(Fault::Closed(error)) if open.link.connection.status().connected() => {
                    self.main.forget(&open).await;
                    closed = format!("channel closed by RabbitMQ: {}", describe(&error));
                    if let Some(outcome) = self.blame(&error, &message) {
                        return outcome;
                    }
                }
                Err(fault) => return self.lost(&open, &self.main, fault).await,
            }
        }
        self.closed(closed)
    }

    /// The message for this event, or its end.
    fn message<'a>(&'a self, event: &'a Event, attempt: u32, span: Option<&'a str>) -> Result<Message<'a>, Outcome> {
        let names = self.names(event)?;
        Message::new(event, names, &self.style, attempt, span)
            .map_err(|error| Outcome::Rejected { error: format!("the event can't be written as JSON: {error}") })
    }

    /// Whether the broker has everything for this message and has taken such a one before.
    fn is_known(&self, open: &Open, message: &Message<'_>) -> bool {
        let (names, by_key) = (&message.names, self.by_key.load(Ordering::Relaxed));
        open.known.is_taken(names.exchange.as_str(), names.key.as_str(), message.body.len(), by_key)
            && self.topology.is_ready(&open.known, names.exchange.as_str(), &names.key)
    }

    /// Tries it out alone. None: meanwhile another has shown that all is well.
    async fn try_out(&self, open: &Open, message: &Message<'_>) -> Option<Outcome> {
        let mut trial = self.trial.lock().await;
        if self.is_known(open, message) {
            return None;
        }
        if let Some((_, error)) = trial.failed.as_ref().filter(|(at, _)| at.elapsed() < PAUSE) {
            return Some(Outcome::Unavailable { error: error.clone() });
        }
        let outcome = self.publish_apart(&trial.slot, open, message).await;
        trial.failed = match &outcome {
            Outcome::Unavailable { error } => Some((Instant::now(), error.clone())),
            _ => None,
        };
        Some(outcome)
    }

    /// Publishes on the channel that closes for nobody else's sake.
    async fn publish_apart(&self, trial: &Slot, open: &Open, message: &Message<'_>) -> Outcome {
        let names = &message.names;
        let apart = match trial.open(&self.broker, self.timeout).await {
            Ok(apart) => apart,
            Err(why) => return why.into(),
        };
        let trying = async {
            let needed = self.topology.needs(names.exchange.as_str(), Some(&names.key));
            self.topology.declare(&apart.channel, &open.known, needed).await?;
            publish(&apart, message).await
        };
        match self.bounded(&apart, trying).await {
            Ok(Try::Over(outcome)) => {
                self.taken(open, message);
                if matches!(outcome, Outcome::Failed { .. }) {
                    self.doubt(open, names);
                }
                outcome
            }
            Ok(Try::Unroutable(error)) => {
                self.taken(open, message);
                self.doubt(open, names);
                failed(error)
            }
            Ok(Try::Again) => self.closed("the channel was given up".into()),
            Err(Fault::Closed(error)) if apart.link.connection.status().connected() => {
                trial.forget(&apart).await;
                let text = format!("channel closed by RabbitMQ: {}", describe(&error));
                self.blame(&error, message).unwrap_or_else(|| self.closed(text))
            }
            Err(fault) => self.lost(&apart, trial, fault).await,
        }
    }

    /// The broker has taken this message, so that it takes such ones on the channel that all share.
    fn taken(&self, open: &Open, message: &Message<'_>) {
        let (names, by_key) = (&message.names, self.by_key.load(Ordering::Relaxed));
        open.known.taken(names.exchange.as_str(), names.key.as_str(), message.body.len(), by_key);
    }

    /// A queue or binding that was declared may have been deleted since.
    fn doubt(&self, open: &Open, names: &Names) {
        open.known.doubt_declared(&self.topology.needs(names.exchange.as_str(), Some(&names.key)));
    }

    /// Works on a channel until it ends, the broker blocks publishers, or the time is over.
    async fn bounded<T, E: Into<Fault>>(
        &self,
        open: &Open,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, Fault> {
        let work = pin!(timeout(self.timeout, work));
        match open.link.unless_blocked(work).await {
            Ok(Ok(done)) => done.map_err(Into::into),
            Ok(Err(_)) => Err(Fault::NoConfirm),
            Err(reason) => Err(Fault::Blocked(reason)),
        }
    }

    /// The outcome when the channel, or the whole connection, is of no use any more.
    async fn lost(&self, open: &Arc<Open>, slot: &Slot, fault: Fault) -> Outcome {
        let of_destination = match &fault {
            Fault::Blocked(_) | Fault::Undeclared(_) => true,
            Fault::Closed(_) => open.link.connection.status().connected(),
            Fault::NoConfirm => false,
        };
        let error = self.text(open, slot, fault).await;
        if of_destination { Outcome::Unavailable { error } } else { Outcome::Unable { error } }
    }

    /// What happened, for an operator; gives up what is of no use any more.
    async fn text(&self, open: &Arc<Open>, slot: &Slot, fault: Fault) -> String {
        match fault {
            Fault::Undeclared(text) => text,
            Fault::Blocked(reason) => {
                open.retired.store(true, Ordering::SeqCst);
                reason
            }
            Fault::NoConfirm => {
                open.retired.store(true, Ordering::SeqCst);
                self.broker.abandon(&open.link);
                slot.forget(open).await;
                format!("no confirm from RabbitMQ within {} s", self.timeout.as_secs_f32())
            }
            Fault::Closed(error) => {
                slot.forget(open).await;
                if open.link.connection.status().connected() {
                    return format!("channel closed by RabbitMQ: {}", describe(&error));
                }
                self.broker.abandon(&open.link);
                format!("connection to RabbitMQ lost: {}", describe(&error))
            }
        }
    }

    /// What becomes of an event whose channel closed: others may work where the names are a template's.
    fn closed(&self, error: String) -> Outcome {
        match self.exchange.varies() || self.routing_key.varies() {
            true => failed(error),
            false => Outcome::Unavailable { error },
        }
    }

    /// What becomes of the event if it was the one for which the broker closed the channel; none if it was another.
    fn blame(&self, error: &lapin::Error, message: &Message<'_>) -> Option<Outcome> {
        let names = &message.names;
        let ErrorKind::ProtocolError(_) = error.kind() else { return None };
        let text = describe(error);
        if too_large(&text, message.body.len()) {
            return Some(Outcome::Rejected { error: format!("too large for RabbitMQ: {text}") });
        }
        let exchange = names.exchange.as_str();
        let queue = self.topology.queue_for(exchange, &names.key);
        let queue_varies = exchange.is_empty() && self.routing_key.varies();
        // "access to topic 'k' in exchange 'x'": the first that is named is the one it is about.
        let subjects = [
            ("topic", names.key.as_str(), self.routing_key.varies()),
            ("queue", queue.as_str(), queue_varies),
            ("exchange", exchange, self.exchange.varies()),
        ];
        let (kind, name, varies) = subjects.into_iter().find(|(kind, ..)| text.contains(&format!("{kind} '")))?;
        if kind == "topic" {
            self.by_key.store(true, Ordering::Relaxed);
        }
        if !text.contains(&format!("{kind} '{name}'")) {
            return None;
        }
        let error = format!("channel closed by RabbitMQ: {text}");
        Some(if varies { failed(error) } else { Outcome::Unavailable { error } })
    }
}

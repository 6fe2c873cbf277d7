//! The connection to a RabbitMQ that all destinations of a relay share which name that broker.
//!
//! A task of its own makes it and keeps it, from the first destination on, and says how it stands. Deliveries never wait
//! for it. While the broker blocks publishers (a memory or disk alarm) the connection stays, so that what was sent keeps
//! its place before what follows.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::{Stream, StreamExt};
use lapin::options::ExchangeDeclareOptions;
use lapin::tcp::{OwnedIdentity, OwnedTLSConfig};
use lapin::types::{FieldTable, ShortString};
use lapin::uri::AMQPUri;
use lapin::{Connection, ErrorKind, ExchangeKind};
use tokio::sync::{Notify, watch};
use tokio::time::timeout;

use super::ConfigError;
use super::dial::dial;
use crate::backoff::Backoff;
use crate::config::Amqp;

/// For what is declared apart.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// The longest pause between two tries: when a broker is back, deliveries go on within a second.
const PAUSE: Duration = Duration::from_millis(800);

/// The pause after a refused login, which the broker logs each time.
const PAUSE_REFUSED: Duration = Duration::from_secs(5);

/// Seconds; unless the URL says `?heartbeat=`. After two missed ones the connection counts as lost.
const HEARTBEAT: u16 = 10;

/// How the connection stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// For the first time, and not known yet.
    Connecting,
    Up,
    /// The broker takes no messages at the moment, and says why.
    Blocked(String),
    /// What was last tried failed so.
    Down(String),
}

impl Standing {
    /// Why nothing can be published.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Standing::Connecting | Standing::Up => None,
            Standing::Blocked(reason) | Standing::Down(reason) => Some(reason),
        }
    }
}

pub struct Broker {
    name: Arc<str>,
    /// One for each host.
    uris: Vec<AMQPUri>,
    tls: OwnedTLSConfig,
    kept: AtomicBool,
    standing: watch::Sender<Standing>,
    link: watch::Sender<Option<Arc<Link>>>,
}

/// One open connection.
pub struct Link {
    pub connection: Connection,
    standing: watch::Receiver<Standing>,
    given_up: Notify,
}

impl Link {
    /// Works on it until the broker takes no messages any more: then the error says why.
    pub async fn unless_blocked<T>(&self, work: impl Future<Output = T>) -> Result<T, String> {
        let mut standing = self.standing.clone();
        let blocked = |standing: &Standing| matches!(standing, Standing::Blocked(_));
        if let Standing::Blocked(reason) = &*self.standing.borrow() {
            return Err(reason.clone());
        }
        tokio::select! {
            biased;
            done = work => Ok(done),
            Ok(standing) = standing.wait_for(blocked) => Err(standing.reason().unwrap_or_default().to_owned()),
        }
    }
}

impl Broker {
    /// Connects to nothing yet.
    pub fn new(amqp: &Amqp) -> Result<Self, ConfigError> {
        let mut uris = amqp.url.uris.clone();
        for uri in &mut uris {
            uri.query.heartbeat.get_or_insert(HEARTBEAT);
        }
        Ok(Broker {
            name: amqp.name.clone(),
            uris,
            tls: tls(amqp)?,
            kept: AtomicBool::new(false),
            standing: watch::Sender::new(Standing::Connecting),
            link: watch::Sender::new(None),
        })
    }

    /// How the connection stands, which is made and kept from now on.
    pub fn standing(self: &Arc<Self>) -> watch::Receiver<Standing> {
        if !self.kept.swap(true, Ordering::SeqCst) {
            tokio::spawn(self.clone().keep());
        }
        self.standing.subscribe()
    }

    /// The open connection. The error says why there is none, ready for an operator and without a password.
    pub async fn link(self: &Arc<Self>) -> Result<Arc<Link>, String> {
        let mut standing = self.standing();
        let known = standing.wait_for(|standing| *standing != Standing::Connecting).await;
        let why = known.map_or(None, |standing| standing.reason().map(str::to_owned));
        let link = self.link.borrow().clone();
        link.ok_or_else(|| why.unwrap_or_else(|| "the connection to RabbitMQ is being made".into()))
    }

    /// Gives the connection up: it does not answer any more.
    pub fn abandon(&self, link: &Arc<Link>) {
        link.given_up.notify_one();
    }

    /// Whether a connection can be made.
    pub async fn check(self: &Arc<Self>) -> Result<(), String> {
        self.link().await.map(|_| ())
    }

    /// Declares an exchange in a connection of its own: the broker ends the connection that names a type it does not know.
    pub async fn declare_apart(&self, exchange: ShortString, kind: ExchangeKind) -> Result<(), String> {
        let connection = self.connect().await?;
        let declaring = async {
            let options = ExchangeDeclareOptions { durable: true, ..Default::default() };
            let channel = connection.create_channel().await?;
            channel.exchange_declare(exchange, kind, options, FieldTable::default()).await
        };
        let declared = timeout(CONNECT_TIMEOUT, declaring).await;
        // What it says of its end matters to nobody.
        let _closed = connection.close(200, "OK".into()).await;
        match declared {
            Ok(declared) => declared.map_err(|error| format!("channel closed by RabbitMQ: {}", describe(&error))),
            Err(_) => Err(format!("RabbitMQ declares no exchange within {} s", CONNECT_TIMEOUT.as_secs())),
        }
    }

    async fn keep(self: Arc<Self>) {
        let Some(mut backoff) = Backoff::new(Duration::from_millis(50), PAUSE) else { return };
        loop {
            let why = match self.connect().await {
                Ok(connection) => {
                    backoff.reset();
                    self.serve(connection).await
                }
                Err(why) => why,
            };
            let refused = why.contains("ACCESS_REFUSED");
            self.change(Standing::Down(why));
            tokio::time::sleep(if refused { PAUSE_REFUSED } else { backoff.next() }).await;
        }
    }

    /// Lets this connection be used until it ends; why it did.
    async fn serve(&self, connection: Connection) -> String {
        let mut events = Box::pin(connection.events_listener());
        let link = Arc::new(Link { connection, standing: self.standing.subscribe(), given_up: Notify::new() });
        self.link.send_replace(Some(link.clone()));
        self.change(Standing::Up);
        let why = self.follow(&link, &mut events).await;
        self.link.send_replace(None);
        why
    }

    async fn follow(&self, link: &Link, events: &mut (impl Stream<Item = lapin::Event> + Unpin)) -> String {
        while link.connection.status().connected() {
            let event = tokio::select! {
                event = events.next() => event,
                () = link.given_up.notified() => return "RabbitMQ did not answer on its connection".into(),
            };
            match event {
                Some(lapin::Event::ConnectionBlocked(reason)) => {
                    self.change(Standing::Blocked(format!("RabbitMQ blocks publishers: {reason}")));
                }
                Some(lapin::Event::ConnectionUnblocked) => self.change(Standing::Up),
                Some(lapin::Event::Error(error)) if !link.connection.status().connected() => {
                    return format!("connection to RabbitMQ lost: {}", describe(&error));
                }
                Some(_) => {}
                None => break,
            }
        }
        "connection to RabbitMQ lost".into()
    }

    fn change(&self, standing: Standing) {
        let changed = self.standing.send_if_modified(|present| {
            let changed = *present != standing;
            *present = standing.clone();
            changed
        });
        match &standing {
            Standing::Up if changed => tracing::info!(broker = &*self.name, at = self.place(), "connected to RabbitMQ"),
            Standing::Blocked(reason) | Standing::Down(reason) if changed => {
                tracing::warn!(broker = &*self.name, at = self.place(), reason, "RabbitMQ can't be used");
            }
            _ => {}
        }
    }

    async fn connect(&self) -> Result<Connection, String> {
        dial(&self.uris, &self.tls).await
    }

    fn place(&self) -> String {
        let hosts = self.uris.iter().map(|uri| format!("{}:{}", uri.authority.host, uri.authority.port));
        hosts.collect::<Vec<_>>().join(",")
    }
}

fn tls(amqp: &Amqp) -> Result<OwnedTLSConfig, ConfigError> {
    let read = |path: &Path| {
        std::fs::read(path).map_err(|error| ConfigError(format!("can't read {}: {error}", path.display())))
    };
    let cert_chain = match &amqp.ca_cert {
        Some(path) => {
            Some(String::from_utf8(read(path)?).map_err(|_| ConfigError(format!("{} is not PEM", path.display())))?)
        }
        None => None,
    };
    let identity = match (&amqp.client_cert, &amqp.client_key) {
        (Some(cert), Some(key)) => Some(OwnedIdentity::PKCS8 { pem: read(cert)?, key: read(key)? }),
        (None, None) => None,
        _ => return Err(ConfigError("the AMQP client certificate and its key are needed both".into())),
    };
    Ok(OwnedTLSConfig { identity, cert_chain })
}

/// What RabbitMQ or the network said, in one line.
pub fn describe(error: &lapin::Error) -> String {
    match error.kind() {
        ErrorKind::ProtocolError(amqp) => {
            let text = amqp.get_message().to_string();
            let code = amqp.get_id();
            if text.starts_with(&code.to_string()) { text } else { format!("{code} {text}") }
        }
        ErrorKind::MissingHeartbeatError => "no heartbeat".into(),
        ErrorKind::IOError(io) => io.to_string(),
        _ => error.to_string(),
    }
}

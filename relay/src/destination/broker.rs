//! The connection to RabbitMQ that all RabbitMQ destinations of a relay share.
//!
//! It is made when it is first needed, and made anew after it broke. Every wait has an end. While the broker blocks
//! publishers (a memory or disk alarm) the connection stays, so that what was sent keeps its place before what follows.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use lapin::tcp::{OwnedIdentity, OwnedTLSConfig};
use lapin::uri::AMQPUri;
use lapin::{Connection, ErrorKind};
use tokio::sync::{Mutex, watch};

use super::ConfigError;
use super::dial::dial;
use crate::config::Amqp;

/// After a failure nobody tries again for this long: many deliveries fail together.
pub const PAUSE: Duration = Duration::from_millis(100);

/// Seconds; unless the URL says `?heartbeat=`. After two missed ones the connection counts as lost.
const HEARTBEAT: u16 = 10;

pub struct Broker {
    /// One for each host.
    uris: Vec<AMQPUri>,
    tls: OwnedTLSConfig,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    link: Option<Arc<Link>>,
    failed: Option<(Instant, String)>,
}

/// One open connection.
pub struct Link {
    pub connection: Connection,
    /// Why the broker takes no messages at the moment.
    blocked: watch::Receiver<Option<String>>,
}

impl Link {
    /// Works on it until the broker takes no messages any more: then the error says why.
    pub async fn unless_blocked<T>(&self, work: impl Future<Output = T>) -> Result<T, String> {
        let mut blocked = self.blocked.clone();
        let refusal = |reason: &str| format!("RabbitMQ blocks publishers: {reason}");
        if let Some(reason) = self.blocked.borrow().as_deref() {
            return Err(refusal(reason));
        }
        tokio::select! {
            biased;
            done = work => Ok(done),
            Ok(reason) = blocked.wait_for(Option::is_some) => Err(refusal(reason.as_deref().unwrap_or_default())),
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
        Ok(Broker { uris, tls: tls(amqp)?, state: Mutex::default() })
    }

    /// The open connection. The error is ready for an operator and shows no password.
    pub async fn link(&self) -> Result<Arc<Link>, String> {
        let mut state = self.state.lock().await;
        if let Some(link) = state.link.as_ref().filter(|link| link.connection.status().connected()) {
            return Ok(link.clone());
        }
        state.link = None;
        if let Some((_, error)) = state.failed.as_ref().filter(|(at, _)| at.elapsed() < PAUSE) {
            return Err(error.clone());
        }
        match self.connect().await {
            Ok(link) => {
                let link = Arc::new(link);
                *state = State { link: Some(link.clone()), failed: None };
                Ok(link)
            }
            Err(error) => {
                state.failed = Some((Instant::now(), error.clone()));
                Err(error)
            }
        }
    }

    /// Gives the connection up: it does not answer any more.
    pub async fn abandon(&self, link: &Arc<Link>) {
        let mut state = self.state.lock().await;
        if state.link.as_ref().is_some_and(|current| Arc::ptr_eq(current, link)) {
            state.link = None;
        }
    }

    /// Connects if there is no connection.
    pub async fn check(&self) -> Result<(), String> {
        self.link().await.map(|_| ())
    }

    async fn connect(&self) -> Result<Link, String> {
        let connection = dial(&self.uris, &self.tls).await?;
        let blocked = watch_blocked(&connection);
        Ok(Link { connection, blocked })
    }
}

fn watch_blocked(connection: &Connection) -> watch::Receiver<Option<String>> {
    let (sender, receiver) = watch::channel(None);
    let mut events = Box::pin(connection.events_listener());
    tokio::spawn(async move {
        while let Some(event) = events.next().await {
            match event {
                lapin::Event::ConnectionBlocked(reason) => sender.send_replace(Some(reason)),
                lapin::Event::ConnectionUnblocked => sender.send_replace(None),
                _ => continue,
            };
        }
    });
    receiver
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

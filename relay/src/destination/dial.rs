//! Opening a connection to RabbitMQ: each of its hosts in turn, of each the address that answers first, and the next one
//! when what answered is no broker.

use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use lapin::tcp::{AsyncTcpStream, OwnedTLSConfig};
use lapin::uri::{AMQPScheme, AMQPUri};
use lapin::{Connection, ConnectionProperties};
use tokio::time::timeout;

use super::broker::describe;
use crate::net;

/// From the first packet to an open connection, unless the URL says `?connection_timeout=`.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The first of the hosts that lets us in. The error is ready for an operator and shows no password.
pub async fn dial(uris: &[AMQPUri], tls: &OwnedTLSConfig) -> Result<Connection, String> {
    let mut refused = "AMQP_URL names no host".to_owned();
    for uri in uris {
        match dial_host(uri, tls).await {
            Err(error) => {
                let host = &uri.authority;
                refused = format!("can't connect to RabbitMQ at {}:{}: {error}", host.host, host.port);
            }
            connection => return connection,
        }
    }
    Err(refused)
}

async fn dial_host(uri: &AMQPUri, tls: &OwnedTLSConfig) -> Result<Connection, String> {
    let limit = uri.query.connection_timeout.filter(|millis| *millis > 0).map_or(TIMEOUT, Duration::from_millis);
    let late = |_| format!("no answer within {} s", limit.as_secs_f64());
    let resolving = net::resolve(&uri.authority.host, uri.authority.port);
    let mut addresses = timeout(limit, resolving).await.map_err(late)?.map_err(|error| error.to_string())?;
    let runtime = lapin::runtime::default_runtime().map_err(|error| error.to_string())?;
    loop {
        let answering = net::first_to_answer(addresses.clone(), |address| {
            let runtime = runtime.clone();
            Box::pin(async move { AsyncTcpStream::connect(&runtime, address).await })
        });
        let (address, stream) = timeout(limit, answering).await.map_err(late)?.map_err(|error| error.to_string())?;
        addresses.retain(|other: &SocketAddr| *other != address);
        // lapin asks for its stream once; it would ask again only to recover, which it is not told to do.
        let stream = Mutex::new(Some(stream));
        let tls = tls.clone();
        let hand_over = async move |uri: AMQPUri, _| {
            let stream = stream.lock().unwrap_or_else(PoisonError::into_inner).take();
            let stream = stream.ok_or_else(|| std::io::Error::from(std::io::ErrorKind::NotConnected))?;
            match uri.scheme {
                AMQPScheme::AMQP => Ok(stream),
                AMQPScheme::AMQPS => Ok(stream.into_tls(&uri.authority.host, tls.as_ref()).await?),
            }
        };
        let properties = ConnectionProperties::default().with_connection_name("outbox-relay".into());
        let opening = Connection::connector(uri.clone(), runtime.clone(), hand_over, properties);
        let opened = timeout(limit, opening).await.map_err(late).and_then(|made| made.map_err(|e| describe(&e)));
        match opened {
            Err(_) if !addresses.is_empty() => {}
            opened => return opened,
        }
    }
}

//! Sockets to a server: which of its addresses, and when a peer that says nothing counts as gone.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll};

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use super::conninfo::{At, ConnInfo, Server};
use crate::net;

/// A connection of either kind.
pub enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// The same call of whichever stream it is.
macro_rules! stream {
    ($socket:expr, $stream:ident => $call:expr) => {
        match $socket {
            Socket::Tcp($stream) => $call,
            Socket::Unix($stream) => $call,
        }
    };
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        stream!(&mut *self, stream => Pin::new(stream).poll_read(cx, buf))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        stream!(&mut *self, stream => Pin::new(stream).poll_write(cx, buf))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        stream!(&mut *self, stream => Pin::new(stream).poll_flush(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        stream!(&mut *self, stream => Pin::new(stream).poll_shutdown(cx))
    }
}

/// One place to connect to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// All places of a server.
pub async fn places(info: &ConnInfo, server: &Server) -> io::Result<Vec<Place>> {
    let mut addresses = match &server.at {
        At::Directory(path) => return Ok(vec![Place::Unix(path.join(format!(".s.PGSQL.{}", server.port)))]),
        At::Address(address) => vec![SocketAddr::new(*address, server.port)],
        At::Name(name) => timeout(info.connect_timeout, net::resolve(name, server.port))
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the name was not resolved in time"))??,
    };
    if info.shuffled {
        crate::backoff::shuffle(&mut addresses);
    }
    Ok(addresses.into_iter().map(Place::Tcp).collect())
}

/// Connects to the first of the places that answers.
pub async fn open(info: &ConnInfo, places: &[Place]) -> io::Result<(Place, Socket)> {
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, "no connection in time");
    timeout(info.connect_timeout, connect(info, places)).await.map_err(late)?
}

async fn connect(info: &ConnInfo, places: &[Place]) -> io::Result<(Place, Socket)> {
    if let [Place::Unix(path)] = places {
        return Ok((places[0].clone(), Socket::Unix(UnixStream::connect(path).await?)));
    }
    let addresses: Vec<SocketAddr> = places
        .iter()
        .filter_map(|place| match place {
            Place::Tcp(address) => Some(*address),
            Place::Unix(_) => None,
        })
        .collect();
    let (address, stream) = net::first_to_answer(addresses, |address| Box::pin(TcpStream::connect(address))).await?;
    watch(info, &stream)?;
    Ok((Place::Tcp(address), Socket::Tcp(stream)))
}

/// Has the system notice a peer that has vanished, both while nothing is said and while something is not acknowledged.
fn watch(info: &ConnInfo, stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    if let Some(limit) = info.tcp_user_timeout {
        socket.set_tcp_user_timeout(Some(limit))?;
    }
    if let Some(keepalive) = info.keepalive {
        let probes = TcpKeepalive::new().with_time(keepalive.idle).with_interval(keepalive.interval);
        socket.set_tcp_keepalive(&probes.with_retries(keepalive.count))?;
    }
    Ok(())
}

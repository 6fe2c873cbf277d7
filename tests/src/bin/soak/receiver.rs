//! Receivers of webhooks that answer as badly as receivers do, down to bytes that are no HTTP.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use outbox_tests::trace::now_us;
use outbox_tests::{scratch, wait};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use uuid::Uuid;

use crate::record::{Arrival, Shared};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mood {
    Well,
    Slow(Duration),
    /// A status, with `Retry-After` in seconds.
    Status(u16, Option<u64>),
    Hang,
    Garbage,
    /// The connection is closed instead of an answer.
    Close,
}

/// One port; the path of a request names its destination.
pub struct Host {
    port: u16,
    mood: Arc<Mutex<Mood>>,
    record: Shared,
    listener: Mutex<Option<JoinHandle<()>>>,
}

impl Host {
    pub fn start(record: Shared) -> Result<Self> {
        let host = Host {
            port: scratch::free_port()?,
            mood: Arc::new(Mutex::new(Mood::Well)),
            record,
            listener: Mutex::default(),
        };
        host.listen()?;
        Ok(host)
    }

    pub fn url(&self, destination: &str) -> String {
        format!("http://127.0.0.1:{}/{destination}", self.port)
    }

    pub fn set(&self, mood: Mood) {
        *self.mood.lock().unwrap_or_else(PoisonError::into_inner) = mood;
    }

    /// Connections break, and new ones are refused.
    pub fn down(&self) {
        if let Some(listener) = self.listener.lock().unwrap_or_else(PoisonError::into_inner).take() {
            listener.abort();
        }
    }

    pub async fn up(&self) -> Result<()> {
        wait::until("the port of the receivers", wait::LONG, async || self.listen().map(Some)).await
    }

    fn listen(&self) -> Result<()> {
        let socket = tokio::net::TcpSocket::new_v4()?;
        socket.set_reuseaddr(true)?;
        socket.bind(([127, 0, 0, 1], self.port).into())?;
        let listener = socket.listen(1024)?;
        let (mood, record) = (self.mood.clone(), self.record.clone());
        let task = tokio::spawn(accept(listener, mood, record));
        *self.listener.lock().unwrap_or_else(PoisonError::into_inner) = Some(task);
        Ok(())
    }
}

async fn accept(listener: TcpListener, mood: Arc<Mutex<Mood>>, record: Shared) {
    // Dropped with this task, which closes the connections.
    let mut connections = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            Ok((stream, _)) = listener.accept() => {
                let (mood, record) = (mood.clone(), record.clone());
                connections.spawn(async move { serve(stream, &mood, &record).await });
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Requests of one connection, until it ends one way or the other.
async fn serve(stream: TcpStream, mood: &Mutex<Mood>, record: &Shared) -> Result<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let Some((destination, event)) = request(&mut stream).await? else { return Ok(()) };
        let mood = *mood.lock().unwrap_or_else(PoisonError::into_inner);
        let at = now_us();
        if let Mood::Slow(time) = mood {
            tokio::time::sleep(time).await;
        }
        let accepted = matches!(mood, Mood::Well | Mood::Slow(_));
        record.arrived(&destination, Arrival { at, event, accepted, redelivered: false });
        let answer = match mood {
            Mood::Well | Mood::Slow(_) => "HTTP/1.1 204 No Content\r\n\r\n".to_owned(),
            Mood::Status(status, None) => format!("HTTP/1.1 {status} Sorry\r\ncontent-length: 0\r\n\r\n"),
            Mood::Status(status, Some(seconds)) => {
                format!("HTTP/1.1 {status} Sorry\r\nretry-after: {seconds}\r\ncontent-length: 0\r\n\r\n")
            }
            Mood::Hang => std::future::pending().await,
            Mood::Garbage => "\u{16}\u{3}\u{1} 220 ready\r\nHTTP/7.0 banana\r\n".to_owned(),
            Mood::Close => return Ok(()),
        };
        stream.get_mut().write_all(answer.as_bytes()).await?;
    }
}

/// The destination and the event of the next request; none: the connection ended.
async fn request(stream: &mut BufReader<TcpStream>) -> Result<Option<(String, Uuid)>> {
    let (mut line, mut destination, mut event, mut length) = (String::new(), String::new(), None, 0);
    if stream.read_line(&mut line).await? == 0 {
        return Ok(None);
    }
    if let Some(path) = line.split(' ').nth(1) {
        destination = path.trim_start_matches('/').to_owned();
    }
    loop {
        line.clear();
        if stream.read_line(&mut line).await? == 0 {
            return Ok(None);
        }
        let Some((name, value)) = line.trim().split_once(':') else { break };
        match name.to_ascii_lowercase().as_str() {
            "webhook-id" => event = Some(value.trim().parse().context("webhook-id")?),
            "content-length" => length = value.trim().parse().context("content-length")?,
            _ => {}
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    Ok(Some((destination, event.context("no webhook-id")?)))
}

//! The least of an HTTP client, for the relay's own pages and for a browser's driver.

use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::wait::LONG;

/// How a server answered.
#[derive(Debug, Clone)]
pub struct Answer {
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    pub fn json(&self) -> Result<serde_json::Value> {
        serde_json::from_str(&self.body).with_context(|| format!("not JSON: {self:?}"))
    }
}

/// Status and body of a page of a server on this machine.
pub async fn get(port: u16, path: &str) -> Result<(u16, String)> {
    let answer = request(port, "GET", path, &[], "").await?;
    Ok((answer.status, answer.body))
}

/// One request of its own connection. A `Host` among the headers takes the place of ours.
pub async fn request(port: u16, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Result<Answer> {
    let mut stream = open(port, method, path, headers, body).await?;
    let mut answer = Vec::new();
    let (head, rest) = loop {
        let read =
            tokio::time::timeout(LONG, stream.read_buf(&mut answer)).await.map_err(|_| anyhow!("no answer"))??;
        if let Some((head, body)) = split(&answer) {
            // A driver keeps its connection open: its answers say how long they are.
            if read == 0 || length(&head).is_some_and(|length| body.len() >= length) {
                break (head, body);
            }
        } else if read == 0 {
            return Err(anyhow!("no HTTP answer"));
        }
    };
    let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
    let body = if chunked { unchunked(&rest)? } else { String::from_utf8(rest)? };
    let mut lines = head.lines();
    let status = lines.next().and_then(|line| line.split(' ').nth(1)).context("no HTTP status")?.parse()?;
    let headers = lines.filter_map(|line| line.split_once(':'));
    let headers = headers.map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned())).collect();
    Ok(Answer { status, headers, body })
}

/// Sends a request and leaves the answer to be read.
pub async fn open(port: u16, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
    let mut request = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\n");
    if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("host")) {
        request += &format!("Host: localhost:{port}\r\n");
    }
    for (name, value) in headers {
        request += &format!("{name}: {value}\r\n");
    }
    if !body.is_empty() || method == "POST" {
        request += &format!("Content-Length: {}\r\n", body.len());
    }
    stream.write_all(format!("{request}\r\n{body}").as_bytes()).await?;
    Ok(stream)
}

fn split(answer: &[u8]) -> Option<(String, Vec<u8>)> {
    let at = answer.windows(4).position(|window| window == b"\r\n\r\n")?;
    Some((String::from_utf8_lossy(&answer[..at]).into_owned(), answer[at + 4..].to_vec()))
}

fn length(head: &str) -> Option<usize> {
    let lines = head.lines().filter_map(|line| line.split_once(':'));
    lines
        .filter(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .find_map(|(_, value)| value.trim().parse().ok())
}

fn unchunked(mut rest: &[u8]) -> Result<String> {
    let mut body = Vec::new();
    while let Some(end) = rest.windows(2).position(|window| window == b"\r\n") {
        let size = usize::from_str_radix(std::str::from_utf8(&rest[..end])?.trim(), 16)?;
        if size == 0 {
            break;
        }
        let chunk = rest.get(end + 2..end + 2 + size).context("a chunk that ends too early")?;
        body.extend_from_slice(chunk);
        rest = rest.get(end + 2 + size + 2..).unwrap_or_default();
    }
    Ok(String::from_utf8(body)?)
}

/// Reads server-sent events until one contains a text, and returns it.
pub async fn event_with(stream: &mut TcpStream, heard: &mut String, text: &str, limit: Duration) -> Result<String> {
    let reading = async {
        loop {
            while let Some(end) = heard.find("\n\n") {
                let event: String = heard.drain(..end + 2).collect();
                if event.contains(text) {
                    return Ok(event);
                }
            }
            let mut some = Vec::new();
            if stream.read_buf(&mut some).await? == 0 {
                return Err(anyhow!("the stream has ended"));
            }
            heard.push_str(&String::from_utf8_lossy(&some));
        }
    };
    tokio::time::timeout(limit, reading).await.map_err(|_| anyhow!("no event with {text:?} within {limit:?}"))?
}

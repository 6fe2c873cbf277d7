//! `healthcheck`: asks the relay on this machine whether it is ready, for images that have no curl.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{Outcome, answer};
use crate::cli::Output;
use crate::error::Result;

/// For the whole question: the page asks nobody else.
const LIMIT: Duration = Duration::from_secs(5);

/// Bytes of the answer to read at most.
const LARGEST: u64 = 16 * 1024;

pub async fn healthcheck(listens: SocketAddr, output: &Output) -> Result<Outcome> {
    let at = reachable(listens);
    let (ready, detail) = match timeout(LIMIT, ask(at)).await {
        Ok(Ok((200, body))) => (true, body),
        Ok(Ok((status, body))) => (false, format!("{status}: {body}")),
        Ok(Err(error)) => (false, format!("no answer from {at}: {error}")),
        Err(_) => (false, format!("no answer from {at} within {} s", LIMIT.as_secs())),
    };
    answer(output, &json!({"ready": ready, "detail": detail}), || format!("{}\n", super::table::clean(&detail)))?;
    Ok(Outcome::well_if(ready))
}

/// Who listens on every address is reached at loopback.
fn reachable(listens: SocketAddr) -> SocketAddr {
    let ip = match listens.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listens.port())
}

async fn ask(at: SocketAddr) -> std::io::Result<(u16, String)> {
    let mut stream = TcpStream::connect(at).await?;
    let request = format!("GET /readyz HTTP/1.1\r\nHost: {at}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.take(LARGEST).read_to_end(&mut answer).await?;
    let read = read(&String::from_utf8_lossy(&answer));
    read.ok_or_else(|| std::io::Error::new(std::io::ErrorKind::InvalidData, "that is no HTTP"))
}

/// Status and body.
fn read(answer: &str) -> Option<(u16, String)> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.trim().parse().ok()?;
    Some((status, body.trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_a_status_and_a_body() {
        let answer = "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 9\r\n\r\nnot yet\n";
        assert_eq!(read(answer), Some((503, "not yet".into())));
        assert_eq!(read("SSH-2.0-OpenSSH\r\n\r\n"), None);
    }

    #[test]
    fn every_address_means_loopback() {
        for (listens, at) in [("0.0.0.0:9464", "127.0.0.1:9464"), ("[::]:1", "[::1]:1"), ("10.1.2.3:80", "10.1.2.3:80")]
        {
            assert_eq!(reachable(listens.parse().unwrap()).to_string(), at);
        }
    }
}

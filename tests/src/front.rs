//! What may stand before a receiver: TLS that wants a client certificate, and a forward proxy.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, anyhow};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig, crypto};

use crate::tls::Identity;

/// Hands on to a receiver what comes over TLS. Ends when dropped.
pub struct TlsFront {
    port: u16,
    task: JoinHandle<()>,
}

impl TlsFront {
    /// Shows this certificate. With an authority, only clients with a certificate of that one are let in.
    pub async fn start(identity: &Identity, clients: Option<&Path>, to: u16) -> Result<Self> {
        let provider = Arc::new(crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
        let builder = match clients {
            None => builder.with_no_client_auth(),
            Some(authority) => {
                let mut roots = RootCertStore::empty();
                roots.add(CertificateDer::from_pem_file(authority).map_err(|error| anyhow!("{error:?}"))?)?;
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build()?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let chain = CertificateDer::from_pem_file(&identity.certificate).map_err(|error| anyhow!("{error:?}"))?;
        let key = PrivateKeyDer::from_pem_file(&identity.key).map_err(|error| anyhow!("{error:?}"))?;
        let acceptor = TlsAcceptor::from(Arc::new(builder.with_single_cert(vec![chain], key)?));
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let port = listener.local_addr()?.port();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    let mut client = acceptor.accept(stream).await?;
                    let mut receiver = TcpStream::connect(("127.0.0.1", to)).await?;
                    copy_bidirectional(&mut client, &mut receiver).await
                });
            }
        });
        Ok(TlsFront { port, task })
    }

    pub fn url(&self, path: &str) -> String {
        format!("https://127.0.0.1:{}/{path}", self.port)
    }
}

impl Drop for TlsFront {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A forward proxy for HTTP, with CONNECT. Remembers what it was asked; ends when dropped.
pub struct Proxy {
    port: u16,
    asked: Arc<Mutex<Vec<String>>>,
    task: JoinHandle<()>,
}

impl Proxy {
    /// With a login (base64 of `user:password`) it refuses all others with 407.
    pub async fn start(login: Option<&'static str>) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let port = listener.local_addr()?.port();
        let asked = Arc::<Mutex<Vec<String>>>::default();
        let all = asked.clone();
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(serve(client, login, all.clone()));
            }
        });
        Ok(Proxy { port, asked, task })
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub fn url_as(&self, login: &str) -> String {
        format!("http://{login}@127.0.0.1:{}", self.port)
    }

    /// The first lines of all requests so far.
    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// One request: a tunnel, or a request that is handed on as it is, and then whatever follows it.
async fn serve(mut client: TcpStream, login: Option<&str>, asked: Arc<Mutex<Vec<String>>>) -> Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(client.read_u8().await?);
    }
    let text = String::from_utf8(head.clone())?;
    let line = text.lines().next().context("a request line")?.to_owned();
    asked.lock().unwrap_or_else(PoisonError::into_inner).push(line.clone());
    let knows = |login: &str| {
        text.to_ascii_lowercase().contains(&format!("proxy-authorization: basic {login}").to_ascii_lowercase())
    };
    if login.is_some_and(|login| !knows(login)) {
        let answer =
            "HTTP/1.1 407 Proxy Authentication Required\r\nproxy-authenticate: Basic\r\ncontent-length: 0\r\n\r\n";
        return Ok(client.write_all(answer.as_bytes()).await?);
    }
    let target = line.split(' ').nth(1).context("a target")?;
    let host = target.trim_start_matches("http://").split('/').next().context("a host")?;
    let Ok(mut receiver) = TcpStream::connect(host).await else {
        return Ok(client.write_all(b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n").await?);
    };
    match line.starts_with("CONNECT ") {
        true => client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await?,
        false => receiver.write_all(&head).await?,
    }
    copy_bidirectional(&mut client, &mut receiver).await?;
    Ok(())
}

//! Connecting: one session of PostgreSQL, with what it tells us unasked.

use std::time::Duration;

use tokio::sync::mpsc::UnboundedSender;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_postgres::config::SslMode as TlsUse;
use tokio_postgres::error::SqlState;
use tokio_postgres::{AsyncMessage, Client, Notification};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::conninfo::{ConnInfo, SslMode};
use super::tls;
use crate::error::{Error, Result};

/// From the first packet to a session that takes queries. What accepts and then says nothing is no server.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Makes sessions; cheap to clone.
#[derive(Clone)]
pub struct Connector {
    info: ConnInfo,
    tls: MakeRustlsConnect,
}

/// A session. Its task ends when the connection does, and the connection ends when this is dropped.
pub struct Connected {
    pub client: Client,
    /// Ends with the reason when the connection is lost.
    pub driver: Driver,
    pub utf8: bool,
    /// Which of the hosts it is.
    host: usize,
}

/// Aborts the connection's task when dropped, so that a session never outlives its owner.
pub struct Driver(JoinHandle<Result<()>>);

impl Driver {
    pub async fn ended(&mut self) -> Result<()> {
        match (&mut self.0).await {
            Ok(result) => result,
            Err(join) => Err(Error::Server(format!("connection task: {join}"))),
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Connector {
    pub fn new(info: ConnInfo) -> Result<Self> {
        let tls = tls::connector(&info.tls)?;
        Ok(Connector { info, tls })
    }

    pub fn target(&self) -> String {
        self.info.target()
    }

    /// Connects to the first of the hosts that answers as it should. Notifications go to `notified`; notices of the server
    /// go to the debug log.
    pub async fn connect(&self, notified: Option<UnboundedSender<Notification>>) -> Result<Connected> {
        let mut refused = Error::Configuration("DATABASE_URL names no host".into());
        for host in 0..self.info.hosts() {
            match self.connect_to(host, notified.clone()).await {
                Err(error) => refused = error,
                connected => return connected,
            }
        }
        Err(refused)
    }

    /// A second session with the same server.
    pub async fn connect_beside(&self, first: &Connected) -> Result<Connected> {
        self.connect_to(first.host, None).await
    }

    async fn connect_to(&self, host: usize, notified: Option<UnboundedSender<Notification>>) -> Result<Connected> {
        let mut config = self.info.of_host(host);
        match self.connect_with(&config, host, notified.clone()).await {
            Err(error) if self.info.tls.mode == SslMode::Allow && refused_without_tls(&error) => {
                config.ssl_mode(TlsUse::Require);
                self.connect_with(&config, host, notified).await
            }
            other => other,
        }
    }

    async fn connect_with(
        &self,
        config: &tokio_postgres::Config,
        host: usize,
        notified: Option<UnboundedSender<Notification>>,
    ) -> Result<Connected> {
        let limit = TIMEOUT.max(config.get_connect_timeout().copied().unwrap_or_default());
        let (client, mut connection) = timeout(limit, config.connect(self.tls.clone()))
            .await
            .map_err(|_| Error::Server(format!("PostgreSQL did not answer within {} s", limit.as_secs())))??;
        let utf8 = connection.parameter("server_encoding") == Some("UTF8");
        let driver = tokio::spawn(async move {
            loop {
                match std::future::poll_fn(|cx| connection.poll_message(cx)).await {
                    Some(Ok(AsyncMessage::Notification(notification))) => {
                        if let Some(notified) = &notified {
                            // The receiver is gone only while the session ends.
                            let _ = notified.send(notification);
                        }
                    }
                    Some(Ok(AsyncMessage::Notice(notice))) => {
                        tracing::debug!(message = notice.message(), "notice from PostgreSQL");
                    }
                    Some(Ok(_)) => {}
                    Some(Err(error)) => return Err(error.into()),
                    None => return Ok(()),
                }
            }
        });
        Ok(Connected { client, driver: Driver(driver), utf8, host })
    }
}

fn refused_without_tls(error: &Error) -> bool {
    matches!(error, Error::Database(error)
        if error.code() == Some(&SqlState::INVALID_AUTHORIZATION_SPECIFICATION))
}

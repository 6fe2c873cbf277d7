//! Connecting: one session of PostgreSQL, with what it tells us unasked.

use tokio::sync::mpsc::UnboundedSender;
use tokio::task::JoinHandle;
use tokio_postgres::config::SslMode as TlsUse;
use tokio_postgres::error::SqlState;
use tokio_postgres::{AsyncMessage, Client, Notification};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::conninfo::{ConnInfo, SslMode};
use super::tls;
use crate::error::Result;

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
}

/// Aborts the connection's task when dropped, so that a session never outlives its owner.
pub struct Driver(JoinHandle<Result<()>>);

impl Driver {
    pub async fn ended(&mut self) -> Result<()> {
        match (&mut self.0).await {
            Ok(result) => result,
            Err(join) => Err(crate::error::Error::Server(format!("connection task: {join}"))),
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

    /// Notifications go to `notified`; notices of the server go to the debug log.
    pub async fn connect(&self, notified: Option<UnboundedSender<Notification>>) -> Result<Connected> {
        match self.connect_with(&self.info.config, notified.clone()).await {
            Err(error) if self.info.tls.mode == SslMode::Allow && refused_without_tls(&error) => {
                let mut config = self.info.config.clone();
                config.ssl_mode(TlsUse::Require);
                self.connect_with(&config, notified).await
            }
            other => other,
        }
    }

    async fn connect_with(
        &self,
        config: &tokio_postgres::Config,
        notified: Option<UnboundedSender<Notification>>,
    ) -> Result<Connected> {
        let (client, mut connection) = config.connect(self.tls.clone()).await?;
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
        Ok(Connected { client, driver: Driver(driver), utf8 })
    }
}

fn refused_without_tls(error: &crate::error::Error) -> bool {
    matches!(error, crate::error::Error::Database(error)
        if error.code() == Some(&SqlState::INVALID_AUTHORIZATION_SPECIFICATION))
}

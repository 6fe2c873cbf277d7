//! A session of PostgreSQL that keeps the notifications it hears.

use std::ops::{Deref, DerefMut};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use tokio::sync::mpsc;
use tokio_postgres::{AsyncMessage, Client, NoTls, Notification};

use crate::wait;

/// Dereferences to its `tokio_postgres::Client`. Dropped, its connection closes.
pub struct Session {
    client: Client,
    notifications: mpsc::UnboundedReceiver<Notification>,
}

impl Session {
    pub async fn open(url: &str) -> Result<Self> {
        let (client, mut connection) = tokio_postgres::connect(url, NoTls).await?;
        let (sender, notifications) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Some(Ok(message)) = std::future::poll_fn(|context| connection.poll_message(context)).await {
                if let AsyncMessage::Notification(notification) = message {
                    // Nobody listens any more when the session was dropped.
                    let _ = sender.send(notification);
                }
            }
        });
        Ok(Session { client, notifications })
    }

    /// The next notification heard, or an error after the limit.
    pub async fn notification(&mut self, limit: Duration) -> Result<Notification> {
        tokio::time::timeout(limit, self.notifications.recv())
            .await
            .map_err(|_| anyhow!("no notification within {limit:?}"))?
            .context("the connection was closed")
    }

    /// A notification that was heard already.
    pub fn heard(&mut self) -> Option<Notification> {
        self.notifications.try_recv().ok()
    }

    /// Waits until a query of one boolean gives true.
    pub async fn until(&self, query: &str, limit: Duration) -> Result<()> {
        let look = async || {
            Ok(self.client.query_one(query, &[]).await?.get::<_, Option<bool>>(0).unwrap_or(false).then_some(()))
        };
        wait::until(query, limit, look).await
    }

    /// The first column of the only row.
    pub async fn one<T>(&self, query: &str) -> Result<T>
    where
        T: for<'a> tokio_postgres::types::FromSql<'a>,
    {
        let row = self.client.query_one(query, &[]).await.with_context(|| query.to_owned())?;
        Ok(row.try_get(0)?)
    }
}

impl Deref for Session {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl DerefMut for Session {
    fn deref_mut(&mut self) -> &mut Client {
        &mut self.client
    }
}

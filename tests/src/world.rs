//! The world of one test: a database with the extension on a server, and a session of its superuser.

use anyhow::{Result, ensure};
use uuid::Uuid;

use crate::cluster::Cluster;
use crate::relay::Relay;
use crate::session::Session;
use crate::wait::LONG;

pub struct World<'a> {
    pub cluster: &'a Cluster,
    pub database: String,
    pub session: Session,
}

impl World<'static> {
    /// On the server that tests share.
    pub async fn new() -> Result<Self> {
        World::on(Cluster::shared().await?).await
    }
}

impl<'a> World<'a> {
    pub async fn on(cluster: &'a Cluster) -> Result<Self> {
        let database = cluster.database().await?;
        let session = cluster.connect(&database).await?;
        Ok(World { cluster, database, session })
    }

    /// A session that hears the worker's notifications.
    pub async fn listener(&self) -> Result<Session> {
        let listener = self.cluster.connect(&self.database).await?;
        listener.batch_execute("LISTEN outbox_events").await?;
        Ok(listener)
    }

    /// A relay without RabbitMQ.
    pub async fn relay(&self) -> Result<Relay> {
        Relay::start(self.cluster, &self.database, None).await
    }

    /// Adds a webhook and returns its secret.
    pub async fn add_webhook(&self, name: &str, url: &str, settings: &str) -> Result<String> {
        let sql = "SELECT outbox.add_webhook($1, $2, settings => $3::text::jsonb)";
        Ok(self.session.query_one(sql, &[&name, &url, &settings]).await?.get(0))
    }

    pub async fn publish(&self, aggregate: &str) -> Result<Uuid> {
        let sql = "SELECT outbox.publish('contact.created', '{\"name\": \"Ada\"}', 'contact', $1)";
        Ok(self.session.query_one(sql, &[&aggregate]).await?.get(0))
    }

    pub async fn execute(&self, sql: &str) -> Result<()> {
        Ok(self.session.batch_execute(sql).await?)
    }

    pub async fn until(&self, condition: &str) -> Result<()> {
        self.session.until(condition, LONG).await
    }

    /// Waits until all events are processed.
    pub async fn processed(&self) -> Result<()> {
        self.until("SELECT bool_and(status = 'processed') FROM outbox_events").await
    }

    /// Waits for an error that holds this text, both in a delivery and in its event, which does not count as processed.
    pub async fn error(&self, text: &str) -> Result<()> {
        let like = format!("'%{}%'", text.replace('\'', "''"));
        self.until(&format!("SELECT bool_or(last_error LIKE {like}) FROM outbox.deliveries")).await?;
        let statuses =
            format!("SELECT string_agg(DISTINCT status, ' ') FROM outbox_events WHERE last_error LIKE {like}");
        let statuses: Option<String> = self.session.one(&statuses).await?;
        ensure!(statuses.as_ref().is_some_and(|s| !s.contains("processed")), "{text:?} is shown for {statuses:?}");
        Ok(())
    }
}

//! The outbox that most people write first: a trigger that calls pg_notify with the id, and a loop that takes one event
//! at a time: read, mark as processing, publish and await the confirm, mark as processed.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use outbox_tests::session::Session;
use outbox_tests::trace::{Micros, now_us};
use outbox_tests::wait::{self, LONG};
use tokio::task::JoinHandle;
use uuid::Uuid;

use crate::bare::Publisher;

use crate::stage::Stage;

pub const TABLE: &str = "naive_events";

const TRIGGER: &str = "CREATE FUNCTION naive_notify() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_notify('naive_events', NEW.id::text); RETURN NULL; END $$;
    CREATE TRIGGER after_insert AFTER INSERT ON naive_events FOR EACH ROW EXECUTE FUNCTION naive_notify()";
const READ: &str = "SELECT event_id, event_data::text FROM naive_events WHERE id = $1 AND status = 'pending'";
const TAKE: &str = "UPDATE naive_events SET status = 'processing' WHERE id = $1";
const DONE: &str = "UPDATE naive_events SET status = 'processed', processed_at = now() WHERE id = $1";

type Confirmed = Arc<Mutex<HashMap<Uuid, Micros>>>;

pub struct Naive {
    confirmed: Confirmed,
    task: JoinHandle<Result<()>>,
}

impl Naive {
    pub async fn start(stage: &Stage) -> Result<Self> {
        stage.create_like(TABLE).await?;
        // It knows no claims.
        let free = format!("ALTER TABLE {TABLE} DROP CONSTRAINT outbox_events_token_while_processing");
        stage.session.batch_execute(&free).await?;
        stage.session.batch_execute(TRIGGER).await?;
        let session = stage.cluster.connect(&stage.database).await?;
        session.batch_execute("LISTEN naive_events").await?;
        let publisher = Publisher::open(&stage.broker).await?;
        let confirmed = Confirmed::default();
        let task = tokio::spawn(serve(session, publisher, confirmed.clone()));
        Ok(Naive { confirmed, task })
    }

    /// When these were confirmed; waits for the last one.
    pub async fn confirmed(&self, ids: &[Uuid]) -> Result<HashMap<Uuid, Micros>> {
        let look = async || {
            if self.task.is_finished() {
                bail!("the naive outbox's loop has ended");
            }
            let all = self.confirmed.lock().unwrap_or_else(PoisonError::into_inner);
            Ok(ids.iter().all(|id| all.contains_key(id)).then(|| all.clone()))
        };
        wait::until("the naive outbox to publish everything", LONG * 3, look).await
    }

    /// Ends the loop; its error if it had one.
    pub async fn end(self) -> Result<()> {
        self.task.abort();
        match self.task.await {
            Ok(outcome) => outcome,
            Err(error) if error.is_cancelled() => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

async fn serve(mut session: Session, publisher: Publisher, confirmed: Confirmed) -> Result<()> {
    let (read, take) = (session.prepare(READ).await?, session.prepare(TAKE).await?);
    let done = session.prepare(DONE).await?;
    loop {
        let notification = session.notification(LONG * 10).await?;
        let id: i64 = notification.payload().parse().context("not an id")?;
        let Some(row) = session.query_opt(&read, &[&id]).await? else { continue };
        let (event_id, body): (Uuid, String) = (row.try_get(0)?, row.try_get(1)?);
        session.execute(&take, &[&id]).await?;
        publisher.one(&event_id, body.as_bytes()).await?;
        confirmed.lock().unwrap_or_else(PoisonError::into_inner).insert(event_id, now_us());
        session.execute(&done, &[&id]).await?;
    }
}

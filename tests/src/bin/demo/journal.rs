//! When each event was where: this program's own record, joined with the relays' trace.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Result;
use outbox_tests::queue::Queue;
use outbox_tests::receiver::Received;
use outbox_tests::session::Session;
use outbox_tests::trace::{Micros, Trace, micros, now_us};
use outbox_tests::wait::LONG;
use serde_json::Value;
use uuid::Uuid;

#[derive(Default)]
pub struct Journal(Mutex<HashMap<Uuid, Record>>);

#[derive(Default, Clone)]
struct Record {
    kind: Option<String>,
    sent: Micros,
    committed: Micros,
    notified: Option<Micros>,
    queue: Vec<Micros>,
    webhook: Vec<Micros>,
}

/// Milliseconds since COMMIT was sent, for each step.
pub struct Timeline {
    pub kind: String,
    pub steps: BTreeMap<Step, f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    Committed,
    Notified,
    Claimed,
    Confirmed,
    InQueue,
    AtWebhook,
    Answered,
    Processed,
}

impl Step {
    pub const ALL: [Step; 8] = [
        Step::Committed,
        Step::Notified,
        Step::Claimed,
        Step::Confirmed,
        Step::InQueue,
        Step::AtWebhook,
        Step::Answered,
        Step::Processed,
    ];
}

impl Journal {
    pub fn publish(&self, id: Uuid, kind: &str, sent: Micros, committed: Micros) {
        let mut records = self.lock();
        let record = records.entry(id).or_default();
        (record.kind, record.sent, record.committed) = (Some(kind.to_owned()), sent, committed);
    }

    /// The events of this program, with their types.
    pub fn published(&self) -> Vec<(Uuid, String)> {
        self.lock().iter().filter_map(|(id, record)| Some((*id, record.kind.clone()?))).collect()
    }

    pub fn in_queue(&self, id: &Uuid) -> bool {
        self.lock().get(id).is_some_and(|record| !record.queue.is_empty())
    }

    /// When it came to the queue, as often as it did.
    pub fn queue_times(&self, id: &Uuid) -> Vec<Micros> {
        self.lock().get(id).map(|record| record.queue.clone()).unwrap_or_default()
    }

    pub fn webhook_times(&self, id: &Uuid) -> Vec<Micros> {
        self.lock().get(id).map(|record| record.webhook.clone()).unwrap_or_default()
    }

    /// Notes a request; one that was noted before changes nothing.
    pub fn note_webhook(&self, request: &Received) -> Result<()> {
        let (id, at) = (request.event_id()?, micros(request.at));
        let mut records = self.lock();
        let times = &mut records.entry(id).or_default().webhook;
        if !times.contains(&at) {
            times.push(at);
        }
        Ok(())
    }

    /// Notes messages until the queue ends.
    pub fn watch_queue(self: Arc<Self>, mut queue: Queue) {
        tokio::spawn(async move {
            loop {
                match queue.next(LONG).await {
                    Ok(message) => {
                        let Ok(id) = message.event_id() else { continue };
                        self.lock().entry(id).or_default().queue.push(micros(message.at));
                    }
                    Err(_) if queue.is_open() => {}
                    Err(_) => return,
                }
            }
        });
    }

    /// Listens, and notes which event is named when.
    pub async fn watch_notifications(self: Arc<Self>, mut session: Session) -> Result<()> {
        session.batch_execute("LISTEN outbox_events").await?;
        tokio::spawn(async move {
            while !session.is_closed() {
                let Ok(notification) = session.notification(LONG).await else { continue };
                let at = now_us();
                let payload: Value = serde_json::from_str(notification.payload()).unwrap_or_default();
                for event in payload["events"].as_array().into_iter().flatten() {
                    if let Some(id) = event["event_id"].as_str().and_then(|id| id.parse().ok()) {
                        self.lock().entry(id).or_default().notified.get_or_insert(at);
                    }
                }
            }
        });
        Ok(())
    }

    pub fn timelines(&self, ids: &[Uuid], trace: &Trace) -> Vec<Timeline> {
        let records = self.lock();
        ids.iter().filter_map(|id| Some(timeline(id, records.get(id)?, trace))).collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Uuid, Record>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn timeline(id: &Uuid, record: &Record, trace: &Trace) -> Timeline {
    let at = |step: Step| match step {
        Step::Committed => Some(record.committed),
        Step::Notified => record.notified,
        Step::Claimed => trace.at(id, "claimed", None),
        Step::Confirmed => trace.at(id, "confirmed", Some("rabbitmq")),
        Step::InQueue => record.queue.first().copied(),
        Step::AtWebhook => record.webhook.first().copied(),
        Step::Answered => trace.at(id, "confirmed", Some("webhook")),
        Step::Processed => trace.at(id, "settled", None),
    };
    let since = |at: Micros| (at - record.sent) as f64 / 1000.0;
    let steps = Step::ALL.into_iter().filter_map(|step| Some((step, since(at(step)?)))).collect();
    Timeline { kind: record.kind.clone().unwrap_or_default(), steps }
}

//! Sends spans in batches, in the background: a second after the first of a batch, or when there are many. A collector that is
//! away costs nobody anything: what does not fit any more, and what it does not take, is dropped and counted.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus::IntCounter;
use reqwest::header::CONTENT_TYPE;
use reqwest::{Client, StatusCode, redirect};
use serde::Serialize;
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

use super::attribute::{Attribute, text};
use super::context::hex;
use super::{Ended, Settings};
use crate::metrics::Metrics;

/// Spans that wait to be sent.
const ROOM: usize = 4096;

/// Spans of one request.
const BATCH: usize = 512;

/// How long a span waits for others.
const PATIENCE: Duration = Duration::from_secs(1);

/// Tries to send a batch to a collector that is away, and the wait between the first two.
const TRIES: u32 = 4;
const WAIT: Duration = Duration::from_millis(250);

pub struct Exporter {
    spans: Sender<Order>,
    dropped: IntCounter,
    of_roots: f64,
}

enum Order {
    Send(Box<Ended>),
    Finish(oneshot::Sender<()>),
}

impl Exporter {
    pub fn start(settings: Settings, consumer: &str, metrics: &Metrics) -> Result<Self, String> {
        let client = Client::builder()
            .redirect(redirect::Policy::none())
            .timeout(settings.timeout)
            .user_agent(concat!("pg_outbox/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| format!("no HTTP client for spans: {}", error.without_url()))?;
        let mut resource = settings.resource.clone();
        resource.push(text("service.version", env!("CARGO_PKG_VERSION")));
        if !resource.iter().any(|attribute| attribute.is("service.instance.id")) {
            resource.push(text("service.instance.id", consumer));
        }
        let (dropped, of_roots) = (metrics.spans_dropped.clone(), settings.of_roots);
        let (spans, orders) = channel(ROOM);
        let sent = metrics.spans_sent.clone();
        let (place, lost) = (settings.url.host_str().unwrap_or_default().to_owned(), dropped.clone());
        let sender = Batches { client, settings, resource, sent, dropped: lost, place, away: false };
        tokio::spawn(sender.run(orders));
        Ok(Exporter { spans, dropped, of_roots })
    }

    /// Whether a trace that begins here is sampled: as its identity falls.
    pub fn samples(&self, trace_id: &[u8; 16]) -> bool {
        let [.., a, b, c, d] = *trace_id;
        f64::from(u32::from_be_bytes([a, b, c, d])) < self.of_roots * 4_294_967_296.0
    }

    pub fn take(&self, span: Ended) {
        if self.spans.try_send(Order::Send(Box::new(span))).is_err() {
            self.dropped.inc();
        }
    }

    pub async fn finish(&self, limit: Duration) {
        let (done, finished) = oneshot::channel();
        let all_sent = async {
            if self.spans.send(Order::Finish(done)).await.is_ok() {
                // An error says that the task is gone, and with it what it had.
                let _gone = finished.await;
            }
        };
        // What is not sent by then is lost: nobody waits for a collector.
        let _late = timeout(limit, all_sent).await;
    }
}

struct Batches {
    client: Client,
    settings: Settings,
    resource: Vec<Attribute>,
    sent: IntCounter,
    dropped: IntCounter,
    place: String,
    /// The last batch was not taken.
    away: bool,
}

impl Batches {
    async fn run(mut self, mut orders: Receiver<Order>) {
        let mut batch = Vec::new();
        while let Some(order) = orders.recv().await {
            let mut order = Some(order);
            let patience = sleep(PATIENCE);
            tokio::pin!(patience);
            let finished = loop {
                match order.take() {
                    Some(Order::Send(span)) => batch.push(*span),
                    Some(Order::Finish(done)) => break Some(done),
                    None => break None,
                }
                if batch.len() >= BATCH {
                    break None;
                }
                tokio::select! {
                    next = orders.recv() => order = next,
                    () = &mut patience => {}
                }
            };
            if !batch.is_empty() {
                self.send(std::mem::take(&mut batch)).await;
            }
            if let Some(done) = finished {
                // Nobody waits any more when the time was up.
                let _late = done.send(());
            }
        }
    }

    async fn send(&mut self, batch: Vec<Ended>) {
        let count = batch.len() as u64;
        let error = match serde_json::to_vec(&Request::of(&self.resource, &batch)) {
            Ok(body) => self.try_to_send(body).await.err(),
            Err(error) => Some(error.to_string()),
        };
        match error {
            None => {
                self.sent.inc_by(count);
                if std::mem::replace(&mut self.away, false) {
                    tracing::info!(collector = self.place, "the collector takes spans again");
                }
            }
            Some(error) => {
                self.dropped.inc_by(count);
                if !std::mem::replace(&mut self.away, true) {
                    tracing::warn!(collector = self.place, error, "the collector takes no spans; they are dropped");
                }
            }
        }
    }

    async fn try_to_send(&self, body: Vec<u8>) -> Result<(), String> {
        let mut wait = WAIT;
        for n in 1.. {
            let request = self.client.post(self.settings.url.clone()).headers(self.settings.headers.clone());
            let answer = request.header(CONTENT_TYPE, "application/json").body(body.clone()).send().await;
            let (error, again) = match answer {
                Ok(answer) if answer.status().is_success() => return Ok(()),
                Ok(answer) => (answer.status().to_string(), is_for_later(answer.status())),
                Err(error) => (crate::destination::causes(&error.without_url()), true),
            };
            if !again || n >= TRIES {
                return Err(error);
            }
            sleep(wait).await;
            wait *= 2;
        }
        Ok(())
    }
}

/// Source: OTLP 1.3, section "Retryable Response Codes".
fn is_for_later(status: StatusCode) -> bool {
    matches!(status.as_u16(), 429 | 502 | 503 | 504)
}

/// The JSON of `ExportTraceServiceRequest`.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Request<'a> {
    resource_spans: [ResourceSpans<'a>; 1],
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ResourceSpans<'a> {
    resource: Resource<'a>,
    scope_spans: [ScopeSpans<'a>; 1],
}

#[derive(Serialize)]
struct Resource<'a> {
    attributes: &'a [Attribute],
}

#[derive(Serialize)]
struct ScopeSpans<'a> {
    scope: Scope,
    spans: Vec<Sent<'a>>,
}

#[derive(Serialize)]
struct Scope {
    name: &'static str,
    version: &'static str,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Sent<'a> {
    trace_id: String,
    span_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    parent_span_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    trace_state: Option<&'a str>,
    name: &'a str,
    kind: u8,
    start_time_unix_nano: String,
    end_time_unix_nano: String,
    attributes: &'a [Attribute],
    status: Status<'a>,
}

#[derive(Serialize)]
struct Status<'a> {
    #[serde(skip_serializing_if = "is_zero")]
    code: u8,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<&'a str>,
}

fn is_zero(code: &u8) -> bool {
    *code == 0
}

/// Its context goes along with the message.
const PRODUCER: u8 = 4;
const ERROR: u8 = 2;

impl<'a> Request<'a> {
    fn of(resource: &'a [Attribute], batch: &'a [Ended]) -> Self {
        let scope = Scope { name: "pg_outbox", version: env!("CARGO_PKG_VERSION") };
        let spans = batch.iter().map(Sent::of).collect();
        let scope_spans = [ScopeSpans { scope, spans }];
        Request { resource_spans: [ResourceSpans { resource: Resource { attributes: resource }, scope_spans }] }
    }
}

impl<'a> Sent<'a> {
    fn of(ended: &'a Ended) -> Self {
        Sent {
            trace_id: hex(&ended.span.trace_id),
            span_id: hex(&ended.span.span_id),
            parent_span_id: ended.span.parent.as_ref().map(|parent| hex(&parent.span_id)),
            trace_state: ended.trace_state.as_deref(),
            name: &ended.name,
            kind: PRODUCER,
            start_time_unix_nano: nanos(ended.span.began),
            end_time_unix_nano: nanos(ended.ended),
            attributes: &ended.attributes,
            status: Status { code: if ended.error.is_some() { ERROR } else { 0 }, message: ended.error.as_deref() },
        }
    }
}

fn nanos(at: SystemTime) -> String {
    at.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos().to_string()
}

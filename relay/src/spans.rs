//! Spans of OpenTelemetry: one for each attempt to deliver, below the trace context of its event, sent by OTLP over HTTP when
//! the environment names a collector. Without one an attempt costs one look at a variable.
//!
//! Attributes are those of the semantic conventions of messaging, version 1.27 and later.

mod attribute;
mod context;
mod export;
mod settings;

use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use ring::rand::{SecureRandom, SystemRandom};

pub use self::attribute::{Attribute, text};
use self::context::Parent;
use self::export::Exporter;
pub use self::settings::Settings;
use crate::destination::{Event, Outcome};
use crate::metrics::Metrics;

static EXPORTER: OnceLock<Exporter> = OnceLock::new();

/// From now on spans are sent. On a thread of the runtime, once.
pub fn start(settings: Settings, consumer: &str, metrics: &Metrics) -> Result<(), String> {
    let exporter = Exporter::start(settings, consumer, metrics)?;
    EXPORTER.set(exporter).map_err(|_| "spans are sent already".to_owned())
}

/// Sends what is left, for so long at most.
pub async fn finish(limit: Duration) {
    if let Some(exporter) = EXPORTER.get() {
        exporter.finish(limit).await;
    }
}

/// One attempt under way.
pub struct Span {
    exporter: &'static Exporter,
    trace_id: [u8; 16],
    span_id: [u8; 8],
    parent: Option<Parent>,
    began: SystemTime,
}

/// What is sent of a span.
pub struct Ended {
    pub span: Span,
    pub name: String,
    pub ended: SystemTime,
    pub attributes: Vec<Attribute>,
    pub trace_state: Option<String>,
    pub error: Option<String>,
}

/// None if nobody collects spans, or this trace is not sampled.
pub fn begin(event: &Event) -> Option<Span> {
    let exporter = EXPORTER.get()?;
    let parent = event.metadata.string("traceparent").and_then(|text| Parent::parse(&text));
    if parent.as_ref().is_some_and(|parent| !parent.sampled) {
        return None;
    }
    let mut random = [0; 24];
    SystemRandom::new().fill(&mut random).ok()?;
    let (mut trace_id, mut span_id) = ([0; 16], [0; 8]);
    trace_id.copy_from_slice(&random[..16]);
    span_id.copy_from_slice(&random[16..]);
    match &parent {
        Some(parent) => trace_id = parent.trace_id,
        None if !exporter.samples(&trace_id) => return None,
        None => {}
    }
    Some(Span { exporter, trace_id, span_id, parent, began: SystemTime::now() })
}

impl Span {
    /// What the receiver gets: its spans hang below this one.
    pub fn traceparent(&self) -> String {
        format!("00-{}-{}-01", context::hex(&self.trace_id), context::hex(&self.span_id))
    }

    pub fn end(self, destination: &Arc<str>, event: &Event, attempt: u32, of_kind: Vec<Attribute>, outcome: &Outcome) {
        let mut attributes = vec![
            text("messaging.operation.name", "publish"),
            text("messaging.operation.type", "send"),
            text("messaging.destination.name", &**destination),
            text("messaging.message.id", event.event_id.to_string()),
            Attribute::number("messaging.message.body.size", event.event_data.len()),
            text("outbox.event.type", event.event_type.as_str()),
            Attribute::number("outbox.attempt", attempt as usize),
        ];
        if let Some(id) = event.metadata.string("correlation_id") {
            attributes.push(text("messaging.message.conversation_id", &*id));
        }
        attributes.extend(of_kind);
        if *outcome != Outcome::Delivered {
            attributes.push(text("error.type", outcome.name()));
        }
        let exporter = self.exporter;
        exporter.take(Ended {
            name: format!("publish {destination}"),
            ended: SystemTime::now(),
            attributes,
            trace_state: self.parent.as_ref().and(event.metadata.string("tracestate")).map(Into::into),
            error: outcome.error().map(str::to_owned),
            span: self,
        });
    }
}

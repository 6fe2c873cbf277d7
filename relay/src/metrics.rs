//! What the relay counts, in Prometheus' text format. The gauges of the database are read when somebody asks, never between
//! (`figures`).
//!
//! A destination has counters of its own from its first delivery until it is removed, as long as few have; what the others do
//! is summed as `destination="other"`.

mod figures;

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus::{
    Encoder, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};

use crate::destination::Outcome;
use crate::store::Figures;

#[derive(Clone)]
pub struct Metrics {
    registry: Registry,
    processed: IntCounter,
    duration: Histogram,
    deliveries: IntCounterVec,
    attempts: HistogramVec,
    in_flight: IntGaugeVec,
    unable: IntGaugeVec,
    named: Arc<Mutex<Named>>,
    pub held: IntGauge,
    pub claims: IntCounter,
    pub claimed: IntCounter,
    pub settlements: IntCounter,
    pub released: IntCounter,
    pub notifications: IntCounter,
    pub connected: IntGauge,
    pub reconnects: IntCounter,
    pub spans_sent: IntCounter,
    pub spans_dropped: IntCounter,
}

/// The destinations with series of their own.
struct Named {
    names: HashSet<String>,
    most: usize,
}

impl Named {
    /// The label of a destination, which has its own from now on if there is room for one more.
    fn label<'a>(&mut self, destination: &'a str) -> &'a str {
        if self.names.contains(destination) {
            return destination;
        }
        if self.names.len() >= self.most {
            return OTHER;
        }
        self.names.insert(destination.to_owned());
        destination
    }
}

/// All destinations without series of their own.
const OTHER: &str = "other";

const OUTCOMES: [&str; 7] = ["delivered", "failed", "rejected", "unavailable", "throttled", "gone", "unable"];

const BUCKETS: [f64; 18] =
    [0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0, 600.0];

/// Of one attempt: a destination gives up after its own timeout.
const BUCKETS_OF_ATTEMPTS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

impl Metrics {
    /// At most so many destinations are named.
    pub fn new(most_named: usize) -> prometheus::Result<Self> {
        let registry = Registry::new();
        let r = &registry;
        #[cfg(target_os = "linux")]
        r.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
        let build = Opts::new("outbox_relay_build_info", "Version of the relay; always 1.")
            .const_label("version", env!("CARGO_PKG_VERSION"));
        add(r, IntGauge::with_opts(build)?)?.set(1);
        let duration = HistogramOpts::new(
            "outbox_events_processing_duration_seconds",
            "Time from an event's creation, or the moment it was scheduled for, to its settlement.",
        )
        .buckets(BUCKETS.to_vec());
        let attempts = HistogramOpts::new(
            "outbox_delivery_duration_seconds",
            "Time that an attempt to deliver took, however it ended.",
        )
        .buckets(BUCKETS_OF_ATTEMPTS.to_vec());
        Ok(Metrics {
            processed: counter(
                r,
                "outbox_events_processed_total",
                "Events that became processed when this relay settled them.",
            )?,
            duration: add(r, Histogram::with_opts(duration)?)?,
            deliveries: add(
                r,
                IntCounterVec::new(
                    Opts::new("outbox_deliveries_total", "Attempts to deliver, by destination and outcome."),
                    &["destination", "outcome"],
                )?,
            )?,
            attempts: add(r, HistogramVec::new(attempts, &["destination"])?)?,
            in_flight: add(
                r,
                IntGaugeVec::new(
                    Opts::new("outbox_deliveries_in_flight", "Attempts under way, by destination."),
                    &["destination"],
                )?,
            )?,
            unable: add(
                r,
                IntGaugeVec::new(
                    Opts::new(
                        "outbox_relay_unable",
                        "1 while this relay can't deliver to the destination, by destination; of the others, how many.",
                    ),
                    &["destination"],
                )?,
            )?,
            named: Arc::new(Mutex::new(Named { names: HashSet::new(), most: most_named })),
            held: gauge(r, "outbox_relay_events_held", "Events claimed by this relay and not settled yet.")?,
            claims: counter(r, "outbox_relay_claims_total", "Calls of outbox.claim.")?,
            claimed: counter(r, "outbox_relay_events_claimed_total", "Events claimed.")?,
            settlements: counter(r, "outbox_relay_settlements_total", "Calls of outbox.settle.")?,
            released: counter(
                r,
                "outbox_relay_deliveries_released_total",
                "Deliveries given back untried or uncounted.",
            )?,
            notifications: counter(r, "outbox_relay_notifications_total", "Notifications received.")?,
            connected: gauge(r, "outbox_relay_connected", "1 while the relay listens and is attached.")?,
            spans_sent: counter(r, "outbox_relay_spans_sent_total", "Spans that the collector has taken.")?,
            spans_dropped: counter(
                r,
                "outbox_relay_spans_dropped_total",
                "Spans that the collector did not take, or that there was no room for.",
            )?,
            reconnects: counter(r, "outbox_relay_reconnects_total", "Sessions with PostgreSQL that were lost.")?,
            registry,
        })
    }

    /// The counters of one destination.
    pub fn lane(&self, destination: &str) -> LaneMetrics {
        let label = self.named().label(destination);
        let [delivered, failed, rejected, unavailable, throttled, gone, unable] =
            OUTCOMES.map(|outcome| self.deliveries.with_label_values(&[label, outcome]));
        LaneMetrics {
            in_flight: self.in_flight.with_label_values(&[label]),
            duration: self.attempts.with_label_values(&[label]),
            delivered,
            failed,
            rejected,
            unavailable,
            throttled,
            gone,
            unable,
        }
    }

    /// This relay can't deliver to the destination until what this returns is dropped.
    pub fn unable(&self, destination: &str) -> Unable {
        let label = self.named().label(destination);
        let gauge = self.unable.with_label_values(&[label]);
        gauge.inc();
        Unable(gauge)
    }

    /// The destination was removed, and its series go.
    pub fn forget(&self, destination: &str) {
        if self.named().names.remove(destination) {
            self.remove_series(destination);
        }
    }

    /// All but these destinations were removed.
    pub fn retain(&self, is_there: impl Fn(&str) -> bool) {
        let mut gone = Vec::new();
        self.named().names.retain(|name| {
            let there = is_there(name);
            if !there {
                gone.push(name.clone());
            }
            there
        });
        gone.iter().for_each(|name| self.remove_series(name));
    }

    fn remove_series(&self, label: &str) {
        // An error says that there was no such series.
        for outcome in OUTCOMES {
            let _none = self.deliveries.remove_label_values(&[label, outcome]);
        }
        let _none = self.attempts.remove_label_values(&[label]);
        let _none = self.in_flight.remove_label_values(&[label]);
        let _none = self.unable.remove_label_values(&[label]);
    }

    fn named(&self) -> std::sync::MutexGuard<'_, Named> {
        self.named.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Events have become processed, so many seconds after each could be delivered.
    pub fn processed(&self, latencies: &[f64]) {
        self.processed.inc_by(latencies.len() as u64);
        latencies.iter().for_each(|seconds| self.duration.observe(*seconds));
    }

    /// The destinations with counters of their own, and how many may have names.
    pub fn named_destinations(&self) -> (Vec<String>, usize) {
        let named = self.named();
        (named.names.iter().cloned().collect(), named.most)
    }

    /// All metrics as text; without the database's gauges when it can't be asked.
    pub fn render(&self, figures: Option<&Figures>) -> prometheus::Result<String> {
        let mut families = self.registry.gather();
        if let Some(figures) = figures {
            families.extend(figures::families(figures)?);
        }
        let mut text = Vec::new();
        TextEncoder::new().encode(&families, &mut text)?;
        String::from_utf8(text).map_err(|error| prometheus::Error::Msg(error.to_string()))
    }
}

/// The counters of one destination, found once.
#[derive(Clone)]
pub struct LaneMetrics {
    pub in_flight: IntGauge,
    pub duration: Histogram,
    delivered: IntCounter,
    failed: IntCounter,
    rejected: IntCounter,
    unavailable: IntCounter,
    throttled: IntCounter,
    gone: IntCounter,
    unable: IntCounter,
}

/// Counts a destination to which this relay can't deliver, until it is dropped.
pub struct Unable(IntGauge);

impl Drop for Unable {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl LaneMetrics {
    pub fn count(&self, outcome: &Outcome) {
        match outcome {
            Outcome::Delivered => &self.delivered,
            Outcome::Failed { .. } => &self.failed,
            Outcome::Rejected { .. } => &self.rejected,
            Outcome::Unavailable { .. } => &self.unavailable,
            Outcome::Throttled { .. } => &self.throttled,
            Outcome::Gone { .. } => &self.gone,
            Outcome::Unable { .. } => &self.unable,
        }
        .inc();
    }
}

fn add<C: prometheus::core::Collector + Clone + 'static>(registry: &Registry, metric: C) -> prometheus::Result<C> {
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

fn counter(registry: &Registry, name: &str, help: &str) -> prometheus::Result<IntCounter> {
    add(registry, IntCounter::new(name, help)?)
}

fn gauge(registry: &Registry, name: &str, help: &str) -> prometheus::Result<IntGauge> {
    add(registry, IntGauge::new(name, help)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_of_the_contract_are_there() {
        let metrics = Metrics::new(100).unwrap();
        metrics.processed(&[0.004]);
        metrics.lane("crm").count(&Outcome::Delivered);
        let text = metrics.render(Some(&Figures { pending: 7, ..Figures::default() })).unwrap();
        for line in [
            "outbox_events_processed_total 1",
            "outbox_events_processing_duration_seconds_bucket{le=\"0.003\"} 0",
            "outbox_events_processing_duration_seconds_bucket{le=\"1\"} 1",
            "outbox_events_pending 7",
            "outbox_delivery_duration_seconds_count{destination=\"crm\"} 0",
            "outbox_deliveries_total{destination=\"crm\",outcome=\"delivered\"} 1",
        ] {
            assert!(text.lines().any(|l| l == line), "no line {line:?} in\n{text}");
        }
    }

    #[test]
    fn a_database_that_does_not_answer_shows_no_stale_figures() {
        let metrics = Metrics::new(100).unwrap();
        metrics.render(Some(&Figures { pending: 7, ..Figures::default() })).unwrap();
        let text = metrics.render(None).unwrap();
        assert!(!text.contains("outbox_events_pending"));
        assert!(text.contains("outbox_events_processed_total 0"));
        #[cfg(target_os = "linux")]
        assert!(text.contains("\nprocess_resident_memory_bytes "), "{text}");
    }

    #[test]
    fn few_destinations_are_named_and_the_others_summed() {
        let metrics = Metrics::new(2).unwrap();
        for name in ["a", "b", "c", "d", "a"] {
            metrics.lane(name).count(&Outcome::Delivered);
        }
        let (_first, second) = (metrics.unable("c"), metrics.unable("d"));
        let value = |line: &str| {
            let text = metrics.render(None).unwrap();
            text.lines().find_map(|l| l.strip_prefix(line)?.trim().parse::<i64>().ok())
        };
        let delivered =
            |label: &str| format!("outbox_deliveries_total{{destination=\"{label}\",outcome=\"delivered\"}}");
        assert_eq!(
            (value(&delivered("a")), value(&delivered("b")), value(&delivered("other"))),
            (Some(2), Some(1), Some(2))
        );
        assert_eq!((value(&delivered("c")), value("outbox_relay_unable{destination=\"other\"}")), (None, Some(2)));
        drop(second);
        assert_eq!(value("outbox_relay_unable{destination=\"other\"}"), Some(1));
        metrics.retain(|name| name != "a");
        metrics.lane("d");
        assert_eq!((value(&delivered("a")), value(&delivered("d"))), (None, Some(0)), "there is room for another");
        metrics.forget("other");
        assert_eq!(value(&delivered("other")), Some(2));
    }
}

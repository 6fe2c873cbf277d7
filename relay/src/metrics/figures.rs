//! The database's gauges: made anew for each scrape, so that what was removed is gone.

use prometheus::core::Collector;
use prometheus::proto::MetricFamily;
use prometheus::{Gauge, GaugeVec, Opts};

use super::OTHER;
use crate::store::Figures;

/// As `outbox.destinations` names them.
const STATES: [&str; 5] = ["active", "paused", "disabled", "open", "half-open"];

pub fn families(figures: &Figures) -> prometheus::Result<Vec<MetricFamily>> {
    let Figures { pending, processing, failed, oldest_pending_s, deliverable_s, vacuum, destinations: _ } = figures;
    let mut families = Vec::new();
    let mut gauge = |name: &str, help: &str, value: f64| {
        let gauge = Gauge::new(name, help)?;
        gauge.set(value);
        families.extend(gauge.collect());
        Ok::<_, prometheus::Error>(())
    };
    gauge("outbox_events_pending", "Events owed to at least one destination.", *pending as f64)?;
    gauge("outbox_events_processing", "Events claimed by any consumer.", *processing as f64)?;
    gauge("outbox_events_failed", "Events that were given up: dead letters.", *failed as f64)?;
    gauge(
        "outbox_events_oldest_pending_seconds",
        "Age of the oldest event that waits and is not scheduled for later.",
        oldest_pending_s.unwrap_or(0.0),
    )?;
    gauge(
        "outbox_events_oldest_deliverable_seconds",
        "How long the first delivery that nothing holds back has waited: no schedule, pause or open circuit.",
        deliverable_s.unwrap_or(0.0),
    )?;
    gauge(
        "outbox_vacuum_held_back",
        "1 while a transaction older than 5 minutes, or a slot or standby, keeps dead rows from being removed.",
        f64::from(u8::from(vacuum.held_back)),
    )?;
    gauge(
        "outbox_vacuum_oldest_transaction_seconds",
        "Age of the oldest transaction that keeps dead rows from being removed.",
        vacuum.transaction_s.unwrap_or(0.0),
    )?;
    families.extend(of_destinations(figures)?);
    Ok(families)
}

fn of_destinations(figures: &Figures) -> prometheus::Result<Vec<MetricFamily>> {
    let family = |name: &str, help: &str, labels: &[&str]| GaugeVec::new(Opts::new(name, help), labels);
    let by = &["destination"];
    let waiting = family("outbox_destination_waiting", "Deliveries that a destination is owed.", by)?;
    let dead = family("outbox_destination_dead", "Dead letters of a destination.", by)?;
    let oldest = family(
        "outbox_destination_oldest_seconds",
        "How long the oldest delivery that a destination is owed has been owed.",
        by,
    )?;
    let states = family(
        "outbox_destination_state",
        "1 for the state that a destination is in, 0 for the others; of the others, how many are.",
        &["destination", "state"],
    )?;
    for one in &figures.destinations {
        let label = one.name.as_deref().unwrap_or(OTHER);
        waiting.with_label_values(&[label]).add(one.waiting as f64);
        dead.with_label_values(&[label]).add(one.dead as f64);
        let gauge = oldest.with_label_values(&[label]);
        gauge.set(gauge.get().max(one.oldest_s.unwrap_or(0.0)));
        STATES.iter().for_each(|state| states.with_label_values(&[label, state]).add(0.0));
        states.with_label_values(&[label, &one.state]).add(one.destinations as f64);
    }
    Ok([waiting, dead, oldest, states]
        .iter()
        .flat_map(Collector::collect)
        .filter(|f| !f.get_metric().is_empty())
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;
    use crate::store::OfDestination;

    fn of(name: Option<&str>, state: &str, waiting: i64, oldest: f64) -> OfDestination {
        let (name, state) = (name.map(str::to_owned), state.to_owned());
        OfDestination { name, state, destinations: 1, waiting, dead: 1, oldest_s: Some(oldest) }
    }

    #[test]
    fn the_figures_of_destinations_are_there_and_the_others_are_summed() {
        let destinations =
            vec![of(Some("crm"), "half-open", 3, 1.5), of(None, "active", 4, 2.5), of(None, "open", 5, 0.5)];
        let figures = Figures { destinations, ..Figures::default() };
        let text = Metrics::new(1).unwrap().render(Some(&figures)).unwrap();
        for line in [
            "outbox_destination_waiting{destination=\"crm\"} 3",
            "outbox_destination_waiting{destination=\"other\"} 9",
            "outbox_destination_dead{destination=\"other\"} 2",
            "outbox_destination_oldest_seconds{destination=\"other\"} 2.5",
            "outbox_destination_state{destination=\"crm\",state=\"half-open\"} 1",
            "outbox_destination_state{destination=\"crm\",state=\"active\"} 0",
            "outbox_destination_state{destination=\"other\",state=\"open\"} 1",
        ] {
            assert!(text.lines().any(|l| l == line), "no line {line:?} in\n{text}");
        }
    }
}

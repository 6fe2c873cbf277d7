//! `status`: the counts, the latency, and each destination with its state and what it is owed.

use serde_json::{Value, json};

use super::session::{Session, Work};
use super::table::{Column, Table, clean, left, right};
use super::{Outcome, answer, cell, text, time};
use crate::cli::Output;
use crate::error::Result;
use crate::postgres::Connector;

const STATS: &str = "SELECT jsonb_build_object( \
        'database', current_database(), 'pending', s.pending, 'processing', s.processing, 'processed', s.processed, \
        'failed', s.failed, 'oldest_pending_seconds', extract(epoch FROM s.oldest_pending)::float8, \
        'latency_p50_seconds', extract(epoch FROM s.latency_p50)::float8, \
        'latency_p95_seconds', extract(epoch FROM s.latency_p95)::float8, \
        'latency_p99_seconds', extract(epoch FROM s.latency_p99)::float8, \
        'worker_state', s.worker_state)::text FROM outbox.stats() s";

const RELAYS: &str = "SELECT h.detail FROM outbox.health() h WHERE h.check_name = 'consumers'";

/// A destination's state beside what is listed for it. An event that no claim has looked at yet is listed nowhere.
pub const DESTINATIONS: &str = "SELECT jsonb_build_object( \
        'name', d.name, 'kind', d.kind, 'state', d.state, 'waiting', coalesce(o.waiting, 0), 'dead', coalesce(o.dead, 0), \
        'event_types', d.event_types, 'tenant_id', d.tenant_id, 'target', coalesce(d.url, d.exchange), \
        'open_until', CASE WHEN d.state = 'open' THEN d.circuit_open_until END, \
        'open_for_seconds', CASE WHEN d.state = 'open' \
             THEN greatest(0, extract(epoch FROM d.circuit_open_until - clock_timestamp()))::float8 END, \
        'last_error', d.last_error)::text \
    FROM outbox.destinations d \
    LEFT JOIN (SELECT x.destination, count(*) FILTER (WHERE x.status <> 'failed') AS waiting, \
                      count(*) FILTER (WHERE x.status = 'failed') AS dead \
                 FROM outbox.deliveries x WHERE x.destination IS NOT NULL GROUP BY x.destination) o \
      ON o.destination = d.name \
   ORDER BY d.name";

const COLUMNS: [Column; 6] =
    [left("DESTINATION"), left("KIND"), left("STATE"), right("WAITING"), right("DEAD"), left("LAST ERROR")];

pub async fn status(connector: &Connector, output: &Output) -> Result<Outcome> {
    let session = Session::open(connector, "status", Work::Looks).await?;
    let mut status = session.row(STATS, &[]).await?;
    let attached: String = session.value(RELAYS, &[]).await?;
    let destinations = session.rows(DESTINATIONS, &[]).await?;
    session.commit().await?;
    status["relays"] = Value::Array(relays(&attached));
    status["destinations"] = Value::Array(destinations);
    answer(output, &status, || shown(&status, &connector.target()))?;
    Ok(Outcome::Well)
}

fn shown(status: &Value, target: &str) -> String {
    let seconds = |key: &str| status[key].as_f64().map(time::shown);
    let oldest = seconds("oldest_pending_seconds").map(|age| format!(" (oldest {age})")).unwrap_or_default();
    let head = [
        target.to_owned(),
        format!("pending {}{oldest}", cell(status, "pending")),
        format!("processing {}", cell(status, "processing")),
        format!("dead {}", cell(status, "failed")),
        format!("p99 {}", seconds("latency_p99_seconds").unwrap_or("-".into())),
        format!("relays {}", list(status, "relays").len()),
    ];
    let relay = |relay: &Value| format!("relay {} (pid {})\n", clean(text(relay, "name")), cell(relay, "pid"));
    let relays: String = list(status, "relays").iter().map(relay).collect();
    let destinations = list(status, "destinations");
    let mut table = Table::new(&COLUMNS);
    for destination in destinations {
        table.add(vec![
            cell(destination, "name"),
            cell(destination, "kind"),
            state(destination),
            cell(destination, "waiting"),
            cell(destination, "dead"),
            text(destination, "last_error").to_owned(),
        ]);
    }
    let rest = match destinations.is_empty() {
        true => "no destination yet, so events wait\n".to_owned(),
        false => table.to_string(),
    };
    format!("{}\n{rest}{relays}", head.join("   "))
}

fn list<'a>(status: &'a Value, key: &str) -> &'a [Value] {
    status[key].as_array().map(Vec::as_slice).unwrap_or_default()
}

/// The attached consumers, of what the health check says: `NAME (pid N), NAME (pid N)`.
fn relays(attached: &str) -> Vec<Value> {
    let mut relays = Vec::new();
    let mut rest = attached;
    while let Some((name, after)) = rest.split_once(" (pid ")
        && let Some((pid, after)) = after.split_once(')')
    {
        relays.push(json!({"name": name, "pid": pid.parse::<i64>().ok()}));
        rest = after.strip_prefix(", ").unwrap_or(after);
    }
    relays
}

/// `open, 12 s left`.
pub fn state(destination: &Value) -> String {
    match destination["open_for_seconds"].as_f64() {
        Some(left) => format!("{}, {} left", text(destination, "state"), time::shown(left)),
        None => text(destination, "state").to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_a_line_and_a_table() {
        let status = serde_json::json!({
            "pending": 12, "processing": 0, "failed": 3, "oldest_pending_seconds": 0.4, "latency_p99_seconds": 0.038,
            "relays": relays("h:1 (pid 7), my relay (pid 8)"), "destinations": [
                {"name": "crm", "kind": "webhook", "state": "open", "waiting": 12, "dead": 3, "open_for_seconds": 12.0,
                 "last_error": "can't connect"},
                {"name": "orders", "kind": "rabbitmq", "state": "active", "waiting": 0, "dead": 0, "last_error": null}]});
        let lines = "db1/app   pending 12 (oldest 400 ms)   processing 0   dead 3   p99 38 ms   relays 2\n\
                     DESTINATION  KIND      STATE            WAITING  DEAD  LAST ERROR\n\
                     crm          webhook   open, 12 s left       12     3  can't connect\n\
                     orders       rabbitmq  active                 0     0\n\
                     relay h:1 (pid 7)\nrelay my relay (pid 8)\n";
        assert_eq!(shown(&status, "db1/app"), lines);
        assert!(relays("none attached").is_empty());
    }
}

//! `tail`: events as the worker announces them, a line each. It only listens, which any role that may connect can do, and
//! reads no event. What was announced while the connection was lost is not shown.

use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;
use tokio::sync::mpsc::unbounded_channel;
use tokio_postgres::Notification;

use super::{Outcome, note, print, table, text};
use crate::backoff::Backoff;
use crate::cli::Tail;
use crate::error::{Error, Result};
use crate::pattern::matches;
use crate::postgres::Connector;
use crate::shutdown::Shutdown;
use crate::store;
use crate::systemd::Systemd;

pub async fn tail(connector: &Connector, given: &Tail) -> Result<Outcome> {
    let shutdown = Shutdown::on_signals(Systemd::default())
        .map_err(|error| Error::Server(format!("can't handle signals: {error}")))?;
    tokio::select! {
        ended = listen_again(connector, given) => ended.map(|()| Outcome::Well),
        () = shutdown.requested() => Ok(Outcome::Well),
    }
}

/// Until nobody reads. Only the first connection may fail: after that, whoever watches wants to go on.
async fn listen_again(connector: &Connector, given: &Tail) -> Result<()> {
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(3))
        .ok_or_else(|| Error::Configuration("reconnection schedule".into()))?;
    let mut has_listened = false;
    loop {
        let before = has_listened;
        match listen(connector, given, &mut has_listened).await {
            Ok(()) => return Ok(()),
            Err(error) if !has_listened => return Err(error),
            Err(error) => {
                if !before {
                    backoff.reset();
                }
                note(&format!("{error}; events meanwhile are not shown"));
                tokio::time::sleep(backoff.next()).await;
            }
        }
    }
}

/// `Ok`: nobody reads any more.
async fn listen(connector: &Connector, given: &Tail, has_listened: &mut bool) -> Result<()> {
    let (notified, mut notifications) = unbounded_channel();
    let mut connected = connector.connect(Some(notified)).await?;
    // Whoever listens hears what anybody sends: no conversion may fail.
    let encoding = if connected.utf8 { "UTF8" } else { "SQL_ASCII" };
    let set = format!(
        "SET search_path = pg_catalog, pg_temp; SET application_name = 'outbox-relay tail'; \
                       SET client_encoding = '{encoding}'; SET idle_session_timeout = 0"
    );
    connected.client.batch_execute(&set).await?;
    store::fitting_version(&connected.client).await?;
    connected.client.batch_execute("LISTEN outbox_events").await?;
    *has_listened = true;
    note(&format!("listening on {}", connector.target()));
    loop {
        tokio::select! {
            heard = notifications.recv() => match heard {
                Some(notification) if !show(&notification, given)? => return Ok(()),
                Some(_) => {}
                None => return lost(connected.driver.ended().await),
            },
            ended = connected.driver.ended() => return lost(ended),
        }
    }
}

fn lost(ended: Result<()>) -> Result<()> {
    ended.and(Err(Error::Server("the connection was closed".into())))
}

#[derive(Deserialize)]
struct Payload {
    #[serde(default)]
    events: Vec<Value>,
    #[serde(default)]
    reason: Option<String>,
}

/// Whether anybody still reads. What is no announcement of the worker's is passed over.
fn show(notification: &Notification, given: &Tail) -> Result<bool> {
    let Ok(payload) = serde_json::from_str::<Payload>(notification.payload()) else { return Ok(true) };
    if payload.reason.as_deref() == Some("overflow") {
        note("there were more events than a notification can name: some are not shown");
    }
    let shown = payload.events.iter().filter(|event| wanted(event, given.event_type.as_deref()));
    let lines: String = shown.map(|event| line(event, given.output.json)).collect();
    if lines.is_empty() { Ok(true) } else { print(&lines) }
}

/// An event whose type is not announced (`outbox.notify_payload = 'id'`) may be of any.
fn wanted(event: &Value, pattern: Option<&str>) -> bool {
    match (event["event_type"].as_str(), pattern) {
        (Some(event_type), Some(pattern)) => matches(pattern.as_bytes(), event_type.as_bytes()),
        _ => true,
    }
}

/// `2026-11-23T21:43:44.113Z  contact.created v1  contact/42  019…`, or the event as it was announced.
fn line(event: &Value, json: bool) -> String {
    if json {
        return format!("{event}\n");
    }
    let mut parts = vec![moment(text(event, "created_at"))];
    parts.push(format!("{} {}", text(event, "event_type"), text(event, "event_version")).trim().to_owned());
    if let Some(id) = event["aggregate_id"].as_str() {
        parts.push(format!("{}/{id}", text(event, "aggregate_type")));
    }
    parts.extend(event["tenant_id"].as_str().map(|tenant| format!("tenant {tenant}")));
    parts.push(text(event, "event_id").to_owned());
    parts.retain(|part| !part.is_empty());
    table::clean(&parts.join("  ")) + "\n"
}

/// To the millisecond.
fn moment(created_at: &str) -> String {
    let cut = created_at.find('.').and_then(|dot| Some(created_at.get(..dot + 4)?.to_owned() + "Z"));
    cut.unwrap_or(created_at.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_a_line() {
        let event = serde_json::json!({"id": 17, "event_id": "019a", "event_type": "contact.created", "event_version": "v1",
            "aggregate_type": "contact", "aggregate_id": "42", "tenant_id": "acme",
            "created_at": "2026-11-23T21:43:44.113021Z"});
        assert_eq!(
            line(&event, false),
            "2026-11-23T21:43:44.113Z  contact.created v1  contact/42  tenant acme  019a\n"
        );
        assert_eq!(line(&serde_json::json!({"id": 17, "event_id": "019a"}), false), "019a\n");
        assert_eq!(line(&serde_json::json!({"event_type": "a\u{1b}[2J\nb", "event_id": "1"}), false), "a [2J b  1\n");
    }
}

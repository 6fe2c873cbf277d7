//! `event`, `replay` and `backfill`: single events, and those that a destination would have had.

use serde_json::{Value, json};
use uuid::Uuid;

use super::session::{Session, Work, parse};
use super::table::{Column, Table, clean, left, right};
use super::{Outcome, answer, cell, dead, note, print, text};
use crate::cli::{Backfill, Output};
use crate::error::Result;
use crate::postgres::Connector;

const BACKFILL: &str = "SELECT outbox.backfill(destination => $1::text, event_types => coalesce($2::text, '*'), \
     since => $3::timestamptz, until => $4::timestamptz, max_events => $5::int, dry_run => $6::bool)";

/// What an event holds stays text, as PostgreSQL prints it: a number may have more digits than a program's float.
const EVENT: &str = "SELECT jsonb_pretty(e), (e - '{event_data,metadata,destinations}'::text[])::text, \
            (e -> 'destinations')::text, (e -> 'metadata')::text, jsonb_pretty(e -> 'event_data') \
       FROM outbox.event($1) AS e WHERE e IS NOT NULL";

const COLUMNS: [Column; 5] =
    [left("DESTINATION"), left("STATUS"), right("ATTEMPTS"), left("NEXT ATTEMPT"), left("LAST ERROR")];

pub async fn show(connector: &Connector, event_id: Uuid, output: &Output) -> Result<Outcome> {
    let session = Session::open(connector, "event", Work::Inspects).await?;
    let found = session.first(EVENT, &[&event_id]).await?;
    session.commit().await?;
    let Some(row) = found else {
        note(&format!("there is no event {event_id}"));
        return Ok(Outcome::NothingMatched);
    };
    let whole: String = row.try_get(0)?;
    if output.json {
        print(&(whole + "\n"))?;
        return Ok(Outcome::Well);
    }
    let (event, destinations) = (parse(row.try_get(1)?)?, parse(row.try_get(2)?)?);
    let (metadata, data): (&str, &str) = (row.try_get(3)?, row.try_get(4)?);
    // A payload has lines of its own.
    let data: String = data.chars().map(|c| if c.is_control() && c != '\n' { ' ' } else { c }).collect();
    print(&format!("{}\n{}\nmetadata  {}\n\n{data}\n", head(&event), fates(&destinations), clean(metadata)))?;
    Ok(Outcome::Well)
}

/// The event's columns, a line each.
fn head(event: &Value) -> String {
    let mut lines = vec![
        ("event", format!("{} ({})", cell(event, "event_id"), cell(event, "id"))),
        ("type", format!("{} {}", cell(event, "event_type"), cell(event, "event_version"))),
        ("status", cell(event, "status")),
    ];
    if !event["aggregate_id"].is_null() {
        lines.push(("aggregate", format!("{}/{}", text(event, "aggregate_type"), text(event, "aggregate_id"))));
    }
    let rest = [
        ("tenant", "tenant_id"),
        ("created", "created_at"),
        ("available", "available_at"),
        ("processed", "processed_at"),
    ];
    let given = rest.iter().filter(|(_, key)| !event[*key].is_null());
    lines.extend(given.map(|(name, key)| (*name, cell(event, key))));
    if !event["last_error"].is_null() {
        lines.push(("failed", format!("{} times: {}", cell(event, "retry_count"), cell(event, "last_error"))));
    }
    lines.iter().map(|(name, value)| format!("{name:<9}  {}\n", clean(value))).collect()
}

/// What became of it at each destination.
fn fates(destinations: &Value) -> String {
    let Some(all) = destinations.as_object().filter(|all| !all.is_empty()) else {
        return "owed to no destination\n".into();
    };
    let mut table = Table::new(&COLUMNS);
    for (name, fate) in all {
        // A consumer of the application's own has no name.
        let name = if name.is_empty() { "-" } else { name };
        table.add(vec![
            name.to_owned(),
            cell(fate, "status"),
            cell(fate, "attempts"),
            cell(fate, "next_attempt_at"),
            text(fate, "last_error").to_owned(),
        ]);
    }
    table.to_string()
}

pub async fn replay(connector: &Connector, event_id: Uuid, to: Option<&str>, output: &Output) -> Result<Outcome> {
    let session = Session::open(connector, "replay", Work::Changes).await?;
    let owed: bool = session.value("SELECT outbox.replay($1, $2::text)", &[&event_id, &to]).await?;
    session.commit().await?;
    let json: Value = json!({"event_id": event_id, "destination": to, "replayed": owed});
    answer(output, &json, || match owed {
        true => format!("event {event_id} is owed again\n"),
        false => String::new(),
    })?;
    if !owed {
        note(&format!("event {event_id} is not owed again: it does not exist, or it is still owed"));
    }
    Ok(Outcome::matched_if(owed))
}

pub async fn backfill(connector: &Connector, given: &Backfill) -> Result<Outcome> {
    let session = Session::open(connector, "backfill", Work::Changes).await?;
    let Backfill { name, event_type, created, limit, dry_run, output } = given;
    let found: i64 =
        session.value(BACKFILL, &[name, event_type, &created.since, &created.until, limit, dry_run]).await?;
    session.commit().await?;
    let done = if *dry_run { format!("would be owed to {name}") } else { format!("owed to {name}") };
    dead::counted(output, found, *dry_run, &done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_shown_with_its_fate_at_each_destination() {
        let event = json!({"id": 17, "event_id": "019a", "event_type": "contact.created", "event_version": "v1",
            "status": "pending", "aggregate_type": "contact", "aggregate_id": "42", "tenant_id": null,
            "created_at": "2026", "retry_count": 2, "last_error": "HTTP 503"});
        assert_eq!(
            head(&event),
            "event      019a (17)\ntype       contact.created v1\nstatus     pending\naggregate  contact/42\n\
             created    2026\nfailed     2 times: HTTP 503\n"
        );
        let destinations = json!({"crm": {"status": "delivered", "attempts": null, "last_error": null},
            "search": {"status": "pending", "attempts": 2, "next_attempt_at": "2027", "last_error": "HTTP 503"}});
        assert_eq!(
            fates(&destinations),
            "DESTINATION  STATUS     ATTEMPTS  NEXT ATTEMPT  LAST ERROR\n\
             crm          delivered         -  -\n\
             search       pending           2  2027          HTTP 503\n"
        );
        assert_eq!(fates(&json!({})), "owed to no destination\n");
    }
}

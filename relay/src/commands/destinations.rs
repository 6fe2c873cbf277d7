//! `destinations`: what there is, and one call of the extension for each change.

use serde_json::{Value, json};
use uuid::Uuid;

use super::session::{Session, Work};
use super::status::{DESTINATIONS, state};
use super::table::{Column, Table, clean, left, right};
use super::{Outcome, answer, apply, cell, confirmed, note, text};
use crate::cli::{Destinations, Output};
use crate::error::{Error, Result};
use crate::postgres::Connector;

const SHOW: &str = "SELECT to_jsonb(d)::text FROM outbox.destinations d WHERE d.name = $1";

const COLUMNS: [Column; 8] = [
    left("NAME"),
    left("KIND"),
    left("STATE"),
    right("WAITING"),
    right("DEAD"),
    left("TYPES"),
    left("TARGET"),
    left("LAST ERROR"),
];

pub async fn destinations(connector: &Connector, command: &Destinations) -> Result<Outcome> {
    match command {
        Destinations::List(output) => list(connector, output).await,
        Destinations::Show(named) => show(connector, &named.name, &named.output).await,
        Destinations::Pause(named) => {
            call(connector, &named.name, "SELECT outbox.pause($1)::text", "paused", &named.output).await
        }
        Destinations::Resume(named) => {
            call(connector, &named.name, "SELECT outbox.resume($1)::text", "resumed", &named.output).await
        }
        Destinations::Test(named) => test(connector, &named.name, &named.output).await,
        Destinations::Rotate { named, grace } => {
            rotate(connector, &named.name, grace.as_secs_f64(), &named.output).await
        }
        Destinations::Remove { named, confirm } => {
            let question = format!("Remove {} with all that it is owed?", clean(&named.name));
            match confirmed(confirm.yes, &question)? {
                true => {
                    let call_it = "SELECT outbox.remove_destination($1)::text";
                    call(connector, &named.name, call_it, "removed", &named.output).await
                }
                false => Err(Error::Server("nothing was removed".into())),
            }
        }
        Destinations::Apply(given) => apply::apply(connector, given).await,
        Destinations::Export(output) => apply::export(connector, output).await,
    }
}

async fn list(connector: &Connector, output: &Output) -> Result<Outcome> {
    let session = Session::open(connector, "destinations list", Work::Looks).await?;
    let found = session.rows(DESTINATIONS, &[]).await?;
    session.commit().await?;
    if found.is_empty() {
        note("there is no destination");
    }
    if output.json || !found.is_empty() {
        answer(output, &Value::from(found.clone()), || listed(&found))?;
    }
    Ok(Outcome::matched_if(!found.is_empty()))
}

fn listed(found: &[Value]) -> String {
    let mut table = Table::new(&COLUMNS);
    for destination in found {
        let types = destination["event_types"].as_array().map(Vec::as_slice).unwrap_or_default();
        table.add(vec![
            cell(destination, "name"),
            cell(destination, "kind"),
            state(destination),
            cell(destination, "waiting"),
            cell(destination, "dead"),
            types.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(","),
            cell(destination, "target"),
            text(destination, "last_error").to_owned(),
        ]);
    }
    table.to_string()
}

async fn show(connector: &Connector, name: &str, output: &Output) -> Result<Outcome> {
    let session = Session::open(connector, "destinations show", Work::Looks).await?;
    let found = session.rows(SHOW, &[&name]).await?;
    session.commit().await?;
    let Some(destination) = found.first() else {
        note(&format!("there is no destination {name}"));
        return Ok(Outcome::NothingMatched);
    };
    answer(output, destination, || shown(destination))?;
    Ok(Outcome::Well)
}

/// A line for each property, the name first; settings have a line each.
fn shown(destination: &Value) -> String {
    let Value::Object(properties) = destination else { return String::new() };
    let mut lines =
        vec![("name".to_owned(), cell(destination, "name")), ("kind".to_owned(), cell(destination, "kind"))];
    for (key, value) in properties {
        match value {
            Value::Null => {}
            _ if key == "name" || key == "kind" => {}
            Value::Object(settings) => {
                lines.extend(settings.keys().map(|setting| (format!("{key}.{setting}"), cell(value, setting))));
            }
            _ => lines.push((key.clone(), cell(destination, key))),
        }
    }
    let width = lines.iter().map(|(key, _)| key.chars().count()).max().unwrap_or_default();
    let line = |(key, value): &(String, String)| format!("{:<width$}  {}\n", clean(key), clean(value));
    lines.iter().map(line).collect()
}

/// A call that returns nothing: what it is called for is done, or it is an error.
async fn call(connector: &Connector, name: &str, sql: &str, done: &str, output: &Output) -> Result<Outcome> {
    let session = Session::open(connector, "destinations", Work::Changes).await?;
    let _void: Option<String> = session.value(sql, &[&name]).await?;
    session.commit().await?;
    answer(output, &json!({"name": name, "done": done}), || format!("{} {done}\n", clean(name)))?;
    Ok(Outcome::Well)
}

async fn test(connector: &Connector, name: &str, output: &Output) -> Result<Outcome> {
    let session = Session::open(connector, "destinations test", Work::Changes).await?;
    let event_id: Uuid = session.value("SELECT outbox.send_test($1)", &[&name]).await?;
    session.commit().await?;
    answer(output, &json!({"name": name, "event_id": event_id}), || {
        format!("{} is owed the test event {event_id}: see outbox-relay event {event_id}\n", clean(name))
    })?;
    Ok(Outcome::Well)
}

/// The only place where a secret is printed: once, to whoever made it.
async fn rotate(connector: &Connector, name: &str, grace: f64, output: &Output) -> Result<Outcome> {
    let session = Session::open(connector, "destinations rotate", Work::Changes).await?;
    let sql = "SELECT outbox.rotate_secret($1, make_interval(secs => $2::float8))";
    let secret: String = session.value(sql, &[&name, &grace]).await?;
    session.commit().await?;
    answer(output, &json!({"name": name, "secret": secret}), || format!("{secret}\n"))?;
    Ok(Outcome::Well)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_destination_is_shown_a_property_a_line() {
        let destination = json!({"name": "crm", "kind": "webhook", "event_types": ["*"], "tenant_id": null,
            "settings": {"timeout": "10 s", "headers": {"x-key": "…"}}, "state": "active"});
        let lines = "name              crm\n\
                     kind              webhook\n\
                     event_types       [\"*\"]\n\
                     settings.headers  {\"x-key\":\"…\"}\n\
                     settings.timeout  10 s\n\
                     state             active\n";
        assert_eq!(shown(&destination), lines);
    }
}

//! `dead`: dead letters listed, owed again, or removed.

use serde_json::{Value, json};

use super::session::{Session, Work};
use super::table::{Column, Table, left, right};
use super::{Outcome, answer, cell, confirmed, count, note, text, time};
use crate::cli::{Dead, DeadFilter, Output, Which};
use crate::error::{Error, Result};
use crate::pattern::like;
use crate::postgres::Connector;

const LIST: &str = "SELECT jsonb_build_object( \
        'event_id', x.event_id, 'event_type', x.event_type, 'aggregate_type', x.aggregate_type, \
        'aggregate_id', x.aggregate_id, 'destination', x.destination, 'attempts', x.attempts, \
        'created_at', x.created_at, 'last_error', x.last_error)::text \
    FROM outbox.deliveries x \
   WHERE x.status = 'failed' AND ($1::text IS NULL OR x.destination = $1) \
     AND ($2::text IS NULL OR x.event_type LIKE $2) AND ($3::text IS NULL OR x.last_error LIKE $3) \
     AND ($4::timestamptz IS NULL OR x.created_at >= $4) AND ($5::timestamptz IS NULL OR x.created_at < $5) \
   ORDER BY x.event, x.destination LIMIT $6::int";

const REPLAY: &str = "SELECT outbox.replay_failed(event_types => coalesce($1::text, '*'), destination => $2::text, \
     since => $3::timestamptz, until => $4::timestamptz, error => coalesce($5::text, '*'), max_events => $6::int, \
     dry_run => $7::bool)";

const PURGE: &str = "SELECT outbox.purge_failed(older_than => make_interval(secs => $1::float8), \
     event_types => coalesce($2::text, '*'), destination => $3::text, error => coalesce($4::text, '*'), \
     dry_run => $5::bool)";

const COLUMNS: [Column; 6] =
    [left("EVENT"), left("TYPE"), left("DESTINATION"), right("ATTEMPTS"), left("AGE"), left("LAST ERROR")];

pub async fn dead(connector: &Connector, command: &Dead) -> Result<Outcome> {
    match command {
        Dead::List { filter, output } => list(connector, filter, output).await,
        Dead::Replay { filter, all, dry_run, output } => {
            let filters = &filter.which;
            wants_a_filter(
                is_given(filters) || filter.created.since.is_some() || filter.created.until.is_some(),
                *all,
            )?;
            replay(connector, filter, *dry_run, output).await
        }
        Dead::Purge { which, older_than, all, dry_run, confirm, output } => {
            wants_a_filter(is_given(which) || older_than.is_some(), *all)?;
            let older_than = older_than.map_or(0.0, |span| span.as_secs_f64());
            if *dry_run {
                return purge(connector, which, older_than, true, output).await;
            }
            let question = "Remove these dead letters for good?";
            match confirmed(confirm.yes, question)? {
                true => purge(connector, which, older_than, false, output).await,
                false => Err(Error::Server("nothing was removed".into())),
            }
        }
    }
}

fn is_given(which: &Which) -> bool {
    which.destination.is_some() || which.event_type.is_some() || which.error.is_some()
}

fn wants_a_filter(filtered: bool, all: bool) -> Result<()> {
    match filtered || all {
        true => Ok(()),
        false => Err(Error::Configuration("no filter: give one, or --all for all dead letters (see --help)".into())),
    }
}

async fn list(connector: &Connector, filter: &DeadFilter, output: &Output) -> Result<Outcome> {
    let session = Session::open(connector, "dead list", Work::Looks).await?;
    let which = &filter.which;
    let (types, errors) = (which.event_type.as_deref().map(like), which.error.as_deref().map(like));
    let letters = session
        .rows(LIST, &[&which.destination, &types, &errors, &filter.created.since, &filter.created.until, &filter.limit])
        .await?;
    session.commit().await?;
    if letters.is_empty() {
        note("no dead letter matches");
    }
    if output.json || !letters.is_empty() {
        answer(output, &Value::from(letters.clone()), || shown(&letters))?;
    }
    Ok(Outcome::matched_if(!letters.is_empty()))
}

fn shown(letters: &[Value]) -> String {
    let mut table = Table::new(&COLUMNS);
    for letter in letters {
        table.add(vec![
            cell(letter, "event_id"),
            cell(letter, "event_type"),
            cell(letter, "destination"),
            cell(letter, "attempts"),
            time::age(text(letter, "created_at")),
            text(letter, "last_error").to_owned(),
        ]);
    }
    table.to_string()
}

async fn replay(connector: &Connector, filter: &DeadFilter, dry_run: bool, output: &Output) -> Result<Outcome> {
    let session = Session::open(connector, "dead replay", Work::Changes).await?;
    let (which, created) = (&filter.which, &filter.created);
    let found: i64 = session
        .value(
            REPLAY,
            &[
                &which.event_type,
                &which.destination,
                &created.since,
                &created.until,
                &which.error,
                &filter.limit,
                &dry_run,
            ],
        )
        .await?;
    session.commit().await?;
    let done = if dry_run { "would be owed again" } else { "owed again" };
    counted(output, found, dry_run, done)
}

async fn purge(
    connector: &Connector,
    which: &Which,
    older_than: f64,
    dry_run: bool,
    output: &Output,
) -> Result<Outcome> {
    let session = Session::open(connector, "dead purge", Work::Changes).await?;
    let found: i64 =
        session.value(PURGE, &[&older_than, &which.event_type, &which.destination, &which.error, &dry_run]).await?;
    session.commit().await?;
    let done = if dry_run { "would be removed" } else { "removed" };
    counted(output, found, dry_run, done)
}

/// Answers with a number of events; 0 means that nothing matched.
pub fn counted(output: &Output, found: i64, dry_run: bool, done: &str) -> Result<Outcome> {
    answer(output, &json!({"events": found, "dry_run": dry_run}), || format!("{} {done}\n", count(found, "event")))?;
    Ok(Outcome::matched_if(found > 0))
}

//! `event`, `replay` and `backfill`: single events, and those that a destination would have had.

use serde_json::{Value, json};
use uuid::Uuid;

use super::session::{Session, Work, like};
use super::{Outcome, answer, dead, note, print};
use crate::cli::{Backfill, Output};
use crate::error::Result;
use crate::postgres::Connector;

const BACKFILL: &str = "SELECT outbox.backfill(destination => $1::text, event_types => coalesce($2::text, '*'), \
     since => $3::timestamptz, until => $4::timestamptz, max_events => $5::int, dry_run => $6::bool)";

/// As PostgreSQL prints it, to the digit: a number of the payload may have more of them than a program's float.
pub async fn show(connector: &Connector, event_id: Uuid, output: &Output) -> Result<Outcome> {
    let session = Session::open(connector, "event", Work::Inspects).await?;
    let found: Option<String> = session.value("SELECT jsonb_pretty(outbox.event($1))", &[&event_id]).await?;
    session.commit().await?;
    let Some(event) = found else {
        note(&format!("there is no event {event_id}"));
        return Ok(Outcome::NothingMatched);
    };
    let _ = (output, like("")); // replaced below
    print(&(event + "\n"))?;
    Ok(Outcome::Well)
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

//! `destinations apply` and `destinations export`. All changes are one transaction: all are made, or none.

use std::path::Path;

use serde_json::{Value, json};
use tokio_postgres::types::Json;

use super::file::{File, Kind, Wanted};
use super::plan::{Plan, Step, plan};
use super::session::{Session, Work};
use super::{Outcome, answer, confirmed, file, note, table};
use crate::cli::{Apply, Output};
use crate::config::shown;
use crate::error::{Error, Result};
use crate::postgres::Connector;

const VIEW: &str = "SELECT to_jsonb(d)::text FROM outbox.destinations d ORDER BY d.name";

const ADD_RABBITMQ: &str = "SELECT outbox.add_rabbitmq(name => $1, exchange => coalesce($2::text, 'outbox_events'), \
     routing_key => coalesce($3::text, '{event_type}'), event_types => coalesce($4::text[], '{*}'), settings => $5::jsonb, \
     tenant_id => $6::text, filter => ($7::text)::jsonpath)::text";

/// The secret that it returns is nobody's to see here.
const ADD_WEBHOOK: &str = "SELECT outbox.add_webhook(name => $1, url => $2, event_types => coalesce($3::text[], '{*}'), \
     secret => $4::text, settings => $5::jsonb, tenant_id => $6::text, filter => ($7::text)::jsonpath) IS NULL";

pub async fn export(connector: &Connector, output: &Output) -> Result<Outcome> {
    let session = Session::open(connector, "destinations export", Work::Looks).await?;
    let file = File { destination: present(&session).await? };
    session.commit().await?;
    let toml = file.to_toml()?;
    answer(output, &file.to_json()?, || toml)?;
    Ok(Outcome::Well)
}

async fn present(session: &Session) -> Result<Vec<Wanted>> {
    session.rows(VIEW, &[]).await?.into_iter().map(Wanted::of_view).collect()
}

pub async fn apply(connector: &Connector, given: &Apply) -> Result<Outcome> {
    let File { destination: mut wanted } = file::read(&given.file)?;
    if given.prune && wanted.is_empty() {
        return Err(Error::Configuration("the file holds no destination, and --prune would remove all".into()));
    }
    let work = if given.dry_run { Work::Looks } else { Work::Changes };
    let session = Session::open(connector, "destinations apply", work).await?;
    canonical_filters(&session, &mut wanted).await?;
    let plan = plan(&present(&session).await?, &wanted, given.prune).map_err(Error::Server)?;
    if !plan.kept.is_empty() {
        note(&format!("not in the file, and kept without --prune: {}", plan.kept.join(", ")));
    }
    let removes = plan.steps.iter().any(|step| matches!(step, Step::Remove { .. }));
    if !given.output.json {
        super::print(&lines(&plan))?;
    }
    if !given.dry_run && removes && !confirmed(given.confirm.yes, "Apply this?")? {
        return Err(Error::Server("nothing was changed".into()));
    }
    if !given.dry_run {
        for step in &plan.steps {
            take(&session, step).await?;
        }
    }
    session.commit().await?;
    if !given.dry_run {
        plan.steps.iter().for_each(tell_of_secret);
    }
    let changes: Vec<Value> = plan.steps.iter().flat_map(Step::json).collect();
    answer(&given.output, &json!({"dry_run": given.dry_run, "changes": changes}), || summary(&plan, given.dry_run))?;
    Ok(Outcome::Well)
}

/// PostgreSQL's own form of each filter, in which two that are the same look the same.
async fn canonical_filters(session: &Session, wanted: &mut [Wanted]) -> Result<()> {
    for wanted in wanted {
        if let Some(filter) = &mut wanted.filter {
            let canonical = session.value("SELECT ($1::text)::jsonpath::text", &[filter]).await;
            *filter =
                canonical.map_err(|error| Error::Server(format!("destination {}: filter: {error}", wanted.name)))?;
        }
    }
    Ok(())
}

fn lines(plan: &Plan) -> String {
    plan.steps.iter().flat_map(Step::lines).map(|line| table::clean(&line) + "\n").collect()
}

fn summary(plan: &Plan, dry_run: bool) -> String {
    if plan.steps.is_empty() {
        return "nothing to change\n".into();
    }
    let number = |is_it: fn(&Step) -> bool| plan.steps.iter().filter(|step| is_it(step)).count();
    let add = number(|step| matches!(step, Step::Add(_)));
    let alter = number(|step| matches!(step, Step::Alter { .. }));
    let remove = number(|step| matches!(step, Step::Remove { .. }));
    match dry_run {
        true => format!("{add} to add, {alter} to change, {remove} to remove\n"),
        false => format!("{add} added, {alter} changed, {remove} removed\n"),
    }
}

async fn take(session: &Session, step: &Step) -> Result<()> {
    match step {
        Step::Add(wanted) => add(session, wanted).await?,
        Step::Alter { name, patch, paused, .. } => {
            if !patch.is_null() {
                let sql = "SELECT outbox.alter_destination($1, $2::jsonb)::text";
                let _void: Option<String> = session.value(sql, &[name, &Json(patch)]).await?;
            }
            match paused {
                Some(true) => pause(session, name).await?,
                Some(false) => {
                    let _void: Option<String> = session.value("SELECT outbox.resume($1)::text", &[name]).await?;
                }
                None => {}
            }
        }
        Step::Remove { name } => {
            let _void: Option<String> = session.value("SELECT outbox.remove_destination($1)::text", &[name]).await?;
        }
    }
    Ok(())
}

async fn add(session: &Session, wanted: &Wanted) -> Result<()> {
    let Wanted { name, url, exchange, routing_key, event_types, tenant_id, filter, .. } = wanted;
    let settings = Json(&wanted.settings);
    match wanted.kind {
        Kind::RabbitMq => {
            let _void: Option<String> = session
                .value(ADD_RABBITMQ, &[name, exchange, routing_key, event_types, &settings, tenant_id, filter])
                .await?;
        }
        Kind::Webhook => {
            let secret = wanted.secret_file.as_deref().map(|path| secret_of(name, path)).transpose()?;
            let _unseen: bool =
                session.value(ADD_WEBHOOK, &[name, url, event_types, &secret, &settings, tenant_id, filter]).await?;
        }
    }
    match wanted.paused {
        Some(true) => pause(session, name).await,
        _ => Ok(()),
    }
}

/// The secret of a new webhook is shown nowhere, so that no log of a deployment holds one.
fn tell_of_secret(step: &Step) {
    if let Step::Add(Wanted { name, kind: Kind::Webhook, secret_file: None, .. }) = step {
        note(&format!(
            "{name} has a signing secret: outbox-relay destinations rotate {name} --grace 0 makes one that you see"
        ));
    }
}

async fn pause(session: &Session, name: &str) -> Result<()> {
    let _void: Option<String> = session.value("SELECT outbox.pause($1)::text", &[&name]).await?;
    Ok(())
}

fn secret_of(name: &str, path: &Path) -> Result<String> {
    let secret = std::fs::read_to_string(path);
    let secret = secret.map_err(|error| {
        Error::Configuration(format!("destination {name}: the secret's file{} can't be read: {error}", shown(path)))
    })?;
    Ok(secret.trim().to_owned())
}

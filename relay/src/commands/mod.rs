//! The commands of operators, a file a subject. Each asks in one session and one transaction (`session`), prints a table or
//! JSON on standard output (`table`, `time`), and ends with the exit code that its outcome stands for.
//!
//! - `status`, `health`, `tail`: look
//! - `dead`, `event`: dead letters and single events
//! - `destinations`; `apply` makes them what a `file` says, by way of a `plan`
//! - `verify`, `healthcheck`, `generate`: need no database

mod apply;
mod dead;
mod destinations;
mod event;
mod file;
mod generate;
mod health;
mod healthcheck;
mod plan;
mod session;
mod status;
mod table;
mod tail;
pub mod time;
mod verify;

use std::io::{BufRead, IsTerminal, Write};

use serde_json::Value;

use crate::cli::{Access, Operate, Output};
use crate::config::{self, Basics};
use crate::error::{Error, Result};
use crate::logging;
use crate::postgres::Connector;

/// How a command ended that was not an error. Its exit code is for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Well,
    NotWell,
    /// What was asked for does not exist, or no row matched.
    NothingMatched,
}

impl Outcome {
    pub fn code(self) -> u8 {
        match self {
            Outcome::Well => 0,
            Outcome::NotWell => 1,
            Outcome::NothingMatched => 2,
        }
    }

    pub fn well_if(well: bool) -> Self {
        if well { Outcome::Well } else { Outcome::NotWell }
    }

    fn matched_if(matched: bool) -> Self {
        if matched { Outcome::Well } else { Outcome::NothingMatched }
    }
}

pub fn run(access: &Access, command: &Operate) -> Result<Outcome> {
    match command {
        Operate::Completions { shell } => generate::completions(*shell),
        Operate::Man => generate::man(),
        Operate::Verify(given) => verify::verify(given),
        Operate::Healthcheck(given) => {
            let at = config::http_listen(access, &given.listen)?;
            runtime()?.block_on(healthcheck::healthcheck(at, &given.output))
        }
        _ => {
            let basics = Basics::load(access)?;
            logging::start(basics.log_format, basics.log_levels);
            basics.database.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
            let connector = Connector::new(basics.database)?.with_notices(note);
            runtime()?.block_on(with_database(&connector, command))
        }
    }
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|error| Error::Server(format!("can't start the runtime: {error}")))
}

async fn with_database(connector: &Connector, command: &Operate) -> Result<Outcome> {
    let done = match command {
        Operate::Status(output) => status::status(connector, output).await,
        Operate::Health(output) => health::health(connector, output).await,
        Operate::Tail(given) => tail::tail(connector, given).await,
        Operate::Dead(dead) => dead::dead(connector, dead).await,
        Operate::Event { event_id, output } => event::show(connector, *event_id, output).await,
        Operate::Replay { event_id, to, output } => event::replay(connector, *event_id, to.as_deref(), output).await,
        Operate::Backfill(given) => event::backfill(connector, given).await,
        Operate::Destinations(destinations) => destinations::destinations(connector, destinations).await,
        Operate::Completions { .. } | Operate::Man | Operate::Verify(_) | Operate::Healthcheck(_) => {
            Err(Error::Configuration("this command needs no database".into()))
        }
    };
    match done {
        // PostgreSQL says which: a destination, mostly.
        Err(error) if session::names_what_is_not_there(&error) => {
            note(&error.to_string());
            Ok(Outcome::NothingMatched)
        }
        done => done,
    }
}

/// Prints on standard output. Nobody may be there to read it, which is no failure: false then.
fn print(text: &str) -> Result<bool> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(Error::Server(format!("can't write to standard output: {error}"))),
    }
}

/// A table or sentence for people, or JSON for programs.
fn answer(output: &Output, json: &Value, people: impl FnOnce() -> String) -> Result<()> {
    let text = if output.json { format!("{json:#}\n") } else { people() };
    print(&text).map(drop)
}

/// A remark for people, on standard error, where it disturbs no program. Nobody may be there to read it.
fn note(line: &str) {
    let _ = writeln!(std::io::stderr(), "outbox-relay: {}", table::clean(line));
}

/// Asks before what can't be undone, where somebody can answer.
fn confirmed(yes: bool, question: &str) -> Result<bool> {
    let (mut stderr, stdin) = (std::io::stderr(), std::io::stdin());
    if yes || !stdin.is_terminal() || !stderr.is_terminal() {
        return Ok(true);
    }
    let mut line = String::new();
    let asked = write!(stderr, "{question} [y/N] ").and_then(|()| stdin.lock().read_line(&mut line));
    asked.map_err(|error| Error::Server(format!("can't ask: {error}")))?;
    Ok(matches!(line.trim(), "y" | "Y" | "yes"))
}

/// `1 event`, `2 events`.
fn count(n: i64, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// A text of a JSON object; what is missing or null is empty.
fn text<'a>(object: &'a Value, key: &str) -> &'a str {
    object[key].as_str().unwrap_or_default()
}

/// The same for a table, where an empty cell can't be seen.
fn cell(object: &Value, key: &str) -> String {
    match &object[key] {
        Value::Null => "-".into(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

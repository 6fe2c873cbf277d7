//! `outbox-relay`: publishes the events of pg_outbox to RabbitMQ and to signed webhooks.
//!
//! An event's way, file by file: `session` listens and, woken, lets `dispatch` claim through `store` when the `agenda` has
//! room for it; `lanes` finds each of its destinations in the `directory` and gives the event to its lane (`served`); the
//! `lane` keeps the order (`queue`) and calls `destination`; the outcome is entered in the `ledger`, which `dispatch`
//! settles. `budget` and `window` bound what is held, and `windows` says what to claim next; `lease` says until when it is
//! held, `pause`, `pauses` and `pace` when a destination is tried again and how fast; `prepare` declares what RabbitMQ
//! destinations need; `trace` shows each step, and `dead_letters` says when the log names those.
//!
//! - `cli`, `config`, `pattern`, `amqp_url`, `error`: what the user configures
//! - `commands`: what operators do from a terminal: look, replay, purge, change destinations, verify a signature
//! - `postgres`, `net`: connecting, with TLS as libpq names it
//! - `logging`, `metrics`, `http`, `check`, `ui`, `spans`: what an operator looks at
//! - `backoff`, `timer`, `shutdown`, `systemd`, `limits`: when to try again, when to stop, what the system is told and grants

#![forbid(unsafe_code)]

mod agenda;
mod amqp_url;
mod backoff;
mod budget;
mod check;
mod cli;
mod commands;
mod config;
mod dead_letters;
mod destination;
mod directory;
mod dispatch;
mod error;
mod http;
mod lane;
mod lanes;
mod lease;
mod ledger;
mod limits;
mod logging;
mod metrics;
mod net;
mod pace;
mod pattern;
mod pause;
mod pauses;
mod percent;
mod postgres;
mod prepare;
mod queue;
mod served;
mod session;
mod shutdown;
mod spans;
mod store;
mod systemd;
mod timer;
mod trace;
mod ui;
mod window;
mod windows;

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;

use crate::cli::{Cli, Command, Options};
use crate::commands::Outcome;
use crate::config::Config;
use crate::destination::Environment;
use crate::error::{EXIT_CONFIGURATION, Error, Result};
use crate::metrics::Metrics;
use crate::postgres::Connector;
use crate::session::{Current, Sessions};
use crate::shutdown::Shutdown;
use crate::systemd::Systemd;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if !error.use_stderr() => {
            // Help or version, as asked for.
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        Err(error) => return complain(&cli::describe(&error), EXIT_CONFIGURATION),
    };
    let done = match &cli.command {
        Command::Run(options) | Command::Check(options) => start(&cli, options),
        Command::Operate(command) => commands::run(&cli.access, command),
    };
    match done {
        Ok(outcome) => ExitCode::from(outcome.code()),
        Err(error) => complain(&error.to_string(), error.exit_code()),
    }
}

/// The one line that says why there is no relay. Nobody may be there to read it.
fn complain(line: &str, code: u8) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "outbox-relay: {line}");
    ExitCode::from(code)
}

fn start(cli: &Cli, options: &Options) -> Result<Outcome> {
    let config = Arc::new(Config::load(&cli.access, options)?);
    logging::start(config.log_format, config.log_levels.clone());
    config.warnings().for_each(|warning| tracing::warn!("{warning}"));
    limits::raise_open_files();
    let connector = Connector::new(config.database.clone())?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Error::Server(format!("can't start the runtime: {error}")))?;
    let environment = Arc::new(Environment::new(&config).map_err(|error| Error::Configuration(error.to_string()))?);
    // On a thread of the runtime: the connections' tasks are there too, and need not wake another thread.
    let checks = matches!(cli.command, Command::Check(_));
    let work = runtime.spawn(async move {
        match checks {
            true => Ok(Outcome::well_if(check::check(&config, &connector, &environment).await)),
            false => run(config, connector, environment).await.map(|()| Outcome::Well),
        }
    });
    let done = runtime.block_on(work).unwrap_or_else(|_| Err(failed()));
    runtime.shutdown_background();
    done
}

/// At the end the collector has so long to take the last spans.
const LAST_SPANS: std::time::Duration = std::time::Duration::from_secs(2);

fn failed() -> Error {
    Error::Server("the relay failed, see the line before".into())
}

/// Relays until a signal, then drains for the grace period at most. What is held after that, the server gives back.
async fn run(config: Arc<Config>, connector: Connector, environment: Arc<Environment>) -> Result<()> {
    let metrics = Metrics::new(config.metrics_destinations).map_err(|error| Error::Server(error.to_string()))?;
    let current = Current::default();
    if let Some(settings) = config.spans.clone() {
        spans::start(settings, &config.consumer, &metrics).map_err(Error::Server)?;
    }
    let systemd = Systemd::from_environment().unwrap_or_else(|error| {
        tracing::warn!(%error, "NOTIFY_SOCKET can't be used");
        Systemd::default()
    });
    let shutdown = Shutdown::on_signals(systemd.clone())
        .map_err(|error| Error::Server(format!("can't handle signals: {error}")))?;
    let ui = config.ui.as_ref();
    let pages =
        ui.map(|ui| ui::pages(ui, config.http_listen.port(), &config.consumer, connector.clone())).transpose()?;
    http::serve(config.http_listen, metrics.clone(), current.clone(), pages).await?;
    let grace = config.grace_period;
    let requested = shutdown.clone();
    let sessions = Sessions { config, connector, environment, metrics, current, shutdown, systemd: systemd.clone() };
    let expired = async {
        requested.requested().await;
        tokio::time::sleep(grace).await;
    };
    let work = async {
        let result = sessions.run().await;
        spans::finish(LAST_SPANS).await;
        result
    };
    tokio::select! {
        result = systemd.watched(work) => result,
        () = expired => {
            tracing::warn!("the grace period is over; what is still under way goes back");
            Ok(())
        }
    }
}

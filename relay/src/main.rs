//! `outbox-relay`: publishes the events of pg_outbox to RabbitMQ and to signed webhooks.
//!
//! An event's way, file by file: `session` listens and, woken, lets `dispatch` claim through `store`; `lanes` gives the
//! event to each of its destinations, whose `lane` keeps the order (`queue`) and calls `destination`; the outcome is
//! entered in the `ledger`, which `dispatch` settles. `window` bounds what is held, `lease` says until when, `pause` and
//! `pace` when a destination is tried again and how fast; `trace` shows each step.
//!
//! - `cli`, `config`, `error`: what the user configures
//! - `postgres`: connecting, with TLS as libpq names it
//! - `metrics`, `http`, `check`: what an operator looks at
//! - `backoff`, `shutdown`: when to try again, when to stop

#![forbid(unsafe_code)]

mod backoff;
mod check;
mod cli;
mod config;
mod destination;
mod dispatch;
mod error;
mod http;
mod lane;
mod lanes;
mod lease;
mod ledger;
mod metrics;
mod pace;
mod pause;
mod postgres;
mod queue;
mod session;
mod shutdown;
mod store;
mod trace;
mod window;

use std::io::IsTerminal;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use crate::cli::{Cli, Command, LogFormat};
use crate::config::Config;
use crate::destination::Environment;
use crate::error::{EXIT_CONFIGURATION, Error, Result};
use crate::metrics::Metrics;
use crate::postgres::Connector;
use crate::session::{Current, Sessions};
use crate::shutdown::Shutdown;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if !error.use_stderr() => {
            // Help or version, as asked for.
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("outbox-relay: {}", cli::describe(&error));
            return ExitCode::from(EXIT_CONFIGURATION);
        }
    };
    match start(&cli.command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("outbox-relay: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn start(command: &Command) -> Result<bool> {
    let config = Arc::new(Config::load(command.options())?);
    start_logging(&config)?;
    let connector = Connector::new(config.database.clone())?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Error::Server(format!("can't start the runtime: {error}")))?;
    let environment = Arc::new(Environment::new(&config).map_err(|error| Error::Configuration(error.to_string()))?);
    let done = match command {
        // On a thread of the runtime: the connections' tasks are there too, and need not wake another thread.
        Command::Run(_) => runtime
            .block_on(runtime.spawn(run(config, connector, environment)))
            .unwrap_or_else(|error| Err(Error::Server(format!("the relay failed: {error}"))))
            .map(|()| true),
        Command::Check(_) => Ok(runtime.block_on(check::check(&config, &connector, &environment))),
    };
    runtime.shutdown_background();
    done
}

fn start_logging(config: &Config) -> Result<()> {
    // At their lowest levels libraries log what goes over the wire: logins, keys, payloads. lapin logs the body of each
    // returned message at any level.
    const QUIET: &str = "lapin=info,lapin::returned_messages=off,tokio_postgres=info,hyper=info,hyper_util=info,\
                         reqwest=info,rustls=info";
    let directives = format!("{},{QUIET}", config.log_level);
    let filter = EnvFilter::try_new(directives)
        .map_err(|_| Error::Configuration("log_level is neither a level nor a list of directives".into()))?;
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match config.log_format {
        LogFormat::Json => lines.json().flatten_event(true).with_current_span(false).init(),
        LogFormat::Text => lines.with_ansi(std::io::stderr().is_terminal()).init(),
    }
    Ok(())
}

/// Relays until a signal, then drains for the grace period at most. What is held after that, the server gives back.
async fn run(config: Arc<Config>, connector: Connector, environment: Arc<Environment>) -> Result<()> {
    let metrics = Metrics::new().map_err(|error| Error::Server(error.to_string()))?;
    let current = Current::default();
    let shutdown = Shutdown::on_signals().map_err(|error| Error::Server(format!("can't handle signals: {error}")))?;
    http::serve(config.http_listen, metrics.clone(), current.clone()).await?;
    let grace = config.grace_period;
    let sessions = Sessions { config, connector, environment, metrics, current, shutdown: shutdown.clone() };
    let expired = async {
        shutdown.requested().await;
        tokio::time::sleep(grace).await;
    };
    tokio::select! {
        result = sessions.run() => result,
        () = expired => {
            tracing::warn!("the grace period is over; what is still under way goes back");
            Ok(())
        }
    }
}

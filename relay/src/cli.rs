//! The command line. Every setting is also an environment variable and a key of the file; see [`crate::config`].
//! `operate` has the commands of operators.

mod operate;

use std::path::PathBuf;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};

pub use operate::{Apply, Backfill, Dead, DeadFilter, Destinations, Operate, Output, Tail, Verify, Which};

/// Publishes the events of pg_outbox to RabbitMQ and to signed webhooks, and operates the outbox.
#[derive(Parser)]
#[command(name = "outbox-relay", version, about)]
pub struct Cli {
    #[command(flatten)]
    pub access: Access,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// Relay events until SIGTERM.
    Run(Options),
    /// Validate the configuration and try each connection; exit code 0 if all is well.
    Check(Options),
    #[command(flatten)]
    Operate(Operate),
}

/// What every command takes: how PostgreSQL is reached, and what is logged.
#[derive(Args, Default)]
pub struct Access {
    /// TOML file with any of the settings
    #[arg(long, global = true, env = "OUTBOX_CONFIG", hide_env_values = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// PostgreSQL, as a URL or as key=value pairs [default: from libpq's environment]
    #[arg(long, global = true, env = "DATABASE_URL", value_name = "URL", hide_env_values = true)]
    pub database_url: Option<String>,
    /// File that holds the URL of PostgreSQL
    #[arg(long, global = true, env = "DATABASE_URL_FILE", value_name = "FILE", hide_env_values = true)]
    pub database_url_file: Option<PathBuf>,
    /// Form of the log lines [default: text]
    #[arg(long, global = true, env = "OUTBOX_LOG_FORMAT", hide_env_values = true, value_enum)]
    pub log_format: Option<LogFormat>,
    /// error, warn, info, debug, trace, or directives such as outbox_relay::trace=debug [default: info for run and check,
    /// warn for the other commands]
    #[arg(long, global = true, env = "OUTBOX_LOG_LEVEL", hide_env_values = true, value_name = "LEVEL")]
    pub log_level: Option<String>,
}

/// Where the relay's own pages are.
#[derive(Args, Default)]
pub struct Listen {
    /// Host and port of /metrics, /healthz and /readyz [default: 127.0.0.1:9464]
    #[arg(long, env = "HTTP_LISTEN", hide_env_values = true, value_name = "ADDRESS")]
    pub http_listen: Option<String>,
}

/// All optional here: a flag wins over the environment, the environment over the file.
#[derive(Args, Default)]
pub struct Options {
    #[command(flatten)]
    pub listen: Listen,
    /// RabbitMQ; without it RabbitMQ destinations are left to others. Several: NAME=URL, repeated or separated by spaces
    #[arg(long, env = "AMQP_URL", value_name = "URL", hide_env_values = true)]
    pub amqp_url: Option<Vec<String>>,
    /// File that holds the URL of RabbitMQ, or several
    #[arg(long, env = "AMQP_URL_FILE", value_name = "FILE", hide_env_values = true)]
    pub amqp_url_file: Option<PathBuf>,
    /// Certificate authority for amqps, PEM [default: the system's authorities]
    #[arg(long, env = "AMQP_CA_CERT", hide_env_values = true, value_name = "FILE")]
    pub amqp_ca_cert: Option<PathBuf>,
    /// Client certificate for amqps, PEM; needs the key too
    #[arg(long, env = "AMQP_CLIENT_CERT", hide_env_values = true, value_name = "FILE")]
    pub amqp_client_cert: Option<PathBuf>,
    /// Key of the client certificate for amqps, PEM (PKCS #8)
    #[arg(long, env = "AMQP_CLIENT_KEY", hide_env_values = true, value_name = "FILE")]
    pub amqp_client_key: Option<PathBuf>,
    /// Password of the page at /ui/; without one there is no page
    #[arg(long, env = "OUTBOX_UI_PASSWORD", value_name = "PASSWORD", hide_env_values = true)]
    pub ui_password: Option<String>,
    /// File that holds the password of the page
    #[arg(long, env = "OUTBOX_UI_PASSWORD_FILE", value_name = "FILE", hide_env_values = true)]
    pub ui_password_file: Option<PathBuf>,
    /// Name by which browsers reach the page, besides addresses and localhost; repeat or separate by commas
    #[arg(long, env = "OUTBOX_UI_HOSTS", hide_env_values = true, value_name = "NAME", value_delimiter = ',')]
    pub ui_hosts: Option<Vec<String>>,
    /// Name shown in outbox.health(), at most 63 bytes [default: host:pid]
    #[arg(long, env = "OUTBOX_CONSUMER", hide_env_values = true, value_name = "NAME")]
    pub consumer: Option<String>,
    /// Deliveries that one destination may hold, 1 to 100000 [default: 2000]
    #[arg(long, env = "OUTBOX_MAX_IN_FLIGHT", hide_env_values = true, value_name = "N")]
    pub max_in_flight: Option<usize>,
    /// Events that the relay may hold, 1 to 1000000 [default: 10000]
    #[arg(long, env = "OUTBOX_MAX_EVENTS_IN_FLIGHT", hide_env_values = true, value_name = "N")]
    pub max_events_in_flight: Option<usize>,
    /// Payload bytes that the relay may hold [default: 67108864]
    #[arg(long, env = "OUTBOX_MAX_BYTES_IN_FLIGHT", hide_env_values = true, value_name = "BYTES")]
    pub max_bytes_in_flight: Option<usize>,
    /// Events claimed at once, 1 to 10000 [default: 500]
    #[arg(long, env = "OUTBOX_CLAIM_BATCH", hide_env_values = true, value_name = "N")]
    pub claim_batch: Option<usize>,
    /// Seconds after which a claim ends that is not renewed, 5 to 86400; renewed while deliveries are under way [default: 60]
    #[arg(long, env = "OUTBOX_LEASE", hide_env_values = true, value_name = "SECONDS")]
    pub lease: Option<u64>,
    /// Seconds to finish after SIGTERM [default: 25]
    #[arg(long, env = "OUTBOX_GRACE_PERIOD", hide_env_values = true, value_name = "SECONDS")]
    pub grace_period: Option<u64>,
    /// Network that webhooks may reach although it is not public, such as 10.0.0.0/8; repeat or separate by commas
    #[arg(
        long,
        env = "OUTBOX_WEBHOOK_ALLOW_NETWORKS",
        hide_env_values = true,
        value_name = "CIDR",
        value_delimiter = ','
    )]
    pub webhook_allow_networks: Option<Vec<String>>,
    /// HTTP proxy for all webhooks that name none, http:// or https://
    #[arg(long, env = "OUTBOX_WEBHOOK_PROXY", hide_env_values = true, value_name = "URL")]
    pub webhook_proxy: Option<String>,
    /// Certificate authorities for webhooks, in addition to the system's, PEM
    #[arg(long, env = "OUTBOX_WEBHOOK_CA_CERT", hide_env_values = true, value_name = "FILE")]
    pub webhook_ca_cert: Option<PathBuf>,
    /// Send no webhook to an http URL [default: false]
    #[arg(
        long,
        env = "OUTBOX_WEBHOOK_HTTPS_ONLY",
        hide_env_values = true,
        value_name = "BOOLEAN",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true"
    )]
    pub webhook_https_only: Option<String>,
    /// Serve only destinations whose names match, such as crm-*; repeat or separate by commas [default: all]
    #[arg(long, env = "OUTBOX_DESTINATIONS", hide_env_values = true, value_name = "PATTERN", value_delimiter = ',')]
    pub destinations: Option<Vec<String>>,
    /// Destinations with metrics of their own; the others are summed as "other" [default: 100]
    #[arg(long, env = "OUTBOX_METRICS_DESTINATIONS", hide_env_values = true, value_name = "N")]
    pub metrics_destinations: Option<usize>,
}

/// What is wrong with the command line, in one line. It shows no value: any could be a connection string.
pub fn describe(error: &clap::Error) -> String {
    let argument = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(name)) => known_argument(name),
        Some(ContextValue::Strings(names)) => {
            names.iter().map(|name| known_argument(name)).collect::<Option<Vec<_>>>().map(|names| names.join(", "))
        }
        _ => None,
    };
    let argument = argument.unwrap_or_default();
    let what = match error.kind() {
        ErrorKind::MissingSubcommand | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => "no command",
        ErrorKind::InvalidSubcommand => "unknown command",
        ErrorKind::UnknownArgument => "a flag that is unknown, or an argument that belongs to no flag",
        ErrorKind::InvalidValue | ErrorKind::ValueValidation => "invalid value for",
        ErrorKind::ArgumentConflict => "given twice, or beside what it excludes:",
        ErrorKind::MissingRequiredArgument => "missing:",
        _ => "wrong usage",
    };
    // Why a value is refused, where that is a text of ours, which quotes nothing.
    let why = std::error::Error::source(error).and_then(|source| source.downcast_ref::<Refused>());
    let why = why.map(|Refused(why)| format!(": {why}")).unwrap_or_default();
    format!("{}{why} (see --help)", format!("{what} {argument}").trim_end())
}

/// Why a value of the command line is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refused(pub &'static str);

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Refused {}

/// The argument that an error names, if it is one of ours: anything else that was typed could be a password.
fn known_argument(name: &str) -> Option<String> {
    let name = name.split('=').next()?.split(" <").next()?;
    let shown = match name.strip_prefix("--") {
        Some(long) => is_ours(&Cli::command(), &|argument| argument.get_long() == Some(long)),
        None => is_ours(&Cli::command(), &|argument| {
            argument.is_positional()
                && argument.get_value_names().is_some_and(|names| names.iter().any(|own| name == format!("<{own}>")))
        }),
    };
    shown.then(|| name.to_owned())
}

fn is_ours(command: &clap::Command, is_it: &dyn Fn(&clap::Arg) -> bool) -> bool {
    command.get_arguments().any(is_it) || command.get_subcommands().any(|command| is_ours(command, is_it))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Text,
    Json,
}

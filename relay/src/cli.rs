//! The command line. Every setting is also an environment variable and a key of the file; see [`crate::config`].

use std::path::PathBuf;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Args, Parser, Subcommand, ValueEnum};

/// Publishes the events of pg_outbox to RabbitMQ and to signed webhooks.
#[derive(Parser)]
#[command(name = "outbox-relay", version, about)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// Relay events until SIGTERM.
    Run(Options),
    /// Validate the configuration and try each connection; exit code 0 if all is well.
    Check(Options),
}

impl Command {
    pub fn options(&self) -> &Options {
        match self {
            Command::Run(options) | Command::Check(options) => options,
        }
    }
}

/// All optional here: a flag wins over the environment, the environment over the file.
#[derive(Args, Default)]
pub struct Options {
    /// TOML file with any of these settings
    #[arg(long, env = "OUTBOX_CONFIG", hide_env_values = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// PostgreSQL, as a URL or as key=value pairs
    #[arg(long, env = "DATABASE_URL", value_name = "URL", hide_env_values = true)]
    pub database_url: Option<String>,
    /// File that holds the same
    #[arg(long, env = "DATABASE_URL_FILE", value_name = "FILE", hide_env_values = true)]
    pub database_url_file: Option<PathBuf>,
    /// RabbitMQ; without it RabbitMQ destinations are left to others
    #[arg(long, env = "AMQP_URL", value_name = "URL", hide_env_values = true)]
    pub amqp_url: Option<String>,
    /// File that holds the same
    #[arg(long, env = "AMQP_URL_FILE", value_name = "FILE", hide_env_values = true)]
    pub amqp_url_file: Option<PathBuf>,
    /// Certificate authority for amqps
    #[arg(long, env = "AMQP_CA_CERT", hide_env_values = true, value_name = "FILE")]
    pub amqp_ca_cert: Option<PathBuf>,
    /// Client certificate for amqps
    #[arg(long, env = "AMQP_CLIENT_CERT", hide_env_values = true, value_name = "FILE")]
    pub amqp_client_cert: Option<PathBuf>,
    /// Key of the client certificate for amqps
    #[arg(long, env = "AMQP_CLIENT_KEY", hide_env_values = true, value_name = "FILE")]
    pub amqp_client_key: Option<PathBuf>,
    /// Host and port of /metrics, /healthz and /readyz [default: 127.0.0.1:9464]
    #[arg(long, env = "HTTP_LISTEN", hide_env_values = true, value_name = "ADDRESS")]
    pub http_listen: Option<String>,
    /// Password of the page at /ui/; without one there is no page
    #[arg(long, env = "OUTBOX_UI_PASSWORD", value_name = "PASSWORD", hide_env_values = true)]
    pub ui_password: Option<String>,
    /// File that holds the same
    #[arg(long, env = "OUTBOX_UI_PASSWORD_FILE", value_name = "FILE", hide_env_values = true)]
    pub ui_password_file: Option<PathBuf>,
    /// Name by which browsers reach the page, besides addresses and localhost; repeat or separate by commas
    #[arg(long, env = "OUTBOX_UI_HOSTS", hide_env_values = true, value_name = "NAME", value_delimiter = ',')]
    pub ui_hosts: Option<Vec<String>>,
    /// Name shown in outbox.health() [default: host:pid]
    #[arg(long, env = "OUTBOX_CONSUMER", hide_env_values = true, value_name = "NAME")]
    pub consumer: Option<String>,
    /// Deliveries that one destination may hold [default: 2000]
    #[arg(long, env = "OUTBOX_MAX_IN_FLIGHT", hide_env_values = true, value_name = "N")]
    pub max_in_flight: Option<usize>,
    /// Payload bytes that one destination may hold [default: 16777216]
    #[arg(long, env = "OUTBOX_MAX_BYTES_IN_FLIGHT", hide_env_values = true, value_name = "BYTES")]
    pub max_bytes_in_flight: Option<usize>,
    /// Events claimed at once [default: 500]
    #[arg(long, env = "OUTBOX_CLAIM_BATCH", hide_env_values = true, value_name = "N")]
    pub claim_batch: Option<usize>,
    /// Seconds after which a claim that is not renewed ends [default: 60]
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
    /// Form of the log lines [default: text]
    #[arg(long, env = "OUTBOX_LOG_FORMAT", hide_env_values = true, value_enum)]
    pub log_format: Option<LogFormat>,
    /// error, warn, info, debug, trace, or directives such as outbox_relay::trace=debug [default: info]
    #[arg(long, env = "OUTBOX_LOG_LEVEL", hide_env_values = true, value_name = "LEVEL")]
    pub log_level: Option<String>,
}

/// What is wrong with the command line, in one line. It shows no value: any could be a connection string.
pub fn describe(error: &clap::Error) -> String {
    let argument = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(name)) => known_flag(name),
        _ => None,
    };
    let argument = argument.as_deref().unwrap_or_default();
    let what = match error.kind() {
        ErrorKind::MissingSubcommand | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            return "no command: use `outbox-relay run` or `outbox-relay check`".into();
        }
        ErrorKind::InvalidSubcommand => "unknown command: it is run or check",
        ErrorKind::UnknownArgument => "a flag that is unknown, or an argument that belongs to no flag",
        ErrorKind::InvalidValue | ErrorKind::ValueValidation => "invalid value for",
        ErrorKind::ArgumentConflict => "given twice:",
        _ => "wrong usage",
    };
    format!("{} (see --help)", format!("{what} {argument}").trim_end())
}

/// The flag that an error names, if it is one of ours: anything else that was typed could be a password.
fn known_flag(name: &str) -> Option<String> {
    let name = name.split(['=', ' ']).next()?.strip_prefix("--")?;
    let command = Options::augment_args(clap::Command::new("outbox-relay"));
    command.get_arguments().any(|argument| argument.get_long() == Some(name)).then(|| format!("--{name}"))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Text,
    Json,
}

//! The commands of operators: what can be given to each.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use clap::{Args, Subcommand};
use uuid::Uuid;

use super::Listen;
use crate::commands::time::{moment, span};

#[derive(Subcommand)]
pub enum Operate {
    /// Show counts, latency, and each destination with its state
    Status(Output),
    /// Show each health check; exit code 1 if one is not well
    Health(Output),
    /// Show events as they are announced, until SIGINT or SIGTERM
    Tail(Tail),
    /// Look at dead letters, try them again or remove them
    #[command(subcommand)]
    Dead(Dead),
    /// Show an event and what became of it at each destination
    Event {
        #[arg(value_name = "EVENT_ID")]
        event_id: Uuid,
        #[command(flatten)]
        output: Output,
    },
    /// Owe an event again: a dead letter where it was given up, a processed event to all that want it
    Replay {
        #[arg(value_name = "EVENT_ID")]
        event_id: Uuid,
        /// To this destination alone
        #[arg(long, value_name = "NAME")]
        to: Option<String>,
        #[command(flatten)]
        output: Output,
    },
    /// Owe a destination the kept events that it would have had
    Backfill(Backfill),
    /// Look at destinations and change them
    #[command(subcommand)]
    Destinations(Destinations),
    /// Ask the relay on this machine whether it is ready; exit code 0 if it is
    Healthcheck(HealthCheck),
    /// Say whether the signature of a webhook holds, and if not, why
    Verify(Verify),
    /// Print what makes a shell complete these commands
    Completions {
        #[arg(value_name = "SHELL")]
        shell: clap_complete::Shell,
    },
    /// Print the manual page
    Man,
}

#[derive(Args, Default)]
pub struct Output {
    /// Print JSON instead of a table
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct Tail {
    /// Only events whose type matches; * stands for any characters
    #[arg(long = "type", value_name = "PATTERN", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub event_type: Option<String>,
    #[command(flatten)]
    pub output: Output,
}

#[derive(Subcommand)]
pub enum Dead {
    /// List dead letters, the oldest event first
    List {
        #[command(flatten)]
        filter: DeadFilter,
        #[command(flatten)]
        output: Output,
    },
    /// Owe dead letters again; wants a filter or --all
    Replay {
        #[command(flatten)]
        filter: DeadFilter,
        /// All dead letters
        #[arg(long)]
        all: bool,
        /// Change nothing, say how many events it would be
        #[arg(long)]
        dry_run: bool,
        #[command(flatten)]
        output: Output,
    },
    /// Remove dead letters for good; wants a filter or --all
    Purge {
        #[command(flatten)]
        which: Which,
        /// Of events created longer ago than this, such as 7d
        #[arg(long, value_name = "DURATION", value_parser = span)]
        older_than: Option<Duration>,
        /// All dead letters
        #[arg(long)]
        all: bool,
        /// Change nothing, say how many events it would be
        #[arg(long)]
        dry_run: bool,
        #[command(flatten)]
        confirm: Confirm,
        #[command(flatten)]
        output: Output,
    },
}

#[derive(Args, Default)]
pub struct Which {
    /// Of this destination
    #[arg(long, value_name = "NAME", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub destination: Option<String>,
    /// Of events whose type matches; * stands for any characters
    #[arg(long = "type", value_name = "PATTERN", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub event_type: Option<String>,
    /// Whose last error matches, such as '*timeout*'
    #[arg(long, value_name = "PATTERN", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub error: Option<String>,
}

#[derive(Args, Default)]
pub struct DeadFilter {
    #[command(flatten)]
    pub which: Which,
    #[command(flatten)]
    pub created: Created,
    /// At most so many, the oldest first
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..))]
    pub limit: Option<i32>,
}

#[derive(Args, Default)]
pub struct Created {
    /// Of events created then or later: RFC 3339, or a duration back such as 2h or "3 days"
    #[arg(long, value_name = "TIME", value_parser = moment)]
    pub since: Option<SystemTime>,
    /// Of events created before: RFC 3339, or a duration back
    #[arg(long, value_name = "TIME", value_parser = moment)]
    pub until: Option<SystemTime>,
}

#[derive(Args)]
pub struct Confirm {
    /// Don't ask; without a terminal nothing is asked
    #[arg(long, short)]
    pub yes: bool,
}

#[derive(Args)]
pub struct Backfill {
    /// Destination
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Only events whose type matches; * stands for any characters
    #[arg(long = "type", value_name = "PATTERN", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub event_type: Option<String>,
    #[command(flatten)]
    pub created: Created,
    /// At most so many, the oldest first
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..))]
    pub limit: Option<i32>,
    /// Change nothing, say how many events it would be
    #[arg(long)]
    pub dry_run: bool,
    #[command(flatten)]
    pub output: Output,
}

/// A destination by its name.
#[derive(Args)]
pub struct Named {
    /// Destination
    #[arg(value_name = "NAME")]
    pub name: String,
    #[command(flatten)]
    pub output: Output,
}

#[derive(Subcommand)]
pub enum Destinations {
    /// List destinations with their state
    List(Output),
    /// Show a destination, without its secrets
    Show(Named),
    /// Hold back a destination's deliveries
    Pause(Named),
    /// End a pause, a disablement or an open circuit
    Resume(Named),
    /// Send a test event to this destination alone
    Test(Named),
    /// Make a new signing secret and print it, this once
    Rotate {
        #[command(flatten)]
        named: Named,
        /// How long the previous secret signs too
        #[arg(long, value_name = "DURATION", value_parser = span, default_value = "24h")]
        grace: Duration,
    },
    /// Remove a destination with all that it is owed
    Remove {
        #[command(flatten)]
        named: Named,
        #[command(flatten)]
        confirm: Confirm,
    },
    /// Make destinations what a file says; shows the difference, and changes only that
    Apply(Apply),
    /// Print all destinations as such a file, without secrets and hidden values
    Export(Output),
}

#[derive(Args)]
pub struct Apply {
    /// TOML or JSON; - is standard input
    #[arg(long, short, value_name = "FILE")]
    pub file: PathBuf,
    /// Change nothing, say what would change
    #[arg(long)]
    pub dry_run: bool,
    /// Remove the destinations that the file does not hold
    #[arg(long)]
    pub prune: bool,
    #[command(flatten)]
    pub confirm: Confirm,
    #[command(flatten)]
    pub output: Output,
}

#[derive(Args)]
pub struct HealthCheck {
    #[command(flatten)]
    pub listen: Listen,
    #[command(flatten)]
    pub output: Output,
}

#[derive(Args)]
pub struct Verify {
    /// File with the signing secret, whsec_…, or the public key, whpk_…
    #[arg(long, value_name = "FILE")]
    pub secret_file: PathBuf,
    /// File with the request's headers, a line "Name: value" each
    #[arg(long, value_name = "FILE")]
    pub headers: PathBuf,
    /// File with the request's body, byte for byte
    #[arg(long, value_name = "FILE")]
    pub body: PathBuf,
    /// How far the timestamp may be from now
    #[arg(long, value_name = "DURATION", value_parser = span, default_value = "5min")]
    pub tolerance: Duration,
    #[command(flatten)]
    pub output: Output,
}

//! Log lines: which are written and where to. No directive shows what libraries log of what goes over the wire.

use std::io::IsTerminal;
use std::panic::PanicHookInfo;

use tracing::level_filters::LevelFilter;
use tracing::{Level, Metadata};
use tracing_subscriber::filter::{FilterExt, Targets, filter_fn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt, registry};

use crate::cli::LogFormat;
use crate::error::{Error, Result};

/// Our own targets begin with it.
const OURS: &str = "outbox_relay";

/// What `--log-level` says: a level, or directives such as `outbox_relay::trace=debug`, with commas between them. The
/// error shows none of it. lapin writes a line for each connection and channel that ends, each time that the relay tries
/// again; ours say once what is the matter, so its are written only if a directive names it.
pub fn levels(text: &str) -> Result<Targets> {
    let wrong = || {
        Error::Configuration("log_level is neither a level nor a list of directives such as outbox_relay=debug".into())
    };
    let level = |text: &str| !text.is_empty() && text.parse::<LevelFilter>().is_ok();
    let target = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "_:".contains(c));
    let directive = |text: &str| match text.split_once('=') {
        Some((of, to)) => target(of) && level(to),
        None => level(text),
    };
    let text = text.trim();
    match text.split(',').all(|one| directive(one.trim())) {
        true => {
            let given: Targets = text.replace(' ', "").parse().map_err(|_| wrong())?;
            Ok(if text.contains("lapin") { given } else { given.with_target("lapin", LevelFilter::OFF) })
        }
        false => Err(wrong()),
    }
}

pub fn start(format: LogFormat, levels: Targets) {
    let filter = levels.and(filter_fn(may_show));
    // Standard error may be closed: a line that can't be written is no reason to fail.
    let lines = fmt::layer().with_writer(std::io::stderr).log_internal_errors(false);
    match format {
        LogFormat::Json => {
            let lines = lines.json().flatten_event(true).with_current_span(false);
            registry().with(lines.with_filter(filter)).init();
        }
        LogFormat::Text => {
            let lines = lines.with_ansi(std::io::stderr().is_terminal());
            registry().with(lines.with_filter(filter)).init();
        }
    }
    std::panic::set_hook(Box::new(report));
}

/// At their lower levels libraries log what goes over the wire: logins, keys, payloads. lapin logs the body of each
/// returned message at any level.
fn may_show(metadata: &Metadata<'_>) -> bool {
    let target = metadata.target();
    target.starts_with(OURS) || (*metadata.level() <= Level::INFO && !target.starts_with("lapin::returned_messages"))
}

/// A panic's text may quote what it was about, such as a payload: only one that was written as a whole in the code is shown.
fn report(panic: &PanicHookInfo<'_>) {
    let at = panic.location().map(ToString::to_string).unwrap_or_default();
    let message = panic.payload().downcast_ref::<&'static str>().copied().unwrap_or("not shown");
    tracing::error!(at, message, "the relay panicked: please report this");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_or_directives_are_taken() {
        for text in ["info", "DEBUG", " warn ", "outbox_relay::trace=debug", "info, outbox_relay=trace", "off"] {
            assert!(levels(text).is_ok(), "{text}");
        }
    }

    #[test]
    fn lapin_is_shown_only_if_it_is_named() {
        for (text, shown) in
            [("trace", false), ("info,lapin=warn", true), ("lapin::io_loop=error", true), ("off", false)]
        {
            assert_eq!(levels(text).unwrap().would_enable("lapin::io_loop", &Level::ERROR), shown, "{text}");
        }
    }

    #[test]
    fn anything_else_is_refused_and_not_shown() {
        for text in ["amqp://u:hunter2@h", "hunter2", "hunter2=loud", "outbox_relay[x{y=hunter2}]=debug", "", "info,"] {
            let error = levels(text).expect_err(text).to_string();
            assert!(!error.contains("hunter2"), "{error}");
        }
    }
}

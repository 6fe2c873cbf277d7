//! The relay as its users run it: the built binary, configured by its environment, ended by signals.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{ChildStderr, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::broker::Broker;
use crate::cluster::Cluster;
use crate::process::Process;
use crate::{http, scratch, wait};

/// A running relay, which logs JSON. Killed when dropped; while the thread panics, the end of its log is printed first.
pub struct Relay {
    process: Process,
    port: u16,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Relay {
    /// Starts a relay and waits until it is attached. Webhooks may go to loopback addresses.
    pub async fn start(cluster: &Cluster, database: &str, broker: Option<&Broker>) -> Result<Self> {
        Self::with(&cluster.url(database), broker.map(Broker::url).as_deref(), &[]).await
    }

    /// The same with variables of its own, which win.
    pub async fn with(database_url: &str, amqp_url: Option<&str>, variables: &[(&str, &str)]) -> Result<Self> {
        let relay = Self::spawn(database_url, amqp_url, variables)?;
        relay.ready().await?;
        Ok(relay)
    }

    /// Starts another binary, such as that of an older version, and waits until it is attached.
    pub async fn of(binary: &Path, database_url: &str) -> Result<Self> {
        let relay = Self::spawn_as(command_of(binary, Some("KILL")), database_url, None, &[])?;
        relay.ready().await?;
        Ok(relay)
    }

    /// Starts a relay and does not wait: its servers may be away.
    pub fn spawn(database_url: &str, amqp_url: Option<&str>, variables: &[(&str, &str)]) -> Result<Self> {
        Self::spawn_as(command(Some("KILL"))?, database_url, amqp_url, variables)
    }

    fn spawn_as(
        mut command: Command,
        database_url: &str,
        amqp_url: Option<&str>,
        variables: &[(&str, &str)],
    ) -> Result<Self> {
        let port = scratch::free_port()?;
        command.arg("run").env("DATABASE_URL", database_url).env("HTTP_LISTEN", format!("127.0.0.1:{port}"));
        command.env("OUTBOX_LOG_FORMAT", "json").env("OUTBOX_WEBHOOK_ALLOW_NETWORKS", "127.0.0.0/8");
        if let Some(url) = amqp_url {
            command.env("AMQP_URL", url);
        }
        command.envs(variables.iter().copied()).stdout(Stdio::null()).stderr(Stdio::piped());
        let (process, stderr) = Process::adopt("outbox-relay", command)?;
        let lines = Arc::new(Mutex::new(Vec::new()));
        collect(stderr.context("no standard error")?, lines.clone());
        Ok(Relay { process, port, lines })
    }

    /// Waits until it listens and is attached.
    pub async fn ready(&self) -> Result<()> {
        let look = async || {
            if let Some(status) = self.process.status() {
                return Ok(Some(Err(status)));
            }
            let (status, page) = http::get(self.port, "/readyz").await?;
            ensure!(status == 200, "{page}");
            Ok(Some(Ok(())))
        };
        match wait::until("the relay to be ready", wait::LONG, look).await.with_context(|| self.log())? {
            Ok(()) => Ok(()),
            Err(status) => bail!("the relay ended with {status}: {}", self.log()),
        }
    }

    /// SIGTERM, then its exit status.
    pub async fn terminate(&self, limit: Duration) -> Result<ExitStatus> {
        self.process.signal(Signal::SIGTERM);
        self.process.ended(limit).await
    }

    /// SIGKILL: it gets no chance to give anything back.
    pub async fn kill(&self) -> Result<()> {
        self.process.signal(Signal::SIGKILL);
        self.process.ended(wait::LONG).await.map(drop)
    }

    /// Stands still with its connections open, as behind a black hole.
    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    pub fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// Of its pages, on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    pub async fn get(&self, path: &str) -> Result<(u16, String)> {
        http::get(self.port, path).await
    }

    /// The value of a metric without labels, or with just these: `name{a="b"}`.
    pub async fn metric(&self, name: &str) -> Result<f64> {
        let (_, page) = self.get("/metrics").await?;
        let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Ok(line.with_context(|| format!("no metric {name} in\n{page}"))?.trim().parse()?)
    }

    /// All that it logged so far, a JSON object a line.
    pub fn log(&self) -> String {
        self.lines().join("\n")
    }

    pub fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// The lines that are JSON objects.
    pub fn events(&self) -> Vec<Value> {
        self.lines().iter().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Waits until some line of the log contains a text.
    pub async fn logged(&self, text: &str, limit: Duration) -> Result<String> {
        let look = async || Ok(self.lines().into_iter().find(|line| line.contains(text)));
        wait::until(&format!("the relay to log {text:?}"), limit, look).await.with_context(|| self.log())
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let lines = self.lines();
            eprintln!("the end of the relay's log:\n{}", lines[lines.len().saturating_sub(30)..].join("\n"));
        }
    }
}

/// The relay's binary with an environment that holds nothing of its settings.
pub fn command(on_parent_death: Option<&str>) -> Result<Command> {
    Ok(command_of(&binary()?, on_parent_death))
}

fn command_of(binary: &Path, on_parent_death: Option<&str>) -> Command {
    let mut command = Command::new("setpriv");
    if let Some(signal) = on_parent_death {
        command.args(["--pdeathsig", signal]);
    }
    command.arg(binary).stdin(Stdio::null());
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| {
            ["OUTBOX_", "DATABASE_", "AMQP_", "PG"].iter().any(|prefix| name.starts_with(prefix))
                || name == "HTTP_LISTEN"
        }) {
            command.env_remove(name);
        }
    }
    command
}

/// Cargo's target directory holds it beside the tests (or one directory above them).
pub fn binary() -> Result<PathBuf> {
    let current = std::env::current_exe()?;
    let found = current.ancestors().skip(1).take(2).map(|dir| dir.join("outbox-relay")).find(|path| path.is_file());
    found
        .with_context(|| format!("no outbox-relay beside {}: cargo build --release -p outbox-relay", current.display()))
}

/// Reads what the relay writes until it ends.
fn collect(stderr: ChildStderr, lines: Arc<Mutex<Vec<String>>>) {
    std::thread::spawn(move || {
        for line in BufReader::new(stderr).lines().map_while(std::result::Result::ok) {
            lines.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(line);
        }
    });
}

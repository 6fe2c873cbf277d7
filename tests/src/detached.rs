//! Servers that outlive the command which started them, and are known again by later ones.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::wait;

/// A process and what tells it from a later one with the same id.
#[derive(Clone, Serialize, Deserialize)]
pub struct Detached {
    pid: i32,
    identity: String,
}

impl Detached {
    /// Starts the command in a session of its own, with its output appended to a log.
    pub fn start(command: &Command, log: &Path) -> Result<Self> {
        let out = File::options().append(true).create(true).open(log)?;
        let mut detached = Command::new("setsid");
        detached.arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => detached.env(name, value),
                None => detached.env_remove(name),
            };
        }
        detached.current_dir(command.get_current_dir().unwrap_or(Path::new("/")));
        detached.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
        let child = detached.spawn().with_context(|| format!("can't start {:?}", command.get_program()))?;
        let pid = child.id().cast_signed();
        Ok(Detached { pid, identity: identity(pid).context("it ended at once")? })
    }

    pub fn is_alive(&self) -> bool {
        identity(self.pid).is_some_and(|now| now == self.identity)
    }

    /// Signals it, and kills it if it has not ended within the limit. Does nothing to a process that is not it.
    pub fn end(&self, signal: Signal, limit: Duration) {
        for (signal, limit) in [(signal, limit), (Signal::SIGKILL, Duration::from_secs(5))] {
            if !self.is_alive() {
                return;
            }
            let _ = kill(Pid::from_raw(self.pid), signal);
            wait::blocking(limit, || !self.is_alive());
        }
    }
}

/// Which boot of the machine, and when since then the process began; none if it is gone or only waits to be reaped.
fn identity(pid: i32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Field 2, the name, is in parentheses and may hold anything; 3 is the state, 22 the start.
    let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
    let (state, started) = (fields.first()?, fields.get(19)?);
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    (!matches!(*state, "Z" | "X")).then(|| format!("{}/{started}", boot.trim()))
}

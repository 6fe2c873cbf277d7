//! Server processes: started as an unprivileged user, ended with the process that owns them.
//!
//! `setpriv` (util-linux) steps down from root and asks the kernel to signal the server when its parent dies. The
//! kernel means the thread that started it, so a thread that lasts as long as this process starts them all.

use std::fs::File;
use std::io;
use std::os::unix::fs::chown;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Mutex, OnceLock, mpsc};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User, geteuid};

use crate::wait;

/// Who the servers run as: this user, or someone unprivileged when this user is root, whom PostgreSQL refuses.
pub struct Account(Option<User>);

impl Account {
    pub fn of_servers() -> Result<Self> {
        if !geteuid().is_root() {
            return Ok(Account(None));
        }
        for name in ["postgres", "nobody"] {
            if let Some(user) = User::from_name(name)? {
                return Ok(Account(Some(user)));
            }
        }
        bail!("root needs an unprivileged user to run the servers as: neither postgres nor nobody exists")
    }

    /// Makes a file or directory theirs.
    pub fn give(&self, path: &Path) -> Result<()> {
        match &self.0 {
            Some(user) => chown(path, Some(user.uid.as_raw()), Some(user.gid.as_raw()))
                .with_context(|| format!("can't give {} away", path.display())),
            None => Ok(()),
        }
    }

    /// The program, to be run as this account. `on_parent_death` ends it with the process that started it.
    pub fn command(&self, program: impl AsRef<Path>, on_parent_death: Option<Signal>) -> Command {
        let mut command = Command::new("setpriv");
        if let Some(user) = &self.0 {
            command.arg(format!("--reuid={}", user.uid)).arg(format!("--regid={}", user.gid)).arg("--clear-groups");
        }
        if let Some(signal) = on_parent_death {
            command.arg("--pdeathsig").arg(signal.as_str().trim_start_matches("SIG"));
        }
        command.arg(program.as_ref()).stdin(Stdio::null());
        command
    }
}

/// A server of this process. Dropped, it is killed.
pub struct Process {
    name: &'static str,
    child: Mutex<Child>,
}

impl Process {
    /// Starts the command in a process group of its own (Ctrl-C is for the tests, not for their servers).
    pub fn start(name: &'static str, mut command: Command, log: &Path) -> Result<Self> {
        let log = File::options()
            .append(true)
            .create(true)
            .open(log)
            .with_context(|| format!("can't write {}", log.display()))?;
        command.stdout(log.try_clone()?).stderr(log).process_group(0);
        Self::adopt(name, command).map(|(process, _)| process)
    }

    /// Starts the command with its output as prepared by the caller, who gets the pipe of its standard error.
    pub fn adopt(name: &'static str, command: Command) -> Result<(Self, Option<std::process::ChildStderr>)> {
        let mut child = spawn_from_lasting_thread(command).with_context(|| format!("can't start {name}"))?;
        let stderr = child.stderr.take();
        Ok((Process { name, child: Mutex::new(child) }, stderr))
    }

    pub fn pid(&self) -> i32 {
        self.lock().id().cast_signed()
    }

    /// None while it runs.
    pub fn status(&self) -> Option<ExitStatus> {
        self.lock().try_wait().ok().flatten()
    }

    /// Sends a signal, unless it has ended.
    pub fn signal(&self, signal: Signal) {
        let mut child = self.lock();
        // Not waited for yet, so the process id can't be anybody else's.
        if let Ok(None) = child.try_wait() {
            let _ = kill(Pid::from_raw(child.id().cast_signed()), signal);
        }
    }

    /// Waits for its end.
    pub async fn ended(&self, limit: Duration) -> Result<ExitStatus> {
        wait::until(&format!("{} to end", self.name), limit, async || Ok(self.status())).await
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Signals, and kills what has not ended within the limit. For `Drop`.
    pub fn end(&self, signal: Signal, limit: Duration) {
        self.signal(signal);
        if !wait::blocking(limit, || self.status().is_some()) {
            self.signal(Signal::SIGKILL);
            wait::blocking(Duration::from_secs(5), || self.status().is_some());
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end(Signal::SIGKILL, Duration::from_secs(5));
    }
}

/// Runs a command to its end; an error holds what it printed.
pub fn run(mut command: Command) -> Result<Output> {
    let shown = format!("{:?}", command.get_args().collect::<Vec<_>>());
    let output = command.output().with_context(|| format!("can't run {:?} {shown}", command.get_program()))?;
    let printed = [&output.stdout[..], &output.stderr[..]].concat();
    ensure!(
        output.status.success(),
        "{shown} ended with {}: {}",
        output
            .status
            .code()
            .map_or_else(|| format!("signal {:?}", output.status.signal()), |code| format!("code {code}")),
        String::from_utf8_lossy(&printed).trim()
    );
    Ok(output)
}

type Order = (Command, mpsc::Sender<io::Result<Child>>);

fn spawn_from_lasting_thread(command: Command) -> Result<Child> {
    static SPAWNER: OnceLock<mpsc::Sender<Order>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (orders, received) = mpsc::channel::<Order>();
        std::thread::spawn(move || {
            for (mut command, reply) in received {
                let _ = reply.send(command.spawn());
            }
        });
        orders
    });
    let (reply, answer) = mpsc::channel();
    spawner.send((command, reply)).context("the spawning thread is gone")?;
    Ok(answer.recv().context("the spawning thread is gone")??)
}

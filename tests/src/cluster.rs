//! A private PostgreSQL with the extension preloaded, owned by a test.

use std::fs;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::sync::OnceCell;

use crate::postgres::{DataDir, SUPERUSER, default_settings};
use crate::process::{Process, run};
use crate::session::Session;
use crate::{scratch, wait};

/// Sessions report what they did up to 10 s late.
const SILENCE: Duration = Duration::from_secs(15);

/// How `pg_ctl stop -m` names them; `Crash` is SIGKILL of the postmaster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    Smart,
    Fast,
    Immediate,
    Crash,
}

/// A server that is stopped and removed when this is dropped. While the thread panics, its log's end is printed first.
pub struct Cluster {
    server: DataDir,
    settings: Vec<(String, String)>,
    process: Mutex<Option<Arc<Process>>>,
}

impl Cluster {
    /// Starts a server that nobody else uses.
    pub async fn start() -> Result<Self> {
        Self::with(&[]).await
    }

    /// The same with settings of its own, such as `("fsync", "on")`. They win over the defaults.
    pub async fn with(settings: &[(&str, &str)]) -> Result<Self> {
        let server = tokio::task::spawn_blocking(|| template()?.copy_to(scratch::dir("pg")?)).await??;
        let mut all = default_settings(false)?;
        all.extend(settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        let cluster = Cluster { server, settings: all, process: Mutex::default() };
        cluster.resume().await?;
        Ok(cluster)
    }

    /// The server that tests share which stop nothing and change no setting: each takes a `database` of its own. It ends
    /// with this process.
    pub async fn shared() -> Result<&'static Self> {
        static SHARED: OnceCell<Cluster> = OnceCell::const_new();
        SHARED.get_or_try_init(Self::start).await
    }

    /// Creates a database with the extension, whose worker runs, and returns its name.
    pub async fn database(&self) -> Result<String> {
        let name = self.empty_database().await?;
        let session = self.connect(&name).await?;
        session.batch_execute("CREATE EXTENSION pg_outbox").await?;
        session.until("SELECT worker_pid IS NOT NULL FROM outbox.stats()", wait::LONG).await?;
        Ok(name)
    }

    /// Creates a database without the extension, and returns its name.
    pub async fn empty_database(&self) -> Result<String> {
        let name = format!("db_{}", scratch::random_hex(4)?);
        self.connect("postgres").await?.batch_execute(&format!("CREATE DATABASE {name}")).await?;
        Ok(name)
    }

    /// Waits until no transaction has been counted in a database for a while. No session of the caller may be open there.
    pub async fn falls_silent(&self, database: &str) -> Result<()> {
        // From another database, so that these queries are not counted themselves.
        let watcher = self.connect("postgres").await?;
        let count = format!("SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = '{database}'");
        let (mut before, mut since) = (watcher.one::<i64>(&count).await?, Instant::now());
        let started = Instant::now();
        while since.elapsed() < SILENCE {
            ensure!(started.elapsed() < 2 * wait::LONG, "transactions go on: {before} by now");
            tokio::time::sleep(Duration::from_millis(500)).await;
            let now = watcher.one(&count).await?;
            if now != before {
                (before, since) = (now, Instant::now());
            }
        }
        Ok(())
    }

    /// Connects as superuser.
    pub async fn connect(&self, database: &str) -> Result<Session> {
        Session::open(&self.url(database)).await
    }

    pub fn url(&self, database: &str) -> String {
        self.server.url(database)
    }

    pub fn url_as(&self, role: &str, password: &str, database: &str) -> String {
        self.server.url_as(role, password, database)
    }

    /// The superuser and its password.
    pub fn login(&self) -> (String, String) {
        (SUPERUSER.to_owned(), self.server.password.clone())
    }

    pub fn port(&self) -> u16 {
        self.server.port
    }

    /// Where the server's files are; `data` below it is the data directory.
    pub fn dir(&self) -> &std::path::Path {
        &self.server.dir
    }

    /// One of PostgreSQL's own programs (`psql`, `pg_dump`, `pgbench` …) with the connection in its environment.
    pub fn client(&self, program: &str) -> Result<Command> {
        self.server.client(program)
    }

    /// What `psql` prints for some SQL, unaligned and without headings.
    pub fn psql(&self, database: &str, sql: &str) -> Result<String> {
        let mut command = self.client("psql")?;
        command.args(["-XqAt", "-v", "ON_ERROR_STOP=1", "-d", database, "-c", sql]);
        Ok(String::from_utf8(run(command)?.stdout)?.trim_end().to_owned())
    }

    /// Starts the server again and waits until it takes connections.
    pub async fn resume(&self) -> Result<()> {
        let process =
            Arc::new(Process::start("postgres", self.server.server(&self.settings, true)?, &self.server.log())?);
        *self.slot() = Some(process.clone());
        let look = async || {
            if let Some(status) = process.status() {
                return Ok(Some(Err(status)));
            }
            self.connect("postgres").await?.simple_query("SELECT 1").await?;
            Ok(Some(Ok(())))
        };
        match wait::until("PostgreSQL to take connections", wait::LONG, look).await.with_context(|| self.log_tail())? {
            Ok(()) => Ok(()),
            Err(status) => bail!("PostgreSQL ended with {status}:\n{}", self.log_tail()),
        }
    }

    /// Stops the server and waits until it is gone.
    pub async fn stop(&self, how: Stop) -> Result<()> {
        let process = self.slot().clone().context("the server does not run")?;
        process.signal(match how {
            Stop::Smart => Signal::SIGTERM,
            Stop::Fast => Signal::SIGINT,
            Stop::Immediate => Signal::SIGQUIT,
            Stop::Crash => Signal::SIGKILL,
        });
        process.ended(wait::LONG).await.with_context(|| self.log_tail())?;
        // After a crash the children notice by themselves; the next server refuses to start before.
        let children_gone = async || Ok(self.children_of(process.pid())?.is_empty().then_some(()));
        wait::until("PostgreSQL's children to end", wait::LONG, children_gone).await?;
        *self.slot() = None;
        Ok(())
    }

    pub async fn restart(&self, how: Stop) -> Result<()> {
        self.stop(how).await?;
        self.resume().await
    }

    /// Signals one process of this server, named by `pg_stat_activity.pid`; an error if it is not one.
    pub fn signal(&self, pid: i32, signal: Signal) -> Result<()> {
        let postmaster = self.postmaster()?;
        match pid == postmaster || self.children_of(postmaster)?.contains(&pid) {
            true => Ok(kill(Pid::from_raw(pid), signal)?),
            false => Err(anyhow!("process {pid} is not one of this server")),
        }
    }

    pub fn postmaster(&self) -> Result<i32> {
        self.slot().as_ref().map(|process| process.pid()).context("the server does not run")
    }

    pub fn log(&self) -> String {
        fs::read(self.server.log()).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    fn log_tail(&self) -> String {
        format!("the end of PostgreSQL's log:\n{}", scratch::tail(&self.server.log(), 30))
    }

    fn slot(&self) -> std::sync::MutexGuard<'_, Option<Arc<Process>>> {
        self.process.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Processes that run in this data directory under that parent, or that it left behind.
    fn children_of(&self, postmaster: i32) -> Result<Vec<i32>> {
        let data = self.server.data();
        let pids = fs::read_dir("/proc")?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        Ok(pids
            .filter(|pid| *pid != postmaster && fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == data))
            .collect())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.log_tail());
        }
        if let Some(process) = self.slot().take() {
            process.end(Signal::SIGQUIT, Duration::from_secs(10));
        }
        let _ = fs::remove_dir_all(&self.server.dir);
    }
}

/// One initialised data directory for all clusters of this process: copying it takes a tenth of `initdb`'s time.
fn template() -> Result<&'static DataDir> {
    static TEMPLATE: std::sync::OnceLock<Result<DataDir, String>> = std::sync::OnceLock::new();
    TEMPLATE
        .get_or_init(|| scratch::dir("template").and_then(DataDir::init).map_err(|error| format!("{error:#}")))
        .as_ref()
        .map_err(|error| anyhow!("{error}"))
}

//! A PostgreSQL installation and a data directory: what has to be run, and how it is reached. `cluster` owns the
//! running server of a test, `dev` those that are left running.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use crate::process::{Account, run};
use crate::scratch;

/// The superuser of private clusters.
pub const SUPERUSER: &str = "postgres";

/// The server that `scripts/pg_config.sh` chooses.
pub struct Installation {
    pub bindir: PathBuf,
    pub pkglibdir: PathBuf,
    pub major: u32,
    /// It was built with TLS.
    pub tls: bool,
}

impl Installation {
    pub fn get() -> Result<&'static Self> {
        static FOUND: OnceLock<Result<Installation, String>> = OnceLock::new();
        FOUND
            .get_or_init(|| Self::find().map_err(|error| format!("{error:#}")))
            .as_ref()
            .map_err(|error| anyhow!("{error}"))
    }

    fn find() -> Result<Self> {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/pg_config.sh");
        let pg_config = PathBuf::from(String::from_utf8(run(Command::new(script))?.stdout)?.trim());
        let ask = |option: &str| -> Result<String> {
            let mut command = Command::new(&pg_config);
            command.arg(option);
            Ok(String::from_utf8(run(command)?.stdout)?.trim().to_owned())
        };
        let version = ask("--version")?;
        let major =
            version.trim_start_matches("PostgreSQL ").split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
        Ok(Installation {
            bindir: ask("--bindir")?.into(),
            pkglibdir: ask("--pkglibdir")?.into(),
            major: major.parse().with_context(|| format!("not a version: {version}"))?,
            tls: ask("--configure")?.contains("ssl"),
        })
    }

    pub fn has_library(&self, name: &str) -> bool {
        self.pkglibdir.join(format!("{name}.so")).exists()
    }
}

/// Where a server's data is, and how it is reached.
#[derive(Clone, Serialize, Deserialize)]
pub struct DataDir {
    pub dir: PathBuf,
    pub port: u16,
    pub password: String,
}

impl DataDir {
    /// Initialises a cluster in `dir`, which exists and belongs to the account of the servers. Passwords are asked for
    /// on every connection, so that no other user of this machine gets in.
    pub fn init(dir: PathBuf) -> Result<Self> {
        let account = Account::of_servers()?;
        let password = scratch::random_hex(16)?;
        let file = dir.join("password");
        fs::write(&file, &password)?;
        fs::set_permissions(&file, Permissions::from_mode(0o600))?;
        account.give(&file)?;
        let mut initdb = account.command(Installation::get()?.bindir.join("initdb"), None);
        initdb.args(["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync"]);
        initdb.arg(format!("--username={SUPERUSER}")).arg("--pwfile").arg(&file).arg("-D").arg(dir.join("data"));
        run(Self::at(&dir, initdb))?;
        Ok(DataDir { dir, port: scratch::free_port()?, password })
    }

    /// A copy, with a port of its own, of one whose server does not run.
    pub fn copy_to(&self, dir: PathBuf) -> Result<Self> {
        let mut copy = Account::of_servers()?.command("/bin/cp", None);
        copy.arg("-a").arg("--reflink=auto").arg(self.data()).arg(&dir);
        run(Self::at(&dir, copy))?;
        Ok(DataDir { dir, port: scratch::free_port()?, password: self.password.clone() })
    }

    /// The server in the foreground. The postmaster takes SIGQUIT for an immediate shutdown of all its children.
    pub fn server(&self, settings: &[(String, String)], owned: bool) -> Result<Command> {
        let program = Installation::get()?.bindir.join("postgres");
        let mut command = Account::of_servers()?.command(program, owned.then_some(Signal::SIGQUIT));
        command.arg("-D").arg(self.data()).arg("-p").arg(self.port.to_string());
        command.arg("-k").arg(&self.dir).args(["-c", "listen_addresses=127.0.0.1"]);
        for (name, value) in settings {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        Ok(Self::at(&self.dir, command))
    }

    /// One of PostgreSQL's programs, connecting here unless its arguments say otherwise.
    pub fn client(&self, program: &str) -> Result<Command> {
        let mut command = Account::of_servers()?.command(Installation::get()?.bindir.join(program), None);
        command.env("PGHOST", "127.0.0.1").env("PGPORT", self.port.to_string()).env("PGUSER", SUPERUSER);
        command.env("PGPASSWORD", &self.password).env("PGCONNECT_TIMEOUT", "10");
        Ok(Self::at(&self.dir, command))
    }

    pub fn url(&self, database: &str) -> String {
        self.url_as(SUPERUSER, &self.password, database)
    }

    pub fn url_as(&self, role: &str, password: &str, database: &str) -> String {
        format!("postgres://{role}:{password}@127.0.0.1:{}/{database}", self.port)
    }

    pub fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    pub fn log(&self) -> PathBuf {
        self.dir.join("postgres.log")
    }

    fn at(dir: &Path, mut command: Command) -> Command {
        command.current_dir(dir).env("HOME", dir).env("LC_ALL", "C.UTF-8").env("TZ", "UTC");
        command
    }
}

/// What every private server is started with: quick, and with the extension preloaded.
pub fn default_settings(durable: bool) -> Result<Vec<(String, String)>> {
    let preload = match Installation::get()?.has_library("pg_stat_statements") {
        true => "pg_outbox,pg_stat_statements",
        false => "pg_outbox",
    };
    let on_off = |on: bool| if on { "on" } else { "off" };
    let settings = [
        ("shared_preload_libraries", preload),
        ("max_prepared_transactions", "10"),
        ("max_connections", "300"),
        // One for each test's database on the server that they share.
        ("max_worker_processes", "700"),
        ("wal_level", "replica"),
        ("log_min_messages", "info"),
        ("log_line_prefix", "%m [%p] %b %d "),
        ("fsync", on_off(durable)),
        // A test that waits for a lock for ever fails instead.
        ("statement_timeout", "300s"),
    ];
    Ok(settings.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec())
}

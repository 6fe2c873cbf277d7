//! A private PgBouncer in front of a cluster, owned by a test.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;

use crate::cluster::Cluster;
use crate::process::{Account, Process};
use crate::session::Session;
use crate::{scratch, wait};

/// Where Debian installs it.
const PROGRAM: &str = "/usr/sbin/pgbouncer";

/// Ended and removed when dropped.
pub struct Pool {
    dir: PathBuf,
    port: u16,
    password: String,
    user: String,
    _process: Process,
}

impl Pool {
    /// `mode` is PgBouncer's `pool_mode`; `size` is how many sessions of the server it may use.
    pub async fn start(cluster: &Cluster, mode: &str, size: u16) -> Result<Self> {
        let dir = scratch::dir("pool")?;
        let port = scratch::free_port()?;
        let (user, password) = cluster.login();
        let write = |name: &str, text: &str| -> Result<PathBuf> {
            let file = dir.join(name);
            fs::write(&file, text)?;
            Account::of_servers()?.give(&file)?;
            Ok(file)
        };
        let users = write("users", &format!("\"{user}\" \"{password}\"\n"))?;
        let settings = write(
            "pool.ini",
            &format!(
                "[databases]\n* = host=127.0.0.1 port={}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n\
                 unix_socket_dir =\nauth_type = scram-sha-256\nauth_file = {}\npool_mode = {mode}\n\
                 default_pool_size = {size}\nmin_pool_size = 0\nreserve_pool_size = 0\n",
                cluster.port(),
                users.display()
            ),
        )?;
        let mut command = Account::of_servers()?.command(PROGRAM, Some(Signal::SIGKILL));
        command.arg("--quiet").arg(settings).current_dir(&dir);
        let process = Process::start("pgbouncer", command, &dir.join("pool.log"))?;
        let pool = Pool { dir, port, password, user, _process: process };
        let look = async || Ok(Session::open(&pool.url("postgres")).await.map(Some)?);
        wait::until("PgBouncer to take connections", wait::LONG, look)
            .await
            .with_context(|| scratch::tail(&pool.dir.join("pool.log"), 20))?;
        Ok(pool)
    }

    pub fn url(&self, database: &str) -> String {
        format!("postgres://{}:{}@127.0.0.1:{}/{database}", self.user, self.password, self.port)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

//! A RabbitMQ node of its own: its directory, name, ports, cookie and password. `broker` owns the running node of a
//! test, `dev` the one that is left running.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use crate::process::{Account, run};
use crate::scratch;

/// The scripts themselves: those in `/usr/sbin` insist on the system's user and files.
const SCRIPTS: &str = "/usr/lib/rabbitmq/bin";

pub const USER: &str = "outbox";

/// Schedulers that don't spin: the tests share two cores.
const ERLANG: &str = "+S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none -noinput +B i";

#[derive(Clone, Serialize, Deserialize)]
pub struct Node {
    pub dir: PathBuf,
    pub port: u16,
    dist_port: u16,
    epmd_port: u16,
    password: String,
    cookie: String,
}

impl Node {
    /// Lays a node out in `dir`, which exists and belongs to the account of the servers. `more` are further lines of its
    /// configuration.
    pub fn init(dir: PathBuf, more: &str) -> Result<Self> {
        let epmd_port = scratch::free_port()?;
        Self::with(dir, more, epmd_port, scratch::random_hex(16)?, scratch::random_hex(20)?)
    }

    /// One that may join a cluster with this one, whose port mapper it uses.
    pub fn beside(&self, dir: PathBuf) -> Result<Self> {
        Self::with(dir, "", self.epmd_port, self.password.clone(), self.cookie.clone())
    }

    fn with(dir: PathBuf, more: &str, epmd_port: u16, password: String, cookie: String) -> Result<Self> {
        let (port, dist_port) = (scratch::free_port()?, scratch::free_port()?);
        let node = Node { dir, port, dist_port, epmd_port, password, cookie };
        let configuration = format!(
            "listeners.tcp.1 = 127.0.0.1:{}\ndefault_user = {USER}\ndefault_pass = {}\nloopback_users = none\ndisk_free_limit.absolute = 10MB\n{more}\n",
            node.port, node.password
        );
        node.write("rabbitmq.conf", &configuration)?;
        node.write("enabled_plugins", "[].\n")?;
        node.write(".erlang.cookie", &node.cookie)?;
        Ok(node)
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let file = self.dir.join(name);
        fs::write(&file, text).with_context(|| format!("can't write {}", file.display()))?;
        fs::set_permissions(&file, Permissions::from_mode(0o400))?;
        Account::of_servers()?.give(&file)
    }

    /// Erlang's port mapper, which the node and its tools need, in the foreground.
    pub fn port_mapper(&self, owned: bool) -> Result<Command> {
        let mut command = Account::of_servers()?.command("epmd", owned.then_some(Signal::SIGKILL));
        command.arg("-port").arg(self.epmd_port.to_string()).args(["-address", "127.0.0.1"]);
        Ok(self.environment(command))
    }

    /// The node in the foreground. The script replaces itself by the Erlang machine, which stops cleanly at SIGTERM.
    pub fn server(&self, owned: bool) -> Result<Command> {
        let mut command = Account::of_servers()?
            .command(Path::new(SCRIPTS).join("rabbitmq-server"), owned.then_some(Signal::SIGKILL));
        command.env("RABBITMQ_ALLOW_INPUT", "1").env("RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS", ERLANG);
        Ok(self.environment(command))
    }

    /// Runs one of `rabbitmqctl`'s commands and returns what it prints.
    pub fn ctl(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Account::of_servers()?.command(Path::new(SCRIPTS).join("rabbitmqctl"), None);
        command.arg("--quiet").args(arguments);
        Ok(String::from_utf8(run(self.environment(command))?.stdout)?.trim_end().to_owned())
    }

    pub fn url(&self, vhost: &str) -> String {
        self.url_as(USER, &self.password, vhost)
    }

    pub fn url_as(&self, user: &str, password: &str, vhost: &str) -> String {
        format!("amqp://{user}:{password}@127.0.0.1:{}/{}", self.port, vhost.replace('/', "%2f"))
    }

    /// What the nodes of a cluster call it.
    pub fn name(&self) -> String {
        format!("outbox{}@localhost", self.port)
    }

    pub fn log(&self) -> PathBuf {
        self.dir.join("rabbitmq.log")
    }

    fn environment(&self, mut command: Command) -> Command {
        let file = |name: &str| self.dir.join(name);
        command.current_dir(&self.dir).env("HOME", &self.dir).env("LC_ALL", "C.UTF-8");
        command.env("ERL_EPMD_PORT", self.epmd_port.to_string()).env("ERL_EPMD_ADDRESS", "127.0.0.1");
        command.env("RABBITMQ_NODENAME", self.name());
        command.env("RABBITMQ_NODE_PORT", self.port.to_string()).env("RABBITMQ_NODE_IP_ADDRESS", "127.0.0.1");
        command.env("RABBITMQ_DIST_PORT", self.dist_port.to_string());
        command.env("RABBITMQ_CONF_ENV_FILE", file("none.conf")).env("RABBITMQ_CONFIG_FILE", file("rabbitmq.conf"));
        command.env("RABBITMQ_ADVANCED_CONFIG_FILE", file("advanced.config"));
        command.env("RABBITMQ_ENABLED_PLUGINS_FILE", file("enabled_plugins"));
        command.env("RABBITMQ_MNESIA_BASE", file("mnesia")).env("RABBITMQ_LOG_BASE", file("log"));
        command.env("RABBITMQ_LOGS", "-").env("RABBITMQ_PID_FILE", file("rabbitmq.pid"));
        command
    }
}

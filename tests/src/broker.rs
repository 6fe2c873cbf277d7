//! A private RabbitMQ, owned by a test or shared by many, each in a virtual host of its own.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use tokio::sync::OnceCell;

use crate::process::Process;
use crate::queue::Channel;
use crate::rabbit::{Node, USER};
use crate::{scratch, wait};

/// A virtual host of a running node.
pub struct Broker {
    node: Arc<Running>,
    pub vhost: String,
}

/// A node that is killed and removed when the last broker in it is dropped.
struct Running {
    node: Node,
    server: Mutex<Option<Arc<Process>>>,
    /// None: it uses that of the node which it joined.
    port_mapper: Option<Process>,
    /// Outlives it.
    joined: Option<Arc<Running>>,
}

impl Broker {
    /// A node that nobody else uses, for tests that stop or block it. Takes some seconds.
    pub async fn own() -> Result<Self> {
        Self::with("").await
    }

    /// The same with lines of its own in `rabbitmq.conf`.
    pub async fn with(configuration: &str) -> Result<Self> {
        Ok(Broker { node: Arc::new(Running::start(configuration).await?), vhost: "/".into() })
    }

    /// A second node that forms a cluster with this one.
    pub async fn joined_by_another(&self) -> Result<Self> {
        let node = self.node.node.beside(scratch::dir("mq")?)?;
        let running = Running { node, server: Mutex::default(), port_mapper: None, joined: Some(self.node.clone()) };
        running.resume().await?;
        let other = Broker { node: Arc::new(running), vhost: self.vhost.clone() };
        other.stop_app().await?;
        other.ctl(&["join_cluster", &self.node.node.name()]).await?;
        other.start_app().await?;
        Ok(other)
    }

    /// A new virtual host of the node that tests share.
    pub async fn shared() -> Result<Self> {
        static SHARED: OnceCell<Arc<Running>> = OnceCell::const_new();
        let node = SHARED.get_or_try_init(async || Running::start("").await.map(Arc::new)).await?.clone();
        let vhost = format!("v{}", scratch::random_hex(4)?);
        let broker = Broker { node, vhost };
        broker.evaluate(&format!(
            "rabbit_vhost:add(<<\"{0}\">>, <<\"test\">>), rabbit_auth_backend_internal:set_permissions(<<\"{USER}\">>, <<\"{0}\">>, <<\".*\">>, <<\".*\">>, <<\".*\">>, <<\"test\">>).",
            broker.vhost
        )).await?;
        Ok(broker)
    }

    pub fn url(&self) -> String {
        self.node.node.url(&self.vhost)
    }

    pub fn url_as(&self, user: &str, password: &str) -> String {
        self.node.node.url_as(user, password, &self.vhost)
    }

    pub fn port(&self) -> u16 {
        self.node.node.port
    }

    /// Opens a channel to declare, bind, consume and publish with.
    pub async fn channel(&self) -> Result<Channel> {
        Channel::open(&self.url()).await
    }

    /// Runs `rabbitmqctl`, which takes about a second.
    pub async fn ctl(&self, arguments: &[&str]) -> Result<String> {
        let node = self.node.node.clone();
        let arguments: Vec<String> = arguments.iter().map(|&argument| argument.to_owned()).collect();
        tokio::task::spawn_blocking(move || node.ctl(&arguments.iter().map(String::as_str).collect::<Vec<_>>())).await?
    }

    /// Evaluates an Erlang expression in the node.
    pub async fn evaluate(&self, expression: &str) -> Result<String> {
        self.ctl(&["eval", expression]).await
    }

    /// Closes all connections and takes no new ones; what is durable stays.
    pub async fn stop_app(&self) -> Result<()> {
        self.ctl(&["stop_app"]).await.map(drop)
    }

    pub async fn start_app(&self) -> Result<()> {
        self.ctl(&["start_app"]).await?;
        self.node.ready().await
    }

    /// Ends the node's process: cleanly, or as if the power had failed.
    pub async fn stop(&self, cleanly: bool) -> Result<()> {
        let server = self.node.slot().take().context("the broker does not run")?;
        server.signal(if cleanly { Signal::SIGTERM } else { Signal::SIGKILL });
        server.ended(wait::LONG).await.map(drop)
    }

    /// Starts it again, with the same ports.
    pub async fn resume(&self) -> Result<()> {
        self.node.resume().await
    }

    /// The node stands still, so that nothing answers while its connections stay open: a black hole.
    pub fn freeze(&self) {
        self.node.signal(Signal::SIGSTOP);
    }

    pub fn thaw(&self) {
        self.node.signal(Signal::SIGCONT);
    }
}

impl Running {
    async fn start(configuration: &str) -> Result<Self> {
        let node = Node::init(scratch::dir("mq")?, configuration)?;
        let port_mapper = Process::start("epmd", node.port_mapper(true)?, &node.log())?;
        let running = Running { node, server: Mutex::default(), port_mapper: Some(port_mapper), joined: None };
        running.resume().await?;
        Ok(running)
    }

    async fn resume(&self) -> Result<()> {
        let server = Process::start("rabbitmq", self.node.server(true)?, &self.node.log())?;
        *self.slot() = Some(Arc::new(server));
        self.ready().await
    }

    /// Waits until a client can log in.
    async fn ready(&self) -> Result<()> {
        let server = self.slot().clone().context("the broker does not run")?;
        let url = self.node.url("/");
        let look = async || match server.status() {
            Some(status) => Ok(Some(Err(status))),
            None => Channel::open(&url).await.map(|_| Some(Ok(()))),
        };
        let limit = wait::LONG + Duration::from_secs(60);
        match wait::until("RabbitMQ to take connections", limit, look).await.with_context(|| self.log_tail())? {
            Ok(()) => Ok(()),
            Err(status) => bail!("RabbitMQ ended with {status}: {}", self.log_tail()),
        }
    }

    fn signal(&self, signal: Signal) {
        if let Some(server) = &*self.slot() {
            server.signal(signal);
        }
    }

    fn slot(&self) -> std::sync::MutexGuard<'_, Option<Arc<Process>>> {
        self.server.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn log_tail(&self) -> String {
        format!("the end of RabbitMQ's log:\n{}", scratch::tail(&self.node.log(), 30))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(server) = self.slot().take() {
            server.end(Signal::SIGKILL, Duration::from_secs(5));
        }
        if let Some(port_mapper) = &self.port_mapper {
            port_mapper.end(Signal::SIGKILL, Duration::from_secs(5));
        }
        self.joined = None;
        let _ = std::fs::remove_dir_all(&self.node.dir);
    }
}

//! `make up` and `make down`: a private PostgreSQL with the extension, a RabbitMQ and relays, left running.
//!
//! All of it is recorded in `.dev`. `up` starts what is not running, so twice is harmless; `down` ends just these
//! processes and removes `.dev` with the data.

use std::fs::{self, DirBuilder, File, Permissions};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use outbox_tests::detached::Detached;
use outbox_tests::postgres::{DataDir, default_settings};
use outbox_tests::process::{Account, run};
use outbox_tests::queue::Channel;
use outbox_tests::rabbit::Node;
use outbox_tests::session::Session;
use outbox_tests::wait::{self, LONG};
use outbox_tests::{http, relay, scratch};
use serde::{Deserialize, Serialize};

const DIR: &str = ".dev";
const DATABASE: &str = "outbox";

/// A Unix socket's path holds 107 bytes; PostgreSQL's is `…/postgres/.s.PGSQL.12345`.
const LONGEST_DIR: usize = 75;

#[derive(Serialize, Deserialize)]
struct Servers {
    /// Where the data is: in `.dev` if the account of the servers can reach it.
    data: PathBuf,
    postgres: DataDir,
    rabbit: Node,
    http_ports: Vec<u16>,
    running: Running,
}

#[derive(Default, Serialize, Deserialize)]
struct Running {
    postgres: Option<Detached>,
    port_mapper: Option<Detached>,
    rabbit: Option<Detached>,
    relays: Vec<Option<Detached>>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let done = match std::env::args().nth(1).as_deref() {
        Some("up") => up().await,
        Some("down") => down(),
        _ => Err(anyhow::anyhow!("usage: dev up | down")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dev: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// One command at a time.
fn lock() -> Result<File> {
    let here = File::open(".")?;
    here.lock()?;
    Ok(here)
}

async fn up() -> Result<()> {
    let _lock = lock()?;
    let relays: usize = match std::env::var("RELAYS").ok().filter(|text| !text.is_empty()) {
        Some(text) => text.parse().with_context(|| format!("RELAYS must be a number, not {text:?}"))?,
        None => 1,
    };
    let mut servers = if Path::new(DIR).join("servers.json").exists() { Servers::load()? } else { Servers::create()? };
    let started = servers.start(relays).await;
    // Also when something failed: down must know what runs.
    servers.save()?;
    started?;
    servers.write_env()?;
    println!("{}", fs::read_to_string(Path::new(DIR).join("env"))?.trim_end());
    println!("# . {DIR}/env; relays: {relays}; logs in {DIR}; make down ends it all");
    Ok(())
}

fn down() -> Result<()> {
    let _lock = lock()?;
    if !Path::new(DIR).exists() {
        println!("nothing is up");
        return Ok(());
    }
    if Path::new(DIR).join("servers.json").exists() {
        let servers = Servers::load()?;
        servers.end();
        fs::remove_dir_all(&servers.data).or_else(gone_already)?;
    }
    fs::remove_dir_all(DIR).with_context(|| format!("can't remove {DIR}"))
}

fn gone_already(error: std::io::Error) -> std::io::Result<()> {
    if error.kind() == std::io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}

impl Servers {
    fn create() -> Result<Self> {
        fs::create_dir_all(DIR)?;
        let data = data_dir()?;
        let own = |name: &str| scratch::private_dir(&data.join(name)).map(|()| data.join(name));
        let postgres = DataDir::init(own("postgres")?)?;
        let rabbit = Node::init(own("rabbitmq")?, "")?;
        let servers = Servers { data, postgres, rabbit, http_ports: Vec::new(), running: Running::default() };
        servers.save()?;
        Ok(servers)
    }

    fn load() -> Result<Self> {
        let file = Path::new(DIR).join("servers.json");
        let text = fs::read_to_string(&file)?;
        serde_json::from_str(&text).with_context(|| format!("can't read {}", file.display()))
    }

    fn save(&self) -> Result<()> {
        write_private("servers.json", &serde_json::to_string_pretty(self)?)
    }

    /// Starts what does not run, and ends relays that are too many.
    async fn start(&mut self, relays: usize) -> Result<()> {
        let running = &mut self.running;
        if !alive(&running.port_mapper) {
            running.port_mapper = Some(Detached::start(&self.rabbit.port_mapper(false)?, &self.rabbit.log())?);
        }
        if !alive(&running.rabbit) {
            running.rabbit = Some(Detached::start(&self.rabbit.server(false)?, &self.rabbit.log())?);
        }
        if !alive(&running.postgres) {
            let settings = default_settings(true)?;
            running.postgres = Some(Detached::start(&self.postgres.server(&settings, false)?, &self.postgres.log())?);
        }
        self.database_ready().await.with_context(|| scratch::tail(&self.postgres.log(), 15))?;
        self.rabbit_ready().await.with_context(|| scratch::tail(&self.rabbit.log(), 15))?;
        while self.http_ports.len() < relays.max(1) {
            self.http_ports.push(scratch::free_port()?);
        }
        while self.running.relays.len() > relays {
            end(&self.running.relays.pop().flatten(), Signal::SIGTERM);
        }
        self.running.relays.resize_with(relays, || None);
        for number in 0..relays {
            self.start_relay(number).await?;
        }
        Ok(())
    }

    async fn database_ready(&self) -> Result<()> {
        let look = async || {
            ensure!(alive(&self.running.postgres), "PostgreSQL has ended");
            Ok(Some(Session::open(&self.postgres.url("postgres")).await?))
        };
        let session = wait::until("PostgreSQL", LONG, look).await?;
        if !session
            .one::<bool>(&format!("SELECT EXISTS (SELECT FROM pg_database WHERE datname = '{DATABASE}')"))
            .await?
        {
            session.batch_execute(&format!("CREATE DATABASE {DATABASE}")).await?;
        }
        let session = Session::open(&self.postgres.url(DATABASE)).await?;
        session.batch_execute("SET client_min_messages = warning; CREATE EXTENSION IF NOT EXISTS pg_outbox").await?;
        session.until("SELECT worker_pid IS NOT NULL FROM outbox.stats()", LONG).await
    }

    async fn rabbit_ready(&self) -> Result<()> {
        let url = self.rabbit.url("/");
        let look = async || {
            ensure!(alive(&self.running.rabbit), "RabbitMQ has ended");
            Ok(Some(Channel::open(&url).await?))
        };
        wait::until("RabbitMQ", LONG + LONG, look).await.map(drop)
    }

    async fn start_relay(&mut self, number: usize) -> Result<()> {
        let port = self.http_ports[number];
        let log = Path::new(DIR).join(format!("relay-{}.log", number + 1));
        if !alive(&self.running.relays[number]) {
            let mut command = relay::command(None)?;
            command.arg("run").envs(self.variables(port)).current_dir(std::env::current_dir()?);
            self.running.relays[number] = Some(Detached::start(&command, &log)?);
        }
        let process = &self.running.relays[number];
        let look = async || {
            ensure!(alive(process), "the relay has ended");
            Ok((http::get(port, "/readyz").await?.0 == 200).then_some(()))
        };
        wait::until("the relay", LONG, look).await.with_context(|| scratch::tail(&log, 15))
    }

    fn variables(&self, http_port: u16) -> [(&'static str, String); 3] {
        [
            ("DATABASE_URL", self.postgres.url(DATABASE)),
            ("AMQP_URL", self.rabbit.url("/")),
            ("HTTP_LISTEN", format!("127.0.0.1:{http_port}")),
        ]
    }

    /// No value holds a character that a shell would take for its own.
    fn write_env(&self) -> Result<()> {
        let variables = self.variables(self.http_ports[0]);
        let lines: String = variables.iter().map(|(name, value)| format!("{name}={value}\n")).collect();
        write_private("env", &format!("{lines}export {}\n", variables.map(|(name, _)| name).join(" ")))
    }

    fn end(&self) {
        let running = &self.running;
        running.relays.iter().for_each(|relay| end(relay, Signal::SIGTERM));
        end(&running.rabbit, Signal::SIGTERM);
        end(&running.port_mapper, Signal::SIGTERM);
        end(&running.postgres, Signal::SIGINT);
    }
}

fn alive(process: &Option<Detached>) -> bool {
    process.as_ref().is_some_and(Detached::is_alive)
}

fn end(process: &Option<Detached>, signal: Signal) {
    if let Some(process) = process {
        process.end(signal, Duration::from_secs(40));
    }
}

/// A file of `.dev` that holds passwords.
fn write_private(name: &str, text: &str) -> Result<()> {
    let (file, new) = (Path::new(DIR).join(name), Path::new(DIR).join(format!("{name}.new")));
    fs::write(&new, "")?;
    fs::set_permissions(&new, Permissions::from_mode(0o600))?;
    fs::write(&new, text)?;
    fs::rename(&new, &file).with_context(|| format!("can't write {}", file.display()))
}

/// `.dev/data`, or a directory in `/var/tmp` when the servers' account can't get there or the path doesn't suit them.
fn data_dir() -> Result<PathBuf> {
    let here = std::env::current_dir()?.join(DIR);
    let plain = here.to_str().is_some_and(|path| path.bytes().all(|byte| byte.is_ascii_graphic()));
    let mut test = Account::of_servers()?.command("/usr/bin/test", None);
    test.arg("-x").arg(&here).current_dir("/");
    let dir = match plain && here.as_os_str().len() <= LONGEST_DIR && run(test).is_ok() {
        true => here.join("data"),
        false => PathBuf::from(format!("/var/tmp/outbox-{}", scratch::random_hex(6)?)),
    };
    match DirBuilder::new().mode(0o711).create(&dir) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            bail!("{} is left over: make down removes it", dir.display())
        }
        created => created.map(|()| dir.clone()).with_context(|| format!("can't create {}", dir.display())),
    }
}

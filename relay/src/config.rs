//! The configuration, from flags, environment and file, checked as a whole. An error is one line and shows no password.

use std::collections::BTreeMap;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use tracing_subscriber::filter::Targets;

use crate::amqp_url::AmqpUrl;
use crate::cli::{Access, Listen, LogFormat, Options};
use crate::error::{Error, Result};
use crate::logging;
use crate::pattern::Patterns;
use crate::postgres::{self, ConnInfo, Variables};
use crate::spans;

pub struct Config {
    pub database: ConnInfo,
    /// The brokers, each of another name.
    pub amqp: Vec<Amqp>,
    pub webhook_allow_networks: Vec<String>,
    /// May hold a password.
    pub webhook_proxy: Option<String>,
    pub webhook_ca_cert: Option<PathBuf>,
    pub webhook_https_only: bool,
    /// Which destinations to serve.
    pub destinations: Patterns,
    /// How many destinations have metrics of their own.
    pub metrics_destinations: usize,
    pub http_listen: SocketAddr,
    pub ui: Option<Ui>,
    pub consumer: String,
    pub tuning: Tuning,
    pub grace_period: Duration,
    pub log_format: LogFormat,
    pub log_levels: Targets,
    /// Where spans go, by the environment alone.
    pub spans: Option<spans::Settings>,
}

/// The broker that an address without a name is of.
pub const BROKER: &str = "default";

/// Where a RabbitMQ is, and the files of `amqps`.
#[derive(Clone)]
pub struct Amqp {
    /// As `settings.broker` names it.
    pub name: Arc<str>,
    pub url: AmqpUrl,
    pub ca_cert: Option<PathBuf>,
    pub client_cert: Option<PathBuf>,
    pub client_key: Option<PathBuf>,
}

/// The page for operators.
pub struct Ui {
    pub password: String,
    /// Names by which it is reached, besides addresses and localhost.
    pub hosts: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuning {
    /// Deliveries of one destination.
    pub max_in_flight: usize,
    /// Events of the whole relay.
    pub max_events_in_flight: usize,
    /// Payloads of the whole relay.
    pub max_bytes_in_flight: usize,
    pub claim_batch: usize,
    pub lease: Duration,
}

/// The file's keys: the names of the flags, with underscores.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    database_url: Option<String>,
    database_url_file: Option<PathBuf>,
    amqp_url: Option<String>,
    amqp_url_file: Option<PathBuf>,
    /// URLs by name.
    amqp: Option<BTreeMap<String, String>>,
    amqp_ca_cert: Option<PathBuf>,
    amqp_client_cert: Option<PathBuf>,
    amqp_client_key: Option<PathBuf>,
    http_listen: Option<String>,
    ui_password: Option<String>,
    ui_password_file: Option<PathBuf>,
    ui_hosts: Option<Vec<String>>,
    consumer: Option<String>,
    max_in_flight: Option<usize>,
    max_events_in_flight: Option<usize>,
    max_bytes_in_flight: Option<usize>,
    claim_batch: Option<usize>,
    lease: Option<u64>,
    grace_period: Option<u64>,
    webhook_allow_networks: Option<Vec<String>>,
    webhook_proxy: Option<String>,
    webhook_ca_cert: Option<PathBuf>,
    webhook_https_only: Option<bool>,
    destinations: Option<Vec<String>>,
    metrics_destinations: Option<usize>,
    log_format: Option<LogFormat>,
    log_level: Option<String>,
}

impl Config {
    /// Puts the sources together and checks them.
    pub fn load(access: &Access, options: &Options) -> Result<Self> {
        Self::combine(access, options, file_of(access)?, &|name| std::env::var(name).ok())
    }

    fn combine(access: &Access, options: &Options, file: File, variables: Variables) -> Result<Self> {
        let o = options;
        let Basics { database, log_format, log_levels } = Basics::combine(access, &file, variables, "info")?;
        let tuning = Tuning {
            max_in_flight: o.max_in_flight.or(file.max_in_flight).unwrap_or(2000),
            max_events_in_flight: o.max_events_in_flight.or(file.max_events_in_flight).unwrap_or(10_000),
            max_bytes_in_flight: o.max_bytes_in_flight.or(file.max_bytes_in_flight).unwrap_or(64 << 20),
            claim_batch: o.claim_batch.or(file.claim_batch).unwrap_or(500),
            lease: Duration::from_secs(o.lease.or(file.lease).unwrap_or(60)),
        };
        check_tuning(&tuning)?;
        let given = o.amqp_url.as_ref().map(|all| all.join("\n"));
        let brokers = match secret("AMQP_URL", &given, &o.amqp_url_file)? {
            Some(urls) => named(&urls)?,
            None => brokers_of_file(&file)?,
        };
        let files = [
            o.amqp_ca_cert.clone().or(file.amqp_ca_cert),
            o.amqp_client_cert.clone().or(file.amqp_client_cert),
            o.amqp_client_key.clone().or(file.amqp_client_key),
        ];
        let amqp = brokers.iter().map(|(name, url)| amqp(name, url, files.clone())).collect::<Result<_>>()?;
        let networks = o.webhook_allow_networks.clone().or(file.webhook_allow_networks).unwrap_or_default();
        check_networks(&networks)?;
        let destinations = o.destinations.clone().or(file.destinations).unwrap_or_default();
        let destinations = Patterns::new(&destinations).ok_or_else(|| {
            wrong("destinations must be names of destinations, in which * stands for any run of characters")
        })?;
        let password = secret("OUTBOX_UI_PASSWORD", &o.ui_password, &o.ui_password_file)?.or(secret(
            "ui_password",
            &file.ui_password,
            &file.ui_password_file,
        )?);
        let hosts = ui_hosts(&o.ui_hosts.clone().or(file.ui_hosts).unwrap_or_default())?;
        Ok(Config {
            database,
            amqp,
            webhook_allow_networks: networks,
            webhook_proxy: text(&o.webhook_proxy).or(text(&file.webhook_proxy)),
            webhook_ca_cert: o
                .webhook_ca_cert
                .clone()
                .filter(|path| !path.as_os_str().is_empty())
                .or(file.webhook_ca_cert),
            webhook_https_only: match text(&o.webhook_https_only) {
                Some(given) => truth("webhook_https_only", &given)?,
                None => file.webhook_https_only.unwrap_or(false),
            },
            destinations,
            metrics_destinations: o.metrics_destinations.or(file.metrics_destinations).unwrap_or(100),
            http_listen: listen(text(&o.listen.http_listen).or(text(&file.http_listen)))?,
            ui: password.map(|password| Ui { password, hosts }),
            consumer: consumer(text(&o.consumer).or(text(&file.consumer)))?,
            tuning,
            grace_period: Duration::from_secs(o.grace_period.or(file.grace_period).unwrap_or(25)),
            log_format,
            log_levels,
            spans: spans::Settings::read(variables)?,
        })
    }

    /// With a database that is nowhere.
    #[cfg(test)]
    pub fn sample() -> Self {
        let access = Access { database_url: Some("postgres://u@h/db".into()), ..Access::default() };
        Self::combine(&access, &Options::default(), File::default(), &|_| None).expect("a configuration")
    }

    /// What was given and has no effect.
    pub fn warnings(&self) -> impl Iterator<Item = &str> {
        let amqp = self.amqp.iter().flat_map(|amqp| &amqp.url.warnings);
        self.database.warnings.iter().chain(amqp).map(String::as_str)
    }
}

/// What the commands of operators need: of what only a relay needs, nothing is read or checked.
pub struct Basics {
    pub database: ConnInfo,
    pub log_format: LogFormat,
    pub log_levels: Targets,
}

impl Basics {
    pub fn load(access: &Access) -> Result<Self> {
        Self::combine(access, &file_of(access)?, &|name| std::env::var(name).ok(), "warn")
    }

    fn combine(access: &Access, file: &File, variables: Variables, log_level: &str) -> Result<Self> {
        let database_url = secret("DATABASE_URL", &access.database_url, &access.database_url_file)?.or(secret(
            "database_url",
            &file.database_url,
            &file.database_url_file,
        )?);
        let database = match database_url {
            Some(url) => ConnInfo::read(&url, variables)?,
            None if postgres::says_where(variables) => ConnInfo::read("", variables)?,
            None => return Err(wrong("DATABASE_URL is not set")),
        };
        let given = text(&access.log_level).or(text(&file.log_level));
        Ok(Basics {
            database,
            log_format: access.log_format.or(file.log_format).unwrap_or(LogFormat::Text),
            log_levels: logging::levels(given.as_deref().unwrap_or(log_level))?,
        })
    }
}

/// Where a relay with this configuration has its pages.
pub fn http_listen(access: &Access, listen_at: &Listen) -> Result<SocketAddr> {
    listen(text(&listen_at.http_listen).or(text(&file_of(access)?.http_listen)))
}

fn file_of(access: &Access) -> Result<File> {
    Ok(access.config.as_deref().map(read_file).transpose()?.unwrap_or_default())
}

/// An empty variable is one that is not set. What surrounds a value, such as the end of its line, is no part of it.
fn text(value: &Option<String>) -> Option<String> {
    value.as_deref().map(str::trim).filter(|value| !value.is_empty()).map(str::to_owned)
}

/// A value that is given itself or lies in a file.
fn secret(name: &str, value: &Option<String>, path: &Option<PathBuf>) -> Result<Option<String>> {
    let Some(path) = path.as_ref().filter(|path| !path.as_os_str().is_empty()) else {
        return Ok(text(value));
    };
    if text(value).is_some() {
        return Err(wrong(format!("{name} and its file are both given: leave one out")));
    }
    let read = std::fs::read_to_string(path);
    let read = read.map_err(|error| wrong(format!("the file of {name}{} can't be read: {error}", shown(path))))?;
    match text(&Some(read)) {
        Some(value) => Ok(Some(value)),
        None => Err(wrong(format!("the file of {name}{} is empty", shown(path)))),
    }
}

fn wrong(message: impl Into<String>) -> Error {
    Error::Configuration(message.into())
}

/// A path for a message, unless what was given for one could be something else: a URL, or a password alone.
pub fn shown(path: &Path) -> String {
    match path.to_str() {
        Some(text) if path.is_absolute() && !text.contains("://") && !text.contains(['@', '\n']) => {
            format!(" ({text})")
        }
        _ => String::new(),
    }
}

fn read_file(path: &Path) -> Result<File> {
    let place = shown(path);
    let text = std::fs::read_to_string(path)
        .map_err(|error| wrong(format!("the configuration file{place} can't be read: {error}")))?;
    parse_file(&text).map_err(|error| wrong(format!("the configuration file{place}, {}", describe_toml(&error, &text))))
}

fn parse_file(text: &str) -> std::result::Result<File, toml::de::Error> {
    toml::from_str(text)
}

/// Where and what kind of thing is wrong. The parser's own message would quote the value, which may be a password.
pub fn describe_toml(error: &toml::de::Error, text: &str) -> String {
    let at = error.span().map_or(0, |span| span.start.min(text.len()));
    let line = text[..at].matches('\n').count() + 1;
    let message = error.message();
    let what = match message {
        message if message.starts_with("unknown field") => "a key that is unknown",
        message if message.starts_with("duplicate") => "a key that is given twice",
        message if message.starts_with("invalid type") => "a value of the wrong type",
        message if message.starts_with("unknown variant") || message.starts_with("invalid value") => {
            "a value that is not allowed"
        }
        _ => "not TOML",
    };
    format!("line {line}: {what}")
}

fn listen(given: Option<String>) -> Result<SocketAddr> {
    let address = given.unwrap_or_else(|| "127.0.0.1:9464".into());
    let found = address.to_socket_addrs().ok().and_then(|mut all| all.next());
    found.ok_or_else(|| {
        wrong("HTTP_LISTEN must be a host of this machine and a port, such as 127.0.0.1:9464 or [::1]:9464")
    })
}

/// Names alone, as a browser sends them: no scheme, port or path.
fn ui_hosts(given: &[String]) -> Result<Vec<String>> {
    let names = given.iter().map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()).collect::<Vec<_>>();
    let plain = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
    match names.iter().all(|name| name.chars().all(plain)) {
        true => Ok(names),
        false => Err(wrong("ui_hosts must be names of hosts without a port, such as outbox.example.com")),
    }
}

fn check_tuning(tuning: &Tuning) -> Result<()> {
    if tuning.claim_batch == 0 || tuning.claim_batch > 10_000 {
        return Err(wrong("claim_batch must be from 1 to 10000"));
    }
    if tuning.max_in_flight == 0 || tuning.max_in_flight > 100_000 {
        return Err(wrong("max_in_flight must be from 1 to 100000"));
    }
    if tuning.max_events_in_flight == 0 || tuning.max_events_in_flight > 1_000_000 {
        return Err(wrong("max_events_in_flight must be from 1 to 1000000"));
    }
    if tuning.max_bytes_in_flight == 0 {
        return Err(wrong("max_bytes_in_flight must be at least 1"));
    }
    if tuning.lease < Duration::from_secs(5) || tuning.lease > Duration::from_secs(86_400) {
        return Err(wrong("lease must be from 5 to 86400 seconds"));
    }
    Ok(())
}

type Brokers = BTreeMap<String, String>;

/// One URL, or several with names: `NAME=URL`, separated by spaces or line ends.
fn named(urls: &str) -> Result<Brokers> {
    let mut brokers = Brokers::new();
    for one in urls.split_whitespace() {
        let (name, url) = match one.split_once('=') {
            Some((name, url)) if is_name(name) => (name, url),
            _ => (BROKER, one),
        };
        if brokers.insert(name.to_owned(), url.to_owned()).is_some() {
            return Err(wrong(match name {
                BROKER => "AMQP_URL holds two URLs without a name: write NAME=URL, with settings.broker's names".into(),
                name => format!("AMQP_URL holds two URLs for the broker {name}"),
            }));
        }
    }
    Ok(brokers)
}

fn brokers_of_file(file: &File) -> Result<Brokers> {
    let urls = secret("amqp_url", &file.amqp_url, &file.amqp_url_file)?;
    match (urls, &file.amqp) {
        (Some(_), Some(_)) => Err(wrong("amqp_url and the table amqp are both given: leave one out")),
        (Some(urls), None) => named(&urls),
        (None, Some(table)) if !table.keys().all(|name| is_name(name)) => Err(wrong(
            "the keys of the table amqp are names of brokers: 1 to 63 letters, digits, dots, dashes and underscores",
        )),
        (None, table) => Ok(table.clone().unwrap_or_default()),
    }
}

/// As SQL has it for `settings.broker`.
fn is_name(name: &str) -> bool {
    let named = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    (1..=63).contains(&name.len()) && name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.chars().all(named)
}

/// Files that are given by themselves win over those of the URL.
fn amqp(name: &str, url: &str, [ca_cert, client_cert, client_key]: [Option<PathBuf>; 3]) -> Result<Amqp> {
    let url = AmqpUrl::parse(url.trim()).map_err(|error| match (name, error) {
        (BROKER, error) => error,
        (name, Error::Configuration(text)) => wrong(format!("broker {name}: {text}")),
        (_, error) => error,
    })?;
    let amqp = Amqp {
        name: name.into(),
        ca_cert: ca_cert.or_else(|| url.ca_cert.clone()),
        client_cert: client_cert.or_else(|| url.client_cert.clone()),
        client_key: client_key.or_else(|| url.client_key.clone()),
        url,
    };
    check_amqp(&amqp)?;
    Ok(amqp)
}

fn check_amqp(amqp: &Amqp) -> Result<()> {
    if amqp.client_cert.is_some() != amqp.client_key.is_some() {
        return Err(wrong("amqp_client_cert and amqp_client_key go together"));
    }
    let files = [&amqp.ca_cert, &amqp.client_cert, &amqp.client_key];
    for (key, path) in ["amqp_ca_cert", "amqp_client_cert", "amqp_client_key"].iter().zip(files) {
        if let Some(path) = path {
            std::fs::File::open(path)
                .map_err(|error| wrong(format!("the file of {key}{} can't be read: {error}", shown(path))))?;
        }
    }
    Ok(())
}

/// What could not even be an address is not handed on to where it would be shown.
fn check_networks(networks: &[String]) -> Result<()> {
    let numeric = |c: char| c.is_ascii_hexdigit() || ".:/ ".contains(c);
    match networks.iter().all(|network| network.chars().all(numeric) && !network.contains("//")) {
        true => Ok(()),
        false => Err(wrong("webhook_allow_networks must be networks in CIDR notation, such as 10.1.0.0/16")),
    }
}

fn truth(name: &str, given: &str) -> Result<bool> {
    match given.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "1" => Ok(true),
        "false" | "no" | "off" | "0" => Ok(false),
        _ => Err(wrong(format!("{name} must be true or false"))),
    }
}

/// The name given, or `host:pid`; PostgreSQL keeps 63 bytes of it.
fn consumer(given: Option<String>) -> Result<String> {
    match given {
        Some(name) if name.len() > 63 => Err(wrong("consumer must have at most 63 bytes")),
        // It is seen by many: a URL is here by mistake.
        Some(name) if name.contains("://") => Err(wrong("consumer is a name, not a URL")),
        Some(name) => Ok(name),
        None => {
            let host = std::fs::read_to_string("/proc/sys/kernel/hostname")
                .or_else(|_| std::env::var("HOSTNAME"))
                .unwrap_or_else(|_| "relay".into());
            let host: String = host.trim().chars().filter(char::is_ascii).take(48).collect();
            Ok(format!("{host}:{}", std::process::id()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    fn none(_: &str) -> Option<String> {
        None
    }

    fn access() -> Access {
        Access { database_url: Some("postgres://u:pw@h/db".into()), ..Access::default() }
    }

    #[test]
    fn the_defaults_are_those_of_the_reference() {
        let config = Config::combine(&access(), &Options::default(), File::default(), &none).ok().unwrap();
        assert_eq!(config.http_listen.to_string(), "127.0.0.1:9464");
        assert_eq!(config.grace_period, Duration::from_secs(25));
        assert!(config.amqp.is_empty());
        assert!(config.consumer.ends_with(&format!(":{}", std::process::id())));
    }

    #[test]
    fn flag_and_environment_win_over_the_file() {
        let file = parse_file("claim_batch = 7\nlease = 30\nhttp_listen = '0.0.0.0:1'").unwrap();
        let options = Options { claim_batch: Some(9), ..Options::default() };
        let config = Config::combine(&access(), &options, file, &none).ok().unwrap();
        assert_eq!(config.tuning.claim_batch, 9);
        assert_eq!(config.tuning.lease, Duration::from_secs(30));
        assert_eq!(config.http_listen.to_string(), "0.0.0.0:1");
    }

    #[test]
    fn a_flag_is_true_or_false() {
        let read = |given: Option<&str>, file: &str| {
            let options = Options { webhook_https_only: given.map(Into::into), ..Options::default() };
            Config::combine(&access(), &options, parse_file(file).unwrap(), &none)
                .map(|config| config.webhook_https_only)
                .ok()
        };
        assert_eq!((read(None, ""), read(Some(" "), "webhook_https_only = true")), (Some(false), Some(true)));
        assert_eq!((read(Some("No"), "webhook_https_only = true"), read(Some("1"), "")), (Some(false), Some(true)));
        assert_eq!(read(Some("perhaps"), ""), None);
        for (arguments, expected) in [(&["--webhook-https-only"][..], "true"), (&["--webhook-https-only=off"], "off")] {
            let cli = Cli::try_parse_from([&["outbox-relay", "run"], arguments].concat()).ok().unwrap();
            let Command::Run(options) = cli.command else { panic!("another command") };
            assert_eq!(options.webhook_https_only.as_deref(), Some(expected));
        }
    }

    #[test]
    fn brokers_have_names() {
        let read = |urls: &[&str], file: &str| {
            let amqp_url = Some(urls.iter().map(|url| (*url).to_owned()).collect());
            let options = Options { amqp_url, ..Options::default() };
            let config =
                Config::combine(&access(), &options, parse_file(file).unwrap(), &none).map_err(|e| e.to_string())?;
            let of = |amqp: &Amqp| format!("{}@{}", amqp.name, amqp.url.uris[0].authority.host);
            Ok::<_, String>(config.amqp.iter().map(of).collect::<Vec<_>>().join(" "))
        };
        let read = |urls, file| read(urls, file).unwrap_or_else(|error| error);
        assert_eq!(read(&["amqp://u:p%3D=x@h1"], ""), "default@h1");
        assert_eq!(read(&["a=amqp://h1", "amqp://h2"], ""), "a@h1 default@h2");
        assert_eq!(read(&[" a=amqp://h1\n\tb=amqps://h2/v "], "amqp_url = 'amqp://h3'"), "a@h1 b@h2");
        assert_eq!(read(&[], "[amqp]\ndefault = 'amqp://h1'\neu-1 = 'amqp://h2'"), "default@h1 eu-1@h2");
        assert_eq!(read(&[""], "amqp_url = 'a=amqp://h1 b=amqp://h2'"), "a@h1 b@h2");
        for (urls, file) in [
            (&["amqp://h hunter2"][..], ""),
            (&["amqp://h1", "amqp://u:hunter2@h2"], ""),
            (&["a=amqp://h1", "a=amqp://u:hunter2@h2"], ""),
            (&["a=hunter2"], ""),
            (&["a b=amqp://h"], ""),
            (&[], "amqp_url = 'amqp://u:hunter2@h'\n[amqp]\na = 'amqp://h'"),
            (&[], "[amqp]\n'a b' = 'amqp://u:hunter2@h'"),
            (&[], "[amqp]\na = 'hunter2'"),
        ] {
            let error = read(urls, file);
            assert!(
                !error.contains('@') && !error.contains("hunter2") && !error.contains('\n'),
                "{urls:?} {file}: {error}"
            );
        }
    }

    #[test]
    fn unknown_keys_are_refused() {
        assert!(parse_file("databse_url = 'x'").is_err());
    }

    #[test]
    fn what_is_wrong_is_one_line_without_a_password() {
        let dir = std::env::temp_dir().join(format!("outbox-relay-config-{}", std::process::id()));
        let write = |text: &str| {
            std::fs::write(&dir, text).unwrap();
            read_file(&dir).err().expect(text).to_string()
        };
        for error in [
            write("database_url = 'postgres://u:hunter2@h/db\nlease = 1"),
            write("database_url = 'postgres://u:hunter2@h/db'\nlease = 'x'"),
            write("database_urll = 'postgres://u:hunter2@h/db'"),
            write("lease = 'postgres://u:hunter2@h/db'"),
            write("log_format = 'postgres://u:hunter2@h/db'"),
            write("'postgres://u:hunter2@h/db' = 1"),
            write("lease = 7\nlease = 'hunter2'"),
            write("postgres://u:hunter2@h/db"),
            write("webhook_allow_networks = 'hunter2'"),
            write("ui_password = 7\nui_hosts = ['http://hunter2']"),
        ] {
            assert!(!error.contains("hunter2") && !error.contains('\n'), "{error}");
        }
        std::fs::remove_file(&dir).unwrap();
    }

    #[test]
    fn a_wrong_command_line_is_one_line_that_shows_no_value() {
        for arguments in [
            &["run", "postgres://u:hunter2@h/db"][..],
            &["run", "--database-ur=postgres://u:hunter2@h/db"],
            &["run", "--lease", "hunter2"],
            &["hunter2"],
            &["run", "--log-format=hunter2"],
            &["run", "--lease=1", "--lease=hunter2"],
            &[],
        ] {
            let error = Cli::try_parse_from([&["outbox-relay"], arguments].concat()).err().expect("wrong");
            let shown = crate::cli::describe(&error);
            assert!(!shown.contains("hunter2") && !shown.contains('\n') && shown.len() > 10, "{arguments:?}: {shown}");
        }
    }

    #[test]
    fn addresses_to_listen_on_may_be_names_and_empty_means_the_default() {
        for (given, expected) in [("", "127.0.0.1:9464"), ("[::1]:7", "[::1]:7"), ("127.0.0.2:8", "127.0.0.2:8")] {
            assert_eq!(listen(text(&Some(given.into()))).ok().map(|at| at.to_string()), Some(expected.into()));
        }
        assert_eq!(listen(Some("localhost:80".into())).ok().map(|at| at.port()), Some(80));
        assert!(listen(Some("9464".into())).is_err());
    }

    #[test]
    fn settings_out_of_range_are_refused() {
        for options in [
            Options { claim_batch: Some(0), ..Options::default() },
            Options { max_in_flight: Some(0), ..Options::default() },
            Options { max_events_in_flight: Some(0), ..Options::default() },
            Options { destinations: Some(vec!["postgres://u@h".into()]), ..Options::default() },
            Options { lease: Some(0), ..Options::default() },
            Options { amqp_url: Some(vec!["http://x".into()]), ..Options::default() },
            Options { consumer: Some("x".repeat(64)), ..Options::default() },
        ] {
            let combined = Config::combine(&access(), &options, File::default(), &none);
            assert!(matches!(combined, Err(Error::Configuration(_))));
        }
        let nowhere = Access { database_url: Some(" ".into()), ..Access::default() };
        assert!(matches!(Basics::combine(&nowhere, &File::default(), &none, "warn"), Err(Error::Configuration(_))));
    }
}

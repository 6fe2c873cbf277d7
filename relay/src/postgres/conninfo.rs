//! Where PostgreSQL is and how to connect to it: every key of libpq is honoured, accepted because it changes nothing here,
//! or refused because without it the connection would be weaker than its owner believes.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio_postgres::config::{ChannelBinding, SslMode as TlsUse, SslNegotiation};

use super::libpq::{PasswordFile, Variables, gather};
use super::params::{self, invalid};
use super::tls_settings::TlsSettings;
use crate::error::Result;

/// One of the servers that may be asked.
#[derive(Clone)]
pub struct Server {
    pub at: At,
    pub port: u16,
    /// The name that its certificate must hold.
    pub name: String,
    /// Login and database, and what the startup message says.
    pub config: tokio_postgres::Config,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum At {
    Name(String),
    Address(IpAddr),
    /// The directory of a Unix-domain socket.
    Directory(PathBuf),
}

/// `None`: as the system does it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keepalive {
    pub idle: Duration,
    pub interval: Duration,
    pub count: u32,
}

#[derive(Clone)]
pub struct ConnInfo {
    pub servers: Vec<Server>,
    pub tls: TlsSettings,
    /// `target_session_attrs` asks for a server that takes writes.
    pub read_write: bool,
    /// Ask the servers, and the addresses of each, in any order.
    pub shuffled: bool,
    pub connect_timeout: Duration,
    pub tcp_user_timeout: Option<Duration>,
    pub keepalive: Option<Keepalive>,
    /// What was given and has no effect, for the log.
    pub warnings: Vec<String>,
}

/// Where a server's socket is by default: Debian's directory, then PostgreSQL's own.
const SOCKET_DIRECTORIES: [&str; 2] = ["/var/run/postgresql", "/tmp"];

/// Accepted: the relay's libraries have no such feature, or always do it.
const WITHOUT_EFFECT: [&str; 10] = [
    "gssdelegation",
    "gsslib",
    "krbsrvname",
    "max_protocol_version",
    "passfile",
    "replication",
    "service",
    "servicefile",
    "sslcompression",
    "sslsni",
];

/// Refused when set: to leave them out would weaken what they ask for.
const REFUSED: [(&str, &str); 8] = [
    ("require_auth", "use channel_binding=require, or TLS with sslmode=verify-full"),
    ("requirepeer", "leave it out, or use TLS with sslmode=verify-full"),
    ("sslcrldir", "put the lists into one file and name it in sslcrl"),
    ("sslpassword", "store the key without a password, readable for the relay alone"),
    ("sslkeylogfile", "leave it out"),
    ("scram_client_key", "use a password"),
    ("scram_server_key", "use a password"),
    ("oauth_issuer", "use a password or a certificate"),
];

impl ConnInfo {
    /// Reads `postgres://…` or `key=value …`, and what the environment and its files add. The error shows no value.
    pub fn read(text: &str, variables: Variables) -> Result<Self> {
        let keys = Keys { all: gather(params::parse(text)?, variables)? };
        keys.check()?;
        let mut warnings = keys.without_effect();
        let tls = TlsSettings::read(&|key| keys.get(key))?;
        let login = keys.login(&tls, variables)?;
        let passwords = match login.get_password() {
            Some(_) => None,
            None => Some(PasswordFile::read(keys.get("passfile"), variables, &mut warnings)),
        };
        let user_timeout: u32 = keys.number("tcp_user_timeout")?.unwrap_or(15_000);
        let connect_timeout: i32 = keys.number("connect_timeout")?.filter(|seconds| *seconds > 0).unwrap_or(10);
        Ok(ConnInfo {
            servers: keys.servers(&login, passwords.as_ref())?,
            tls,
            read_write: keys.read_write()?,
            shuffled: keys.choice("load_balance_hosts", &["disable", "random"])? == Some("random"),
            // libpq takes 1 for 2, and 0 for no limit, which a relay that has other servers to try can't use.
            connect_timeout: Duration::from_secs(u64::from(connect_timeout.unsigned_abs()).max(2)),
            tcp_user_timeout: (user_timeout > 0).then(|| Duration::from_millis(user_timeout.into())),
            keepalive: keys.keepalive()?,
            warnings,
        })
    }

    /// Where it leads, for logs: `host,host/database`, no user and no password.
    pub fn target(&self) -> String {
        let places: Vec<String> = self.servers.iter().map(|server| server.at.to_string()).collect();
        let database = self.servers.first().and_then(|server| server.config.get_dbname());
        format!("{}/{}", places.join(","), database.unwrap_or("the user's database"))
    }
}

impl std::fmt::Display for At {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            At::Name(name) => f.write_str(name),
            At::Address(address) => address.fmt(f),
            At::Directory(path) => path.display().fmt(f),
        }
    }
}

struct Keys {
    all: BTreeMap<String, String>,
}

impl Keys {
    /// An empty value is one that is not set, as in libpq.
    fn get(&self, key: &str) -> Option<&str> {
        self.all.get(key).map(String::as_str).filter(|value| !value.is_empty())
    }

    fn number<T: std::str::FromStr>(&self, key: &str) -> Result<Option<T>> {
        let wrong = |_| invalid(&format!("{key} must be a whole number"));
        self.get(key).map(|value| value.trim().parse().map_err(wrong)).transpose()
    }

    fn choice(&self, key: &str, allowed: &[&str]) -> Result<Option<&str>> {
        match self.get(key) {
            Some(value) if !allowed.contains(&value) => {
                Err(invalid(&format!("{key} must be {}", allowed.join(" or "))))
            }
            value => Ok(value),
        }
    }

    /// What can't be honoured is refused; a key that nobody knows could be a slip, or a piece of a password.
    fn check(&self) -> Result<()> {
        const HONOURED: [&str; 21] = [
            "application_name",
            "channel_binding",
            "client_encoding",
            "connect_timeout",
            "dbname",
            "fallback_application_name",
            "gssencmode",
            "host",
            "hostaddr",
            "keepalives",
            "keepalives_count",
            "keepalives_idle",
            "keepalives_interval",
            "load_balance_hosts",
            "min_protocol_version",
            "options",
            "password",
            "port",
            "target_session_attrs",
            "tcp_user_timeout",
            "user",
        ];
        for (key, instead) in REFUSED {
            if self.get(key).is_some() {
                return Err(invalid(&format!("{key} can't be honoured; {instead}")));
            }
        }
        let known = |key: &str| {
            HONOURED.contains(&key)
                || WITHOUT_EFFECT.contains(&key)
                || TlsSettings::KEYS.contains(&key)
                || REFUSED.iter().any(|(refused, _)| *refused == key)
                || key.starts_with("oauth_")
        };
        if !self.all.keys().all(|key| known(key)) {
            return Err(invalid("it has a key that libpq does not know"));
        }
        // `require` would be a promise of encryption that nobody keeps.
        self.choice("gssencmode", &["disable", "prefer"])?;
        self.choice("min_protocol_version", &["3.0"])?;
        if self.get("replication").is_some_and(|value| !matches!(value, "false" | "off" | "no" | "0")) {
            return Err(invalid("replication is for replication clients, which a relay is not"));
        }
        Ok(())
    }

    fn without_effect(&self) -> Vec<String> {
        let silent = ["passfile", "service", "servicefile"];
        let utf8 = |value: &str| matches!(value.to_ascii_lowercase().as_str(), "utf8" | "utf-8" | "auto");
        let encoding = self.get("client_encoding").filter(|value| !utf8(value)).map(|_| "client_encoding");
        let given = WITHOUT_EFFECT.iter().copied().filter(|key| !silent.contains(key) && self.get(key).is_some());
        given.chain(encoding).map(|key| format!("{key} of the connection string has no effect here")).collect()
    }

    fn login(&self, tls: &TlsSettings, variables: Variables) -> Result<tokio_postgres::Config> {
        let mut config = tokio_postgres::Config::new();
        let system_user = || variables("USER").or_else(|| variables("LOGNAME")).unwrap_or_else(|| "root".into());
        config.user(self.get("user").map_or_else(system_user, str::to_owned));
        self.get("password").map(|password| config.password(password));
        self.get("dbname").map(|name| config.dbname(name));
        self.get("options").map(|options| config.options(options));
        let name = self.get("application_name").or(self.get("fallback_application_name"));
        config.application_name(name.unwrap_or("outbox-relay"));
        config.ssl_mode(tls.first_use());
        config.ssl_negotiation(match self.choice("sslnegotiation", &["postgres", "direct"])? {
            Some("direct") if config.get_ssl_mode() != TlsUse::Require => {
                return Err(invalid("sslnegotiation=direct needs sslmode=require, verify-ca or verify-full"));
            }
            Some("direct") => SslNegotiation::Direct,
            _ => SslNegotiation::Postgres,
        });
        config.channel_binding(match self.choice("channel_binding", &["disable", "prefer", "require"])? {
            Some("disable") => ChannelBinding::Disable,
            Some("require") => ChannelBinding::Require,
            _ => ChannelBinding::Prefer,
        });
        Ok(config)
    }

    fn read_write(&self) -> Result<bool> {
        match self.get("target_session_attrs") {
            None | Some("any") => Ok(false),
            Some("read-write" | "primary") => Ok(true),
            _ => Err(invalid("target_session_attrs must be any, read-write or primary: a relay writes")),
        }
    }

    /// Defaults that a connection which only listens needs: without them a peer that vanished is never noticed.
    fn keepalive(&self) -> Result<Option<Keepalive>> {
        if self.number::<i32>("keepalives")? == Some(0) {
            return Ok(None);
        }
        let seconds = |key, default| {
            let given = self.number(key)?.filter(|seconds| *seconds > 0);
            Result::Ok(Duration::from_secs(given.unwrap_or(default)))
        };
        Ok(Some(Keepalive {
            idle: seconds("keepalives_idle", 10)?,
            interval: seconds("keepalives_interval", 5)?,
            count: self.number("keepalives_count")?.filter(|count| *count > 0).unwrap_or(3),
        }))
    }

    fn servers(&self, login: &tokio_postgres::Config, passwords: Option<&PasswordFile>) -> Result<Vec<Server>> {
        let hosts = self.list("host");
        let addresses = self.list("hostaddr");
        let ports = self.list("port");
        let count = hosts.len().max(addresses.len()).max(1);
        if (!hosts.is_empty() && !addresses.is_empty() && hosts.len() != addresses.len())
            || (ports.len() > 1 && ports.len() != count)
        {
            return Err(invalid("host, hostaddr and port must name the same number of servers"));
        }
        let server = |i: usize| {
            let port = port(ports.get(i).or(ports.first()).copied().unwrap_or_default())?;
            let host = hosts.get(i).copied().unwrap_or_default();
            let at = at(host, addresses.get(i).copied().unwrap_or_default(), port)?;
            Ok(server(at, host, port, login, passwords))
        };
        (0..count).map(server).collect()
    }

    fn list(&self, key: &str) -> Vec<&str> {
        self.get(key).map(|list| list.split(',').map(str::trim).collect()).unwrap_or_default()
    }
}

fn server(at: At, host: &str, port: u16, login: &tokio_postgres::Config, passwords: Option<&PasswordFile>) -> Server {
    let mut config = login.clone();
    let user = config.get_user().unwrap_or_default().to_owned();
    let database = config.get_dbname().unwrap_or(&user).to_owned();
    // The password file calls the server behind the default socket by this name.
    let of_file = if host.is_empty() { "localhost" } else { host };
    if let Some(password) = passwords.and_then(|file| file.password(of_file, port, &database, &user)) {
        config.password(password);
    }
    if matches!(at, At::Directory(_)) {
        // As libpq: there is no TLS on such a socket, whatever `sslmode` says.
        config.ssl_mode(TlsUse::Disable).ssl_negotiation(SslNegotiation::Postgres);
    }
    let name = if host.is_empty() { at.to_string() } else { host.to_owned() };
    Server { at, port, name, config }
}

fn port(text: &str) -> Result<u16> {
    match text {
        "" => Ok(5432),
        text => text.parse().ok().filter(|port| *port > 0).ok_or_else(|| invalid("port must be from 1 to 65535")),
    }
}

fn at(host: &str, address: &str, port: u16) -> Result<At> {
    if !address.is_empty() {
        return address.parse().map(At::Address).map_err(|_| invalid("hostaddr must be an IP address"));
    }
    if host.starts_with('/') {
        return Ok(At::Directory(host.into()));
    }
    if host.is_empty() {
        return Ok(default_place(port));
    }
    if let Ok(address) = host.parse() {
        return Ok(At::Address(address));
    }
    // Anything else could be a piece of a password, and would be looked up and logged.
    let named = |c: char| c.is_alphanumeric() || matches!(c, '.' | '-' | '_');
    if !host.chars().all(named) {
        return Err(invalid("host must be a name, an IP address or the absolute path of a socket's directory"));
    }
    Ok(At::Name(host.to_owned()))
}

/// As libpq, the local socket; where there is none, this machine.
fn default_place(port: u16) -> At {
    let has_socket = |directory: &&&str| Path::new(directory).join(format!(".s.PGSQL.{port}")).exists();
    match SOCKET_DIRECTORIES.iter().find(has_socket) {
        Some(directory) => At::Directory(directory.into()),
        None => At::Name("localhost".into()),
    }
}

#[cfg(test)]
#[path = "conninfo_tests.rs"]
mod tests;

//! A connection string in either of libpq's forms. tokio-postgres reads most keys; those of TLS, and those that it names
//! or measures differently, are taken out here and handled by us.

use std::path::PathBuf;
use std::time::Duration;

use tokio_postgres::config::{Host, SslMode as TlsUse, TargetSessionAttrs};

use crate::error::{Error, Result};

/// `sslmode`, in libpq's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SslMode {
    Disable,
    Allow,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

/// Where the certificates are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsSettings {
    pub mode: SslMode,
    /// `None`: libpq's default file, when it exists. `Some("system")`: the system's trusted certificates.
    pub root_cert: Option<PathBuf>,
    pub cert: Option<PathBuf>,
    pub key: Option<PathBuf>,
}

#[derive(Clone)]
pub struct ConnInfo {
    pub config: tokio_postgres::Config,
    pub tls: TlsSettings,
}

const OURS: [&str; 8] = [
    "sslmode",
    "sslrootcert",
    "sslcert",
    "sslkey",
    "target_session_attrs",
    "keepalives_count",
    "tcp_user_timeout",
    "fallback_application_name",
];

impl ConnInfo {
    /// Reads `postgres://…` or `key=value …`. The error shows no part of the string's values.
    pub fn parse(text: &str) -> Result<Self> {
        if text.split_once("://").is_some_and(|(scheme, _)| is_foreign(scheme)) {
            return Err(invalid("a URL must begin with postgres:// or postgresql://"));
        }
        let (rest, pairs) = take_out(text)?;
        let mut config: tokio_postgres::Config = rest.parse().map_err(|error: tokio_postgres::Error| {
            let cause = std::error::Error::source(&error).map(|c| format!(": {c}"));
            invalid(&format!("{error}{}", cause.unwrap_or_default()))
        })?;
        if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
            return Err(invalid("it names no host"));
        }
        let mut tls = TlsSettings { mode: SslMode::Prefer, root_cert: None, cert: None, key: None };
        let mut mode = None;
        let mut user_timeout = Some(Duration::from_secs(15));
        for (key, value) in pairs {
            match key.as_str() {
                "sslmode" => mode = Some(ssl_mode(&value)?),
                "sslrootcert" => tls.root_cert = Some(value.into()),
                "sslcert" => tls.cert = Some(value.into()),
                "sslkey" => tls.key = Some(value.into()),
                "target_session_attrs" => {
                    config.target_session_attrs(session_attrs(&value)?);
                }
                "keepalives_count" => {
                    config.keepalives_retries(number(&key, &value)?);
                }
                "tcp_user_timeout" => {
                    let millis: u32 = number(&key, &value)?;
                    user_timeout = (millis > 0).then(|| Duration::from_millis(millis.into()));
                }
                _ => {}
            }
        }
        if let Some(timeout) = user_timeout {
            config.tcp_user_timeout(timeout);
        }
        // As libpq: the system's authorities vouch for any name, so names are verified with them.
        let default = if is_system(&tls) { SslMode::VerifyFull } else { SslMode::Prefer };
        tls.mode = mode.unwrap_or(default);
        check_files(&tls)?;
        fill_in(&mut config, &tls);
        Ok(ConnInfo { config, tls })
    }

    /// How many hosts are named.
    pub fn hosts(&self) -> usize {
        self.config.get_hosts().len().max(self.config.get_hostaddrs().len())
    }

    /// The configuration for one of them. The library's own turn through all never leaves one that accepts and then says
    /// nothing.
    pub fn of_host(&self, at: usize) -> tokio_postgres::Config {
        of_host(&self.config, at)
    }

    /// Where it leads, for logs: `host:port/database`, no user and no password.
    pub fn target(&self) -> String {
        let hosts: Vec<String> = self
            .config
            .get_hosts()
            .iter()
            .map(|host| match host {
                Host::Tcp(name) => name.clone(),
                Host::Unix(path) => path.display().to_string(),
            })
            .collect();
        let database = self.config.get_dbname().unwrap_or("the user's database");
        format!("{}/{database}", hosts.join(","))
    }
}

fn of_host(all: &tokio_postgres::Config, at: usize) -> tokio_postgres::Config {
    let mut one = tokio_postgres::Config::new();
    match all.get_hosts().get(at) {
        Some(Host::Tcp(name)) => drop(one.host(name)),
        Some(Host::Unix(path)) => drop(one.host_path(path)),
        None => {}
    }
    all.get_hostaddrs().get(at).map(|address| one.hostaddr(*address));
    // One port is for all.
    all.get_ports().get(at).or(all.get_ports().first()).map(|port| one.port(*port));
    all.get_user().map(|user| one.user(user));
    all.get_password().map(|password| one.password(password));
    all.get_dbname().map(|name| one.dbname(name));
    all.get_options().map(|options| one.options(options));
    all.get_application_name().map(|name| one.application_name(name));
    all.get_connect_timeout().map(|limit| one.connect_timeout(*limit));
    all.get_tcp_user_timeout().map(|limit| one.tcp_user_timeout(*limit));
    all.get_keepalives_interval().map(|interval| one.keepalives_interval(interval));
    all.get_keepalives_retries().map(|retries| one.keepalives_retries(retries));
    one.keepalives(all.get_keepalives())
        .keepalives_idle(all.get_keepalives_idle())
        .ssl_mode(all.get_ssl_mode())
        .ssl_negotiation(all.get_ssl_negotiation())
        .channel_binding(all.get_channel_binding())
        .target_session_attrs(all.get_target_session_attrs());
    one
}

/// Letters alone, so no `key=value`.
fn is_foreign(scheme: &str) -> bool {
    !matches!(scheme, "postgres" | "postgresql") && scheme.chars().all(|c| c.is_ascii_alphanumeric())
}

fn invalid(what: &str) -> Error {
    Error::Configuration(format!("DATABASE_URL is not a valid connection string: {what}"))
}

fn number<T: std::str::FromStr>(key: &str, value: &str) -> Result<T> {
    value.parse().map_err(|_| invalid(&format!("{key} must be a whole number")))
}

fn ssl_mode(value: &str) -> Result<SslMode> {
    Ok(match value {
        "disable" => SslMode::Disable,
        "allow" => SslMode::Allow,
        "prefer" => SslMode::Prefer,
        "require" => SslMode::Require,
        "verify-ca" => SslMode::VerifyCa,
        "verify-full" => SslMode::VerifyFull,
        _ => {
            let modes = "disable, allow, prefer, require, verify-ca or verify-full";
            return Err(invalid(&format!("sslmode must be {modes}")));
        }
    })
}

fn session_attrs(value: &str) -> Result<TargetSessionAttrs> {
    match value {
        "any" => Ok(TargetSessionAttrs::Any),
        "read-write" | "primary" => Ok(TargetSessionAttrs::ReadWrite),
        _ => Err(invalid("target_session_attrs must be any, read-write or primary: a relay writes")),
    }
}

fn is_system(tls: &TlsSettings) -> bool {
    tls.root_cert.as_deref().is_some_and(|path| path.as_os_str() == "system")
}

fn check_files(tls: &TlsSettings) -> Result<()> {
    if tls.cert.is_some() != tls.key.is_some() {
        return Err(invalid("sslcert and sslkey go together"));
    }
    if is_system(tls) && tls.mode != SslMode::VerifyFull {
        return Err(invalid("sslrootcert=system needs sslmode=verify-full"));
    }
    Ok(())
}

/// Defaults that a connection which only listens needs: without them a peer that vanished is never noticed.
fn fill_in(config: &mut tokio_postgres::Config, tls: &TlsSettings) {
    config.ssl_mode(match tls.mode {
        SslMode::Disable | SslMode::Allow => TlsUse::Disable,
        SslMode::Prefer => TlsUse::Prefer,
        SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => TlsUse::Require,
    });
    if config.get_user().is_none() {
        config.user(std::env::var("PGUSER").or_else(|_| std::env::var("USER")).unwrap_or("root".into()));
    }
    if config.get_password().is_none()
        && let Ok(password) = std::env::var("PGPASSWORD")
    {
        config.password(password);
    }
    if config.get_connect_timeout().is_none() {
        config.connect_timeout(Duration::from_secs(10));
    }
    if config.get_keepalives_idle() == Duration::from_secs(2 * 60 * 60) {
        config.keepalives_idle(Duration::from_secs(10));
    }
    if config.get_keepalives_interval().is_none() {
        config.keepalives_interval(Duration::from_secs(5));
    }
    if config.get_keepalives_retries().is_none() {
        config.keepalives_retries(3);
    }
    if config.get_application_name().is_none() {
        config.application_name("outbox-relay");
    }
}

/// The string without our keys, and our keys with their values.
fn take_out(text: &str) -> Result<(String, Vec<(String, String)>)> {
    if text.starts_with("postgres://") || text.starts_with("postgresql://") {
        Ok(take_out_of_url(text))
    } else {
        take_out_of_pairs(text)
    }
}

fn take_out_of_url(url: &str) -> (String, Vec<(String, String)>) {
    let Some((base, query)) = url.split_once('?') else {
        return (url.to_owned(), Vec::new());
    };
    let mut kept = Vec::new();
    let mut ours = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        match pair.split_once('=') {
            Some((key, value)) if OURS.contains(&key) => {
                ours.push((key.to_owned(), percent_decode(value)));
            }
            _ => kept.push(pair),
        }
    }
    let rest = if kept.is_empty() { base.to_owned() } else { format!("{base}?{}", kept.join("&")) };
    (rest, ours)
}

fn percent_decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = text.get(at + 1..at + 3).and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match (bytes[at], hex) {
            (b'%', Some(byte)) => {
                out.push(byte);
                at += 3;
            }
            (byte, _) => {
                out.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn take_out_of_pairs(text: &str) -> Result<(String, Vec<(String, String)>)> {
    let mut kept = String::new();
    let mut ours = Vec::new();
    let mut chars = text.chars().peekable();
    loop {
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        if chars.peek().is_none() {
            return Ok((kept, ours));
        }
        let mut key = String::new();
        while let Some(c) = chars.next_if(|c| *c != '=' && !c.is_whitespace()) {
            key.push(c);
        }
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        if chars.next() != Some('=') {
            return Err(invalid("a key has no value"));
        }
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        let value = pair_value(&mut chars)?;
        if OURS.contains(&key.as_str()) {
            ours.push((key, value));
        } else {
            let quoted = value.replace('\\', "\\\\").replace('\'', "\\'");
            kept.push_str(&format!("{key}='{quoted}' "));
        }
    }
}

fn pair_value(chars: &mut std::iter::Peekable<std::str::Chars<'_>>) -> Result<String> {
    let quoted = chars.next_if_eq(&'\'').is_some();
    let mut value = String::new();
    loop {
        match chars.next() {
            Some('\\') => value.extend(chars.next()),
            Some('\'') if quoted => return Ok(value),
            Some(c) if !quoted && c.is_whitespace() => return Ok(value),
            Some(c) => value.push(c),
            None if quoted => return Err(invalid("a quote is not closed")),
            None => return Ok(value),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> ConnInfo {
        ConnInfo::parse(text).unwrap_or_else(|error| panic!("{error}"))
    }

    #[test]
    fn both_forms_say_the_same() {
        let url = parse(
            "postgres://u:p%40ss@a:1,b:2/db?sslmode=verify-full&sslrootcert=%2Fca.pem&target_session_attrs=read-write",
        );
        let pairs = parse(
            r"host=a,b port=1,2 user=u password='p@ss' dbname=db sslmode = verify-full sslrootcert='/ca.pem' target_session_attrs=read-write",
        );
        for info in [url, pairs] {
            assert_eq!(info.tls.mode, SslMode::VerifyFull);
            assert_eq!(info.tls.root_cert.as_deref(), Some("/ca.pem".as_ref()));
            assert_eq!(info.config.get_password(), Some(b"p@ss".as_ref()));
            assert_eq!(info.config.get_target_session_attrs(), TargetSessionAttrs::ReadWrite);
            assert_eq!(info.config.get_ports(), [1, 2]);
            assert_eq!(info.target(), "a,b/db");
        }
    }

    #[test]
    fn each_host_has_its_port_and_all_else_in_common() {
        let info = parse("host=a,b,/run port=1,2,3 user=u password=p dbname=d target_session_attrs=read-write");
        assert_eq!(info.hosts(), 3);
        let second = info.of_host(1);
        assert_eq!((second.get_hosts(), second.get_ports()), (&[Host::Tcp("b".into())][..], &[2][..]));
        assert_eq!(info.of_host(2).get_hosts(), [Host::Unix("/run".into())]);
        assert_eq!((second.get_user(), second.get_dbname()), (Some("u"), Some("d")));
        assert_eq!(second.get_keepalives_idle(), info.config.get_keepalives_idle());
        assert_eq!(second.get_target_session_attrs(), TargetSessionAttrs::ReadWrite);
        let one_port = parse("host=a,b port=7 user=u");
        assert_eq!(one_port.of_host(1).get_ports(), [7]);
    }

    #[test]
    fn tcp_user_timeout_is_milliseconds_as_in_libpq() {
        let info = parse("host=a user=u tcp_user_timeout=2500 keepalives_count=7");
        assert_eq!(info.config.get_tcp_user_timeout(), Some(&Duration::from_millis(2500)));
        assert_eq!(info.config.get_keepalives_retries(), Some(7));
        assert_eq!(parse("host=a tcp_user_timeout=0").config.get_tcp_user_timeout(), None);
    }

    #[test]
    fn a_connection_that_only_listens_notices_a_lost_peer() {
        let config = parse("host=a user=u").config;
        assert!(config.get_keepalives_idle() < Duration::from_secs(60));
        assert!(config.get_tcp_user_timeout().is_some());
        assert!(config.get_connect_timeout().is_some());
    }

    #[test]
    fn what_is_wrong_is_said_without_the_password() {
        for text in [
            "postgres://u:hunter2@a/db?sslmode=maybe",
            "postgres://u:hunter2@a:port/db",
            "postgres://u:hunter2@a/db?no_such_key=1",
            "host=a password=hunter2 target_session_attrs=standby",
            "host=a password='hunter2",
            "password=hunter2 dbname=x",
            "host=a password=hunter2 sslcert=/x",
            "hunter2",
        ] {
            let error = ConnInfo::parse(text).err().expect(text).to_string();
            assert!(!error.contains("hunter2"), "{error}");
            assert!(!error.contains('\n'));
        }
    }
}

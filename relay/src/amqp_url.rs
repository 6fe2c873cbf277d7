//! `AMQP_URL`, read whole before lapin sees any of it: its own reader takes an IPv6 address, a missing host and a slip in the
//! login for something else, and would send the login there. No error shows any part of the URL.
//!
//! Source: <https://www.rabbitmq.com/docs/uri-spec> and <https://www.rabbitmq.com/docs/uri-query-parameters>. One departure:
//! an empty virtual host, which no broker has, is `/`.

use std::net::Ipv6Addr;
use std::path::PathBuf;
use std::str::FromStr;

use lapin::uri::{AMQPAuthority, AMQPQueryString, AMQPScheme, AMQPUri, AMQPUserInfo, SASLMechanism};

use crate::error::{Error, Result};
use crate::percent;

/// What the URL says. Holds a password: it is never shown, nor printed for debugging.
#[derive(Clone, Default)]
pub struct AmqpUrl {
    /// One for each host, to be tried in turn.
    pub uris: Vec<AMQPUri>,
    pub ca_cert: Option<PathBuf>,
    pub client_cert: Option<PathBuf>,
    pub client_key: Option<PathBuf>,
    /// What was given and has no effect, for the log.
    pub warnings: Vec<String>,
}

/// Parameters of RabbitMQ's own clients that change nothing here.
const WITHOUT_EFFECT: [&str; 9] = [
    "blocked_connection_timeout",
    "connection_attempts",
    "depth",
    "fail_if_no_peer_cert",
    "locale",
    "name",
    "retry_delay",
    "socket_timeout",
    "stack_timeout",
];

fn wrong(what: &str) -> Error {
    Error::Configuration(format!("AMQP_URL is malformed: {what}"))
}

fn decode(text: &str) -> Result<String> {
    percent::decode(text).ok_or_else(|| {
        wrong("a % is followed by two hexadecimal digits, which give UTF-8 and no NUL; a % itself is written %25")
    })
}

impl AmqpUrl {
    pub fn parse(text: &str) -> Result<Self> {
        let (scheme, rest) = text.split_once("://").unwrap_or_default();
        let scheme = match scheme.to_ascii_lowercase().as_str() {
            "amqp" => AMQPScheme::AMQP,
            "amqps" => AMQPScheme::AMQPS,
            _ => return Err(wrong("it must begin with amqp:// or amqps://")),
        };
        if rest.contains(|c: char| c == '#' || c.is_whitespace() || c.is_control()) {
            return Err(wrong("#, spaces and control characters are written with %, such as %23"));
        }
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        // What follows a password's own slash or question mark would be taken for a virtual host, and shown as one.
        if path.contains('@') || query.contains('@') {
            return Err(wrong("an @ after the host is written %40; / and ? in a password are written %2F and %3F"));
        }
        let mut url = AmqpUrl::default();
        let query = url.read_query(query)?;
        let (login, hosts) = match authority.split_once('@') {
            Some((_, hosts)) if hosts.contains('@') => {
                return Err(wrong("an @ in a user or a password is written %40"));
            }
            Some((login, hosts)) => (Some(login), hosts),
            None => (None, authority),
        };
        let userinfo = read_login(login, query.auth_mechanism)?;
        let vhost = Some(decode(path)?).filter(|vhost| !vhost.is_empty()).unwrap_or_else(|| "/".into());
        if vhost.len() > 255 {
            return Err(wrong("a virtual host has at most 255 bytes"));
        }
        for host in hosts.split(',') {
            let (host, port) = read_host(host, scheme.default_port())?;
            let authority = AMQPAuthority { userinfo: userinfo.clone(), host, port };
            url.uris.push(AMQPUri { scheme: scheme.clone(), authority, vhost: vhost.clone(), query: query.clone() });
        }
        Ok(url)
    }

    fn read_query(&mut self, text: &str) -> Result<AMQPQueryString> {
        let mut query = AMQPQueryString::default();
        for pair in text.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').ok_or_else(|| wrong("a parameter has no value"))?;
            let value = decode(value)?;
            match key {
                "heartbeat" => query.heartbeat = Some(number(key, &value)?),
                "channel_max" => query.channel_max = Some(number(key, &value)?),
                "connection_timeout" => query.connection_timeout = Some(number(key, &value)?),
                "frame_max" => {
                    let bytes = number(key, &value)?;
                    if bytes != 0 && bytes < 4096 {
                        return Err(wrong("frame_max must be 0 or at least 4096"));
                    }
                    query.frame_max = Some(bytes);
                }
                "auth_mechanism" => query.auth_mechanism = Some(mechanism(&value)?),
                "cacertfile" => self.ca_cert = Some(value.into()),
                "certfile" => self.client_cert = Some(value.into()),
                "keyfile" => self.client_key = Some(value.into()),
                "verify" if value == "verify_peer" => {}
                "verify" => return Err(wrong("amqps always verifies who answers: give its authority in AMQP_CA_CERT")),
                key if WITHOUT_EFFECT.contains(&key) => {
                    self.warnings.push(format!("{key} of AMQP_URL has no effect here"));
                }
                _ => {
                    return Err(wrong(
                        "an unknown parameter; known are heartbeat, frame_max, channel_max, connection_timeout, \
                         auth_mechanism, cacertfile, certfile, keyfile and verify",
                    ));
                }
            }
        }
        Ok(query)
    }
}

fn number<T: FromStr>(key: &str, value: &str) -> Result<T> {
    value.parse().map_err(|_| wrong(&format!("{key} must be a whole number that fits")))
}

fn mechanism(value: &str) -> Result<SASLMechanism> {
    match value.to_ascii_lowercase().as_str() {
        "plain" => Ok(SASLMechanism::Plain),
        "amqplain" => Ok(SASLMechanism::AMQPlain),
        "external" => Ok(SASLMechanism::External),
        _ => Err(wrong("auth_mechanism must be plain, amqplain or external")),
    }
}

/// Without a login RabbitMQ's own is meant; half of one is a slip.
fn read_login(login: Option<&str>, mechanism: Option<SASLMechanism>) -> Result<AMQPUserInfo> {
    let Some(login) = login else {
        return Ok(AMQPUserInfo { username: "guest".into(), password: "guest".into() });
    };
    let (user, password) = match login.split_once(':') {
        Some((user, password)) => (decode(user)?, decode(password)?),
        None if mechanism == Some(SASLMechanism::External) => (decode(login)?, String::new()),
        None => return Err(wrong("it names a user and no password")),
    };
    match user.is_empty() {
        true => Err(wrong("it has a password and no user")),
        false => Ok(AMQPUserInfo { username: user, password }),
    }
}

fn read_host(text: &str, default_port: u16) -> Result<(String, u16)> {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']').ok_or_else(|| wrong("a [ is not closed"))?;
            let address: Ipv6Addr = host.parse().map_err(|_| wrong("between [ and ] stands no IPv6 address"))?;
            let port = match port.strip_prefix(':') {
                Some(port) => port,
                None if port.is_empty() => "",
                None => return Err(wrong("after ] comes a port or nothing")),
            };
            (address.to_string(), port)
        }
        None => {
            let (host, port) = text.split_once(':').unwrap_or((text, ""));
            (name(&decode(host)?)?, port)
        }
    };
    let port = match port {
        "" => default_port,
        port => {
            let given = port.parse().ok().filter(|port| *port > 0);
            given.ok_or_else(|| wrong("the port must be from 1 to 65535; an IPv6 address stands between [ and ]"))?
        }
    };
    Ok((host, port))
}

/// Anything else could be a piece of a password, and would be looked up and logged.
fn name(host: &str) -> Result<String> {
    let named = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    match host {
        "" => Err(wrong("it names no host")),
        host if host.chars().all(named) => Ok(host.to_owned()),
        _ => Err(wrong("the host must be a name of ASCII letters, digits, dots and hyphens, or an IP address")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn one(text: &str) -> AMQPUri {
        let url = AmqpUrl::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
        assert_eq!(url.uris.len(), 1, "{text}");
        url.uris.into_iter().next().unwrap()
    }

    #[test]
    fn the_login_goes_to_the_host_that_is_named() {
        for (text, host, port, vhost) in [
            ("amqp://u:p@[fd00::5]/", "fd00::5", 5672, "/"),
            ("amqps://u:p@[FD00:0::5]:7/%2f", "fd00::5", 7, "/"),
            ("amqp://u:p@10.0.0.1", "10.0.0.1", 5672, "/"),
            ("AMQPS://u:p@rabbit_1.example.com/a%2Fb", "rabbit_1.example.com", 5671, "a/b"),
            ("amqp://u:p@h//", "h", 5672, "/"),
            ("amqp://u:p@h:/v", "h", 5672, "v"),
        ] {
            let uri = one(text);
            assert_eq!((&*uri.authority.host, uri.authority.port, &*uri.vhost), (host, port, vhost), "{text}");
        }
        let uri = one("amqp://a%40b:c%3A%2Fd:e@h");
        assert_eq!((&*uri.authority.userinfo.username, &*uri.authority.userinfo.password), ("a@b", "c:/d:e"));
        assert_eq!(one("amqp://h").authority.userinfo.username, "guest");
        assert_eq!(one("amqps://u@h?auth_mechanism=EXTERNAL").authority.userinfo.password, "");
    }

    #[test]
    fn several_hosts_are_tried_in_turn() {
        let url = AmqpUrl::parse("amqp://u:p@h1,[::1]:1,h2:5673/v").ok().unwrap();
        let hosts: Vec<_> = url.uris.iter().map(|uri| (uri.authority.host.as_str(), uri.authority.port)).collect();
        assert_eq!(hosts, [("h1", 5672), ("::1", 1), ("h2", 5673)]);
        assert!(url.uris.iter().all(|uri| uri.vhost == "v" && uri.authority.userinfo.password == "p"));
    }

    #[test]
    fn parameters_are_known_and_in_range() {
        let uri = one("amqp://h?heartbeat=5&frame_max=4096&channel_max=7&connection_timeout=3000&verify=verify_peer");
        assert_eq!((uri.query.heartbeat, uri.query.frame_max, uri.query.channel_max), (Some(5), Some(4096), Some(7)));
        assert_eq!(uri.query.connection_timeout, Some(3000));
        let url = AmqpUrl::parse("amqps://h/?cacertfile=%2Fca&certfile=/c&keyfile=/k&retry_delay=3").ok().unwrap();
        assert_eq!(url.ca_cert.as_deref(), Some("/ca".as_ref()));
        assert!(url.client_cert.is_some() && url.client_key.is_some() && url.warnings.len() == 1);
    }

    #[test]
    fn what_is_wrong_is_refused_and_not_shown() {
        for text in [
            "hunter2",
            "http://u:hunter2@h",
            "amqp:u:hunter2@h",
            "amqp://u:hunter2@",
            "amqp://u:hunter2@/v",
            "amqp:///hunter2",
            "amqp://u:hunter2@:5672",
            "amqp://hunter2@h",
            "amqp://:hunter2@h",
            "amqp://u:hunter2@h:0",
            "amqp://u:hunter2@h:65536",
            "amqp://u:hunter2@fd00::5/",
            "amqp://u:hunter2@[fd00::5%25eth0]/",
            "amqp://u:hunter2@[fd00::5/",
            "amqp://u:hunter2@[fd00::5]x/",
            "amqp://u:p@hunter2@h",
            "amqp://u:1/hunter2@h",
            "amqp://u:1?hunter2@h",
            "amqp://u:1#hunter2@h",
            "amqp://u:hunter2 x@h",
            "amqp://u:hunter2%@h",
            "amqp://u:hunter2@h\u{e9}",
            "amqp://u:hunter2@h/%ff",
            "amqp://u:hunter2@h?frame_max=1",
            "amqp://u:hunter2@h?heartbeat=70000",
            "amqp://u:p@h?hunter2=1",
            "amqp://u:p@h?hunter2",
            "amqps://u:hunter2@h?verify=verify_none",
            "amqp://u:hunter2@h?auth_mechanism=hunter2",
            "amqp://u:hunter2@h,/v",
        ] {
            let error = AmqpUrl::parse(text).err().expect(text).to_string();
            assert!(!error.contains("hunter2") && !error.contains('\n'), "{error}");
        }
        assert!(AmqpUrl::parse(&format!("amqp://h/{}", "v".repeat(256))).is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "(amqps?://)?.{0,60}") {
            let _read = AmqpUrl::parse(&text);
        }

        #[test]
        fn a_password_is_in_no_error_and_in_no_other_part(
            before in "[a-z%@:/?#,\\[\\]]{0,6}", after in "[a-z%@:/?#,\\[\\]&=]{0,12}", user in "[a-z%:]{0,4}",
        ) {
            match AmqpUrl::parse(&format!("amqp://{user}:{before}s3cr3t@h{after}")) {
                Ok(url) => for uri in url.uris {
                    prop_assert!(!uri.vhost.contains("s3cr3t") && !uri.authority.host.contains("s3cr3t"));
                },
                Err(error) => prop_assert!(!error.to_string().contains("s3cr3t"), "{error}"),
            }
        }
    }
}

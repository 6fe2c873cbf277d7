//! The two forms of a connection string, read as libpq reads them: `postgres://…` and `key=value …`. No error shows any
//! part of the string: each could be a password.
//!
//! Source: PostgreSQL's `fe-connect.c`, `conninfo_uri_parse_options` and `conninfo_parse`.

use crate::error::{Error, Result};
use crate::percent;

/// Keys and their values, in the order in which they were given.
pub type Params = Vec<(String, String)>;

pub fn parse(text: &str) -> Result<Params> {
    match text.split_once("://") {
        Some(("postgres" | "postgresql", rest)) => parse_url(rest),
        // Letters alone, so no `key=value`.
        Some((scheme, _)) if scheme.chars().all(|c| c.is_ascii_alphanumeric()) => {
            Err(invalid("a URL must begin with postgres:// or postgresql://"))
        }
        _ => parse_pairs(text),
    }
}

pub fn invalid(what: &str) -> Error {
    Error::Configuration(format!("DATABASE_URL is not a valid connection string: {what}"))
}

fn parse_url(rest: &str) -> Result<Params> {
    let (rest, query) = rest.split_once('?').map_or((rest, None), |(rest, query)| (rest, Some(query)));
    let (authority, database) = rest.split_once('/').map_or((rest, ""), |(authority, path)| (authority, path));
    let mut params = Params::new();
    let hosts = match authority.split_once('@') {
        Some((_, hosts)) if hosts.contains('@') => return Err(invalid("an @ in a user or a password is written %40")),
        Some((login, hosts)) => {
            let (user, password) = login.split_once(':').map_or((login, ""), |(user, password)| (user, password));
            push(&mut params, "user", user)?;
            push(&mut params, "password", password)?;
            hosts
        }
        None => authority,
    };
    // What follows a password's own slash or question mark would be taken for a database, and shown as one.
    if database.contains('@') || query.is_some_and(|query| query.contains('@')) {
        return Err(invalid("an @ after the host is written %40; / and ? in a password are written %2F and %3F"));
    }
    parse_hosts(hosts, &mut params)?;
    push(&mut params, "dbname", database)?;
    for pair in query.unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').ok_or_else(|| invalid("a key has no value"))?;
        match (decode(key)?.as_str(), value) {
            // JDBC's word for it, which libpq takes too.
            ("ssl", "true") => params.push(("sslmode".into(), "require".into())),
            (key, value) => params.push((key.to_owned(), decode(value)?)),
        }
    }
    Ok(params)
}

/// An empty part of the URL leaves its key to what the environment says.
fn push(params: &mut Params, key: &str, encoded: &str) -> Result<()> {
    if !encoded.is_empty() {
        params.push((key.into(), decode(encoded)?));
    }
    Ok(())
}

/// `host:port,[v6]:port,…`, into one list each of `host` and `port`.
fn parse_hosts(text: &str, params: &mut Params) -> Result<()> {
    let (mut hosts, mut ports) = (Vec::new(), Vec::new());
    for one in text.split(',') {
        let (host, port) = match one.strip_prefix('[') {
            Some(rest) => {
                let (host, port) = rest.split_once(']').ok_or_else(|| invalid("a [ is not closed"))?;
                if !port.is_empty() && !port.starts_with(':') {
                    return Err(invalid("after ] comes a port or nothing"));
                }
                (host, port.trim_start_matches(':'))
            }
            None => one.split_once(':').unwrap_or((one, "")),
        };
        hosts.push(decode(host)?);
        ports.push(decode(port)?);
    }
    if hosts.iter().any(|host| !host.is_empty()) {
        params.push(("host".into(), hosts.join(",")));
    }
    if ports.iter().any(|port| !port.is_empty()) {
        params.push(("port".into(), ports.join(",")));
    }
    Ok(())
}

fn decode(text: &str) -> Result<String> {
    percent::decode(text).ok_or_else(|| {
        invalid("a % is followed by two hexadecimal digits, which give UTF-8 and no NUL; a % itself is written %25")
    })
}

fn parse_pairs(text: &str) -> Result<Params> {
    let mut params = Params::new();
    let mut chars = text.chars().peekable();
    loop {
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        if chars.peek().is_none() {
            return Ok(params);
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
        params.push((key, pair_value(&mut chars)?));
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

    fn read(text: &str) -> Vec<(String, String)> {
        parse(text).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    fn pairs(of: &[(&str, &str)]) -> Params {
        of.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn urls_are_read_as_libpq_reads_them() {
        for (url, expected) in [
            ("postgres://", &[][..]),
            ("postgresql:///db", &[("dbname", "db")]),
            ("postgres://u@h", &[("user", "u"), ("host", "h")]),
            ("postgres://u:a%40b%2F:c@h/d", &[("user", "u"), ("password", "a@b/:c"), ("host", "h"), ("dbname", "d")]),
            ("postgres://[fd00::5]:7/", &[("host", "fd00::5"), ("port", "7")]),
            ("postgres://[::1],b:2,c", &[("host", "::1,b,c"), ("port", ",2,")]),
            ("postgres://%2Frun%2Fpg/db", &[("host", "/run/pg"), ("dbname", "db")]),
            ("postgres:///db?host=/run&sslmode=a%20b&", &[("dbname", "db"), ("host", "/run"), ("sslmode", "a b")]),
            ("postgres://h?ssl=true", &[("host", "h"), ("sslmode", "require")]),
        ] {
            assert_eq!(read(url), pairs(expected), "{url}");
        }
    }

    #[test]
    fn pairs_may_be_quoted_and_spaced() {
        let text = r"host = h  password='it''s' options='-c a=b\ c' user=a\'b empty=''";
        let Err(error) = parse(text) else { panic!("'' inside quotes ends them") };
        assert!(!error.to_string().contains("it"), "{error}");
        let text = r"host = h  password='it\'s' options='-c a=b\\ c' user=a\'b empty=''";
        let expected = [("host", "h"), ("password", "it's"), ("options", r"-c a=b\ c"), ("user", "a'b"), ("empty", "")];
        assert_eq!(read(text), pairs(&expected));
    }

    #[test]
    fn what_could_be_a_piece_of_a_password_is_refused_and_not_shown() {
        for text in [
            "postgres://u:hunter2@secret@h/db",
            "postgres://u:12/hunter2@h/db",
            "postgres://u:12?hunter2@h/db",
            "postgres://u:hunter2%@h/db",
            "postgres://u:hunter2%zz@h/db",
            "postgres://u:hunter2%ff@h/db",
            "postgres://u:hunter2%00@h/db",
            "postgres://u:hunter2@[::1/db",
            "postgres://u:hunter2@[::1]hunter2/db",
            "postgres://h/db?hunter2",
            "mysql://u:hunter2@h/db",
            "hunter2",
            "host=a password='hunter2",
        ] {
            let Err(error) = parse(text) else { panic!("{text}") };
            let error = error.to_string();
            assert!(!error.contains("hunter2") && !error.contains("secret") && !error.contains('\n'), "{error}");
        }
    }
}

//! What libpq takes from elsewhere than the connection string: the environment, a service file, a password file.
//!
//! The string wins over the service, the service over the environment, all of them over the defaults.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::params::{Params, invalid};
use crate::error::{Error, Result};

/// Variables, as libpq names them, and the keys that they stand for.
const ENVIRONMENT: [(&str, &str); 29] = [
    ("PGHOST", "host"),
    ("PGHOSTADDR", "hostaddr"),
    ("PGPORT", "port"),
    ("PGDATABASE", "dbname"),
    ("PGUSER", "user"),
    ("PGPASSWORD", "password"),
    ("PGPASSFILE", "passfile"),
    ("PGSERVICE", "service"),
    ("PGOPTIONS", "options"),
    ("PGAPPNAME", "application_name"),
    ("PGCONNECT_TIMEOUT", "connect_timeout"),
    ("PGTARGETSESSIONATTRS", "target_session_attrs"),
    ("PGLOADBALANCEHOSTS", "load_balance_hosts"),
    ("PGCHANNELBINDING", "channel_binding"),
    ("PGREQUIREAUTH", "require_auth"),
    ("PGREQUIREPEER", "requirepeer"),
    ("PGSSLMODE", "sslmode"),
    ("PGSSLNEGOTIATION", "sslnegotiation"),
    ("PGSSLROOTCERT", "sslrootcert"),
    ("PGSSLCERT", "sslcert"),
    ("PGSSLKEY", "sslkey"),
    ("PGSSLCRL", "sslcrl"),
    ("PGSSLCRLDIR", "sslcrldir"),
    ("PGSSLCERTMODE", "sslcertmode"),
    ("PGSSLSNI", "sslsni"),
    ("PGSSLMINPROTOCOLVERSION", "ssl_min_protocol_version"),
    ("PGSSLMAXPROTOCOLVERSION", "ssl_max_protocol_version"),
    ("PGGSSENCMODE", "gssencmode"),
    ("PGKRBSRVNAME", "krbsrvname"),
];

/// Variables by name; the tests have their own.
pub type Variables<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Whether the environment says where PostgreSQL is, so that a connection string may be left out.
pub fn says_where(variables: Variables) -> bool {
    ["PGHOST", "PGHOSTADDR", "PGSERVICE"].iter().any(|name| set(variables, name).is_some())
}

/// All keys from all places.
pub fn gather(given: Params, variables: Variables) -> Result<BTreeMap<String, String>> {
    let mut keys: BTreeMap<String, String> =
        ENVIRONMENT.iter().filter_map(|(name, key)| Some(((*key).to_owned(), set(variables, name)?))).collect();
    // Another host of the string than the one of the environment does not have that one's address.
    if given.iter().any(|(key, _)| key == "host" || key == "hostaddr") {
        keys.remove("host");
        keys.remove("hostaddr");
    }
    let service = given.iter().rfind(|(key, _)| key == "service").map(|(_, name)| name.clone());
    if let Some(service) = service.or_else(|| keys.get("service").cloned()) {
        let file = given.iter().rfind(|(key, _)| key == "servicefile").map(|(_, path)| PathBuf::from(path));
        keys.extend(read_service(&service, file, variables)?);
    }
    keys.extend(given);
    Ok(keys)
}

fn set(variables: Variables, name: &str) -> Option<String> {
    variables(name).filter(|value| !value.is_empty())
}

fn home(variables: Variables) -> Option<PathBuf> {
    set(variables, "HOME").map(PathBuf::from)
}

fn read_service(name: &str, file: Option<PathBuf>, variables: Variables) -> Result<Params> {
    let own = file
        .or_else(|| set(variables, "PGSERVICEFILE").map(PathBuf::from))
        .or_else(|| Some(home(variables)?.join(".pg_service.conf")));
    let system = set(variables, "PGSYSCONFDIR").unwrap_or_else(|| "/etc/postgresql-common".into());
    for path in own.into_iter().chain([Path::new(&system).join("pg_service.conf")]) {
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        if let Some(params) = service_of(&text, name)? {
            return Ok(params);
        }
    }
    Err(Error::Configuration("the service of PGSERVICE or of the connection string is in no service file".into()))
}

/// The lines of `[name]`; `None` if there is no such section.
fn service_of(text: &str, name: &str) -> Result<Option<Params>> {
    let mut found = None;
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        match line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            Some(_) if found.is_some() => break,
            Some(section) if section == name => found = Some(Params::new()),
            Some(_) => {}
            None => {
                if let Some(params) = &mut found {
                    let (key, value) =
                        line.split_once('=').ok_or_else(|| invalid("a service has a key without value"))?;
                    params.push((key.trim().to_owned(), value.trim().to_owned()));
                }
            }
        }
    }
    Ok(found)
}

/// The entries of a password file.
pub struct PasswordFile(Vec<[String; 5]>);

impl PasswordFile {
    /// `passfile`, or `~/.pgpass`; without entries when it is not there or when others may read it, as in libpq.
    pub fn read(passfile: Option<&str>, variables: Variables, warnings: &mut Vec<String>) -> Self {
        let path = passfile.map(PathBuf::from).or_else(|| Some(home(variables)?.join(".pgpass")));
        let text = path.filter(|path| is_private(path, warnings)).and_then(|path| std::fs::read_to_string(path).ok());
        PasswordFile(text.unwrap_or_default().lines().filter_map(entry).collect())
    }

    /// The password of the first entry that fits.
    pub fn password(&self, host: &str, port: u16, database: &str, user: &str) -> Option<&str> {
        let port = port.to_string();
        let wanted = [host, &port, database, user];
        let fits = |entry: &&[String; 5]| wanted.iter().zip(entry.iter()).all(|(is, of)| of == "*" || of == is);
        self.0.iter().find(fits).map(|[.., password]| password.as_str())
    }
}

fn is_private(path: &Path, warnings: &mut Vec<String>) -> bool {
    let Ok(found) = std::fs::metadata(path) else { return false };
    let private = found.is_file() && found.permissions().mode() & 0o077 == 0;
    if !private {
        warnings.push("the password file is not used: it is no plain file, or others than its owner may use it".into());
    }
    private
}

/// `host:port:database:user:password`, where a backslash takes the next character as it is.
fn entry(line: &str) -> Option<[String; 5]> {
    if line.starts_with('#') {
        return None;
    }
    let mut fields = vec![String::new()];
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => fields.last_mut()?.extend(chars.next()),
            ':' if fields.len() < 5 => fields.push(String::new()),
            c => fields.last_mut()?.push(c),
        }
    }
    fields.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn none(_: &str) -> Option<String> {
        None
    }

    #[test]
    fn the_string_wins_over_the_environment() {
        let environment = |name: &str| match name {
            "PGHOST" => Some("env".to_owned()),
            "PGHOSTADDR" => Some("10.0.0.1".to_owned()),
            "PGUSER" => Some("someone".to_owned()),
            "PGSSLMODE" => Some(String::new()),
            _ => None,
        };
        let keys = gather(vec![("host".into(), "h".into())], &environment).ok().unwrap();
        assert_eq!(keys.get("host").map(String::as_str), Some("h"));
        assert_eq!(keys.get("hostaddr"), None);
        assert_eq!(keys.get("user").map(String::as_str), Some("someone"));
        assert_eq!(keys.get("sslmode"), None);
        assert!(says_where(&environment) && !says_where(&none));
    }

    #[test]
    fn a_service_is_a_section_of_a_file() {
        let text = "# all\n[a]\nhost=one\n\n[b]\nhost = two\nport=7\n[c]\nhost=three";
        let read = service_of(text, "b").ok().flatten().unwrap();
        assert_eq!(read, [("host".to_owned(), "two".to_owned()), ("port".to_owned(), "7".to_owned())]);
        assert!(service_of(text, "d").is_ok_and(|found| found.is_none()));
        assert!(
            gather(vec![("service".into(), "x".into()), ("servicefile".into(), "/nowhere".into())], &none).is_err()
        );
    }

    #[test]
    fn the_first_entry_that_fits_gives_the_password() {
        let text = "# no\nh:5432:db:u:a\\:b\\\\c\n*:*:*:u:other:with:colons\nshort:1";
        let file = PasswordFile(text.lines().filter_map(entry).collect());
        assert_eq!(file.password("h", 5432, "db", "u"), Some(r"a:b\c"));
        assert_eq!(file.password("h", 5433, "db", "u"), Some("other:with:colons"));
        assert_eq!(file.password("h", 5432, "db", "v"), None);
    }

    #[test]
    fn a_password_file_that_others_may_read_is_not_used() {
        let path = std::env::temp_dir().join(format!("outbox-relay-pgpass-{}", std::process::id()));
        std::fs::write(&path, "*:*:*:*:pw").unwrap();
        for (mode, found) in [(0o600, Some("pw")), (0o640, None), (0o604, None)] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            let mut warnings = Vec::new();
            let file = PasswordFile::read(path.to_str(), &none, &mut warnings);
            assert_eq!(file.password("h", 1, "d", "u"), found, "{mode:o}");
            assert_eq!(warnings.is_empty(), found.is_some());
        }
        std::fs::remove_file(&path).unwrap();
    }
}

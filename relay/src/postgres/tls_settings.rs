//! What the connection string says of TLS.

use std::path::{Path, PathBuf};

use tokio_postgres::config::SslMode as TlsUse;

use super::params::invalid;
use crate::error::Result;

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

/// Where the certificates are, and which versions of TLS will do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsSettings {
    pub mode: SslMode,
    /// `None`: libpq's default file, when it exists. `Some("system")`: the system's trusted certificates.
    pub root_cert: Option<PathBuf>,
    pub cert: Option<PathBuf>,
    pub key: Option<PathBuf>,
    /// Revoked certificates.
    pub crl: Option<PathBuf>,
    pub tls12: bool,
    pub tls13: bool,
}

impl TlsSettings {
    pub const KEYS: [&str; 9] = [
        "sslcert",
        "sslcertmode",
        "sslcrl",
        "sslkey",
        "sslmode",
        "sslnegotiation",
        "sslrootcert",
        "ssl_max_protocol_version",
        "ssl_min_protocol_version",
    ];

    pub fn read<'a>(get: &dyn Fn(&str) -> Option<&'a str>) -> Result<Self> {
        let path = |key: &str| get(key).map(PathBuf::from);
        let sends = sends_certificate(get("sslcertmode"))?;
        let (at_least, at_most) =
            (version(get, "ssl_min_protocol_version")?, version(get, "ssl_max_protocol_version")?);
        let root_cert = path("sslrootcert");
        let system = root_cert.as_deref().is_some_and(|path| path == Path::new("system"));
        // As libpq: the system's authorities vouch for any name, so names are verified with them.
        let default = if system { SslMode::VerifyFull } else { SslMode::Prefer };
        let settings = TlsSettings {
            mode: get("sslmode").map(ssl_mode).transpose()?.unwrap_or(default),
            root_cert,
            cert: path("sslcert").filter(|_| sends),
            key: path("sslkey").filter(|_| sends),
            crl: path("sslcrl"),
            tls12: at_least.is_none_or(|version| version <= 12) && at_most.is_none_or(|version| version >= 12),
            tls13: at_least.is_none_or(|version| version <= 13) && at_most.is_none_or(|version| version >= 13),
        };
        settings.check(system)?;
        Ok(settings)
    }

    fn check(&self, system: bool) -> Result<()> {
        if self.cert.is_some() != self.key.is_some() {
            return Err(invalid("sslcert and sslkey go together"));
        }
        if system && self.mode != SslMode::VerifyFull {
            return Err(invalid("sslrootcert=system needs sslmode=verify-full"));
        }
        if !self.tls12 && !self.tls13 {
            return Err(invalid("no version of TLS is allowed that the relay can use: TLSv1.2, TLSv1.3"));
        }
        Ok(())
    }

    /// What the first attempt does; `allow` has a second one.
    pub fn first_use(&self) -> TlsUse {
        match self.mode {
            SslMode::Disable | SslMode::Allow => TlsUse::Disable,
            SslMode::Prefer => TlsUse::Prefer,
            SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => TlsUse::Require,
        }
    }
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

/// Nobody here can tell whether the server asked for the certificate, as `require` promises.
fn sends_certificate(mode: Option<&str>) -> Result<bool> {
    match mode {
        None | Some("allow") => Ok(true),
        Some("disable") => Ok(false),
        Some(_) => Err(invalid("sslcertmode must be allow or disable")),
    }
}

/// 10 to 13.
fn version<'a>(get: &dyn Fn(&str) -> Option<&'a str>, key: &str) -> Result<Option<u8>> {
    match get(key).map(str::to_ascii_lowercase).as_deref() {
        None => Ok(None),
        Some("tlsv1") => Ok(Some(10)),
        Some("tlsv1.1") => Ok(Some(11)),
        Some("tlsv1.2") => Ok(Some(12)),
        Some("tlsv1.3") => Ok(Some(13)),
        Some(_) => Err(invalid(&format!("{key} must be TLSv1, TLSv1.1, TLSv1.2 or TLSv1.3"))),
    }
}

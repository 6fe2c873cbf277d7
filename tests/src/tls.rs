//! A private certificate authority, made with `openssl`.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::process::{Account, run};
use crate::scratch;

const CONFIGURATION: &str = "[req]
distinguished_name = name
[name]
[ca]
basicConstraints = critical, CA:true
keyUsage = critical, keyCertSign
[leaf]
basicConstraints = critical, CA:false
subjectAltName = $ENV::NAMES
extendedKeyUsage = serverAuth, clientAuth
";

/// What a certificate is good for unless a test says otherwise.
const LOCAL: &str = "IP:127.0.0.1, DNS:localhost";

/// Signs certificates.
pub struct Authority {
    dir: PathBuf,
}

/// Where a certificate and its key are, as PEM. The servers' account can read them.
pub struct Identity {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

impl Authority {
    pub fn new() -> Result<Self> {
        let authority = Authority { dir: scratch::dir("tls")? };
        fs::write(authority.file("openssl.cnf"), CONFIGURATION)?;
        authority.make("ca", LOCAL, &["-extensions", "ca"])?;
        Ok(authority)
    }

    /// The authority's own certificate.
    pub fn certificate(&self) -> PathBuf {
        self.file("ca.pem")
    }

    /// For 127.0.0.1 and localhost.
    pub fn issue(&self, name: &str) -> Result<Identity> {
        self.issue_for(name, LOCAL)
    }

    /// For these names, as OpenSSL writes them: `IP:127.0.0.1`.
    pub fn issue_for(&self, name: &str, names: &str) -> Result<Identity> {
        let (ca, ca_key) = (self.file("ca.pem"), self.file("ca.key"));
        let (ca, ca_key) = (ca.to_string_lossy(), ca_key.to_string_lossy());
        self.make(name, names, &["-extensions", "leaf", "-CA", &ca, "-CAkey", &ca_key])?;
        Ok(Identity { certificate: self.file(&format!("{name}.pem")), key: self.file(&format!("{name}.key")) })
    }

    fn make(&self, name: &str, names: &str, arguments: &[&str]) -> Result<()> {
        let mut openssl = Command::new("openssl");
        openssl.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc", "-days", "2"]);
        openssl
            .env("NAMES", names)
            .arg("-config")
            .arg(self.file("openssl.cnf"))
            .arg("-subj")
            .arg(format!("/CN={name}"))
            .args(arguments);
        openssl.arg("-out").arg(self.file(&format!("{name}.pem")));
        openssl.arg("-keyout").arg(self.file(&format!("{name}.key")));
        run(openssl)?;
        self.give(&self.file(&format!("{name}.pem")))?;
        self.give(&self.file(&format!("{name}.key")))
    }

    fn give(&self, file: &Path) -> Result<()> {
        fs::set_permissions(file, Permissions::from_mode(0o400))?;
        Account::of_servers()?.give(file)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

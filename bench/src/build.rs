//! Which build is measured. Others may install theirs on the same machine while a row runs; its figures would then be
//! of neither.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use outbox_tests::postgres::Installation;
use outbox_tests::{process, relay};
use serde::Serialize;

/// Fingerprints of what is installed now; equal ones are the same files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Build {
    library: String,
    sql: String,
    relay: String,
}

impl Build {
    pub fn installed() -> Result<Self> {
        let installation = Installation::get()?;
        let mut pg_config = Command::new(installation.bindir.join("pg_config"));
        pg_config.arg("--sharedir");
        let share = PathBuf::from(String::from_utf8(process::run(pg_config)?.stdout)?.trim()).join("extension");
        let mut scripts: Vec<PathBuf> = fs::read_dir(&share)?.flatten().map(|entry| entry.path()).collect();
        scripts.retain(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("pg_outbox")));
        scripts.sort();
        Ok(Build {
            library: fingerprint(&[installation.pkglibdir.join("pg_outbox.so")])?,
            sql: fingerprint(&scripts)?,
            relay: fingerprint(&[relay::binary()?])?,
        })
    }
}

fn fingerprint(files: &[PathBuf]) -> Result<String> {
    let mut hasher = DefaultHasher::new();
    for file in files {
        fs::read(file).with_context(|| file.display().to_string())?.hash(&mut hasher);
    }
    Ok(format!("{:016x}", hasher.finish()))
}

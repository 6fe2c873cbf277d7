//! An application of SQLAlchemy's and psycopg's, run by Python.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Result, anyhow};

use crate::process::run;

/// What the application saw of its outbox table in this database, which it left as it was.
pub fn session(url: &str) -> Result<String> {
    let program = include_str!("orm.py");
    let mut python = Command::new("python3");
    python.args(["-c", program, url]).env("PYTHONPATH", library()?);
    Ok(String::from_utf8(run(python)?.stdout)?)
}

fn library() -> Result<&'static PathBuf> {
    static LIBRARY: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let fetch = || {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/orm.sh");
        Ok(String::from_utf8(run(Command::new(script))?.stdout)?.trim().into())
    };
    LIBRARY
        .get_or_init(|| fetch().map_err(|error: anyhow::Error| format!("{error:#}")))
        .as_ref()
        .map_err(|error| anyhow!("{error}"))
}

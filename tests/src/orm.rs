//! Applications in other languages: the recipes of `examples/`, and one of SQLAlchemy's and psycopg's.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow};

use crate::process::run;

/// What the application saw of its outbox table in this database, which it left as it was.
pub fn session(url: &str) -> Result<String> {
    let program = include_str!("orm.py");
    let mut python = Command::new("python3");
    python.args(["-c", program, url]).env("PYTHONPATH", python_library()?);
    Ok(String::from_utf8(run(python)?.stdout)?)
}

/// Runs a file of `examples/` with a database.
pub fn recipe(file: &str, url: &str) -> Result<()> {
    let path = root().join("examples").join(file);
    let mut command = match path.extension().and_then(|ending| ending.to_str()) {
        Some("py") => {
            let mut python = Command::new("python3");
            // Leaves no compiled file in the repository.
            python.arg("-B").env("PYTHONPATH", python_library()?);
            python
        }
        Some("js") => {
            let mut node = Command::new("node");
            node.env("NODE_PATH", node_library()?);
            node
        }
        Some("rb") => Command::new("ruby"),
        _ => return Err(anyhow!("nobody runs {file}")),
    };
    command.arg(&path).env("DATABASE_URL", url);
    run(command).map(drop).with_context(|| file.to_owned())
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn python_library() -> Result<&'static PathBuf> {
    static LIBRARY: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    fetched(&LIBRARY, "orm.sh")
}

fn node_library() -> Result<&'static PathBuf> {
    static LIBRARY: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    fetched(&LIBRARY, "node-postgres.sh")
}

/// Where a script has put a library, which it did once.
fn fetched(library: &'static OnceLock<Result<PathBuf, String>>, script: &str) -> Result<&'static PathBuf> {
    let fetch = || {
        let script = root().join("scripts").join(script);
        Ok(String::from_utf8(run(Command::new(script))?.stdout)?.trim().into())
    };
    library
        .get_or_init(|| fetch().map_err(|error: anyhow::Error| format!("{error:#}")))
        .as_ref()
        .map_err(|error| anyhow!("{error}"))
}

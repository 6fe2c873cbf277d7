//! The reference library of Standard Webhooks, run by Python.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow, bail};

use crate::process::run;
use crate::receiver::Received;

const PROGRAM: &str = "
import json, sys
from standardwebhooks import Webhook, WebhookVerificationError
given = json.load(sys.stdin)
try:
    Webhook(given['secret']).verify(given['body'], given['headers'])
    print('verified')
except WebhookVerificationError as error:
    print('refused:', error)
";

/// Whether a receiver that knows this secret takes the request for genuine.
pub fn verifies(secret: &str, request: &Received) -> Result<bool> {
    let headers = ["webhook-id", "webhook-timestamp", "webhook-signature"];
    let headers: serde_json::Map<_, _> =
        headers.iter().map(|name| ((*name).into(), request.header(name).unwrap_or_default().into())).collect();
    let given = serde_json::json!({"secret": secret, "headers": headers, "body": std::str::from_utf8(&request.body)?});
    let mut python = Command::new("python3")
        .args(["-c", PROGRAM])
        .env("PYTHONPATH", library()?)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("can't start python3")?;
    // Dropped at once, which ends the input.
    python.stdin.take().context("no standard input")?.write_all(given.to_string().as_bytes())?;
    let output = python.wait_with_output()?;
    match String::from_utf8(output.stdout)?.trim() {
        "verified" => Ok(true),
        answer if answer.starts_with("refused:") => Ok(false),
        answer => bail!("python3 ended with {}: {answer}", output.status),
    }
}

fn library() -> Result<&'static PathBuf> {
    static LIBRARY: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let fetch = || {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/standardwebhooks.sh");
        Ok(String::from_utf8(run(Command::new(script))?.stdout)?.trim().into())
    };
    LIBRARY
        .get_or_init(|| fetch().map_err(|error: anyhow::Error| format!("{error:#}")))
        .as_ref()
        .map_err(|error| anyhow!("{error}"))
}

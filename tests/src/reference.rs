//! Who judges what the relay sends: the reference libraries of Standard Webhooks and of CloudEvents, run by Python, and
//! OpenSSL.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;

use crate::process::run;
use crate::queue::Message;
use crate::receiver::Received;

const VERIFY: &str = "
import json, sys
from standardwebhooks import Webhook, WebhookVerificationError
given = json.load(sys.stdin)
try:
    Webhook(given['secret']).verify(given['body'], given['headers'])
    print('verified')
except WebhookVerificationError as error:
    print('refused:', error)
";

const VERIFY_ED25519: &str = "
import base64, json, os, subprocess, sys, tempfile
given = json.load(sys.stdin)
public = base64.b64decode(given['public'])
found = False
with tempfile.TemporaryDirectory() as place:
    def put(name, content):
        path = os.path.join(place, name)
        open(path, 'wb').write(content)
        return path
    key = put('key', bytes.fromhex('302a300506032b6570032100') + public)
    message = put('message', given['message'].encode())
    for signature in given['signatures']:
        signature = put('signature', base64.b64decode(signature))
        verify = ['openssl', 'pkeyutl', '-verify', '-pubin', '-keyform', 'DER', '-inkey', key, '-rawin', '-in', message,
                  '-sigfile', signature]
        found = found or subprocess.run(verify, capture_output=True).returncode == 0
print('verified' if found else 'refused:')
";

const HMAC: &str = "
import hashlib, hmac, json, sys
given = json.load(sys.stdin)
print(hmac.new(given['key'].encode(), given['body'].encode(), hashlib.sha256).hexdigest())
";

const OVER_HTTP: &str = "
import json, sys
from cloudevents.core.bindings.http import HTTPMessage, from_http_event
given = json.load(sys.stdin)
event = from_http_event(HTTPMessage(given['headers'], given['body'].encode()))
print(json.dumps({'attributes': event.get_attributes(), 'data': event.get_data()}, default=lambda at: at.isoformat()))
";

const OVER_AMQP: &str = "
import json, sys
from cloudevents.core.bindings.amqp import AMQPMessage, from_amqp_event
given = json.load(sys.stdin)
event = from_amqp_event(AMQPMessage({'content-type': given['type']}, given['headers'], given['body'].encode()))
print(json.dumps({'attributes': event.get_attributes(), 'data': event.get_data()}, default=lambda at: at.isoformat()))
";

/// Whether a receiver that knows this secret takes the request for genuine.
pub fn verifies(secret: &str, request: &Received) -> Result<bool> {
    static LIBRARY: Library = Library::new("standardwebhooks.sh");
    let headers = ["webhook-id", "webhook-timestamp", "webhook-signature"];
    let headers: serde_json::Map<_, _> =
        headers.iter().map(|name| ((*name).into(), request.header(name).unwrap_or_default().into())).collect();
    let given = serde_json::json!({"secret": secret, "headers": headers, "body": std::str::from_utf8(&request.body)?});
    is_verified(&python(VERIFY, Some(&LIBRARY), &given)?)
}

fn is_verified(answer: &str) -> Result<bool> {
    match answer.trim() {
        "verified" => Ok(true),
        answer if answer.starts_with("refused:") => Ok(false),
        answer => bail!("python3 says {answer}"),
    }
}

/// Whether a receiver that knows this public key (`whpk_` and base64) takes the request for genuine.
pub fn verifies_asymmetrically(public: &str, request: &Received) -> Result<bool> {
    let public = public.strip_prefix("whpk_").context("no public key")?;
    let header = |name: &str| request.header(name).with_context(|| format!("no {name}"));
    let body = std::str::from_utf8(&request.body)?;
    let message = format!("{}.{}.{body}", header("webhook-id")?, header("webhook-timestamp")?);
    let signatures: Vec<&str> =
        header("webhook-signature")?.split(' ').filter_map(|one| one.strip_prefix("v1a,")).collect();
    let given = serde_json::json!({"public": public, "message": message, "signatures": signatures});
    is_verified(&python(VERIFY_ED25519, None, &given)?)
}

/// The hexadecimal digits of HMAC-SHA256 over a request's body.
pub fn hmac(key: &str, request: &Received) -> Result<String> {
    let given = serde_json::json!({"key": key, "body": std::str::from_utf8(&request.body)?});
    Ok(python(HMAC, None, &given)?.trim().to_owned())
}

static CLOUD_EVENTS: Library = Library::new("cloudevents.sh");

/// The event that a request carries: its `attributes` and its `data`.
pub fn cloud_event(request: &Received) -> Result<Value> {
    let headers = request.headers.iter().map(|(name, value)| Ok((name.to_string(), value.to_str()?.into())));
    let headers: serde_json::Map<_, Value> = headers.collect::<Result<_>>()?;
    let given = serde_json::json!({"headers": headers, "body": std::str::from_utf8(&request.body)?});
    Ok(serde_json::from_str(&python(OVER_HTTP, Some(&CLOUD_EVENTS), &given)?)?)
}

/// The same of a message.
pub fn cloud_event_of(message: &Message) -> Result<Value> {
    let (body, kind) = (std::str::from_utf8(&message.body)?, &message.content_type);
    let given = serde_json::json!({"headers": message.headers, "type": kind, "body": body});
    Ok(serde_json::from_str(&python(OVER_AMQP, Some(&CLOUD_EVENTS), &given)?)?)
}

/// What a program prints that reads this from its input.
fn python(program: &str, library: Option<&Library>, given: &Value) -> Result<String> {
    let mut command = Command::new("python3");
    if let Some(library) = library {
        command.env("PYTHONPATH", library.path()?);
    }
    let command = command.args(["-c", program]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut python = command.spawn().context("can't start python3")?;
    // Dropped at once, which ends the input.
    python.stdin.take().context("no standard input")?.write_all(given.to_string().as_bytes())?;
    let output = python.wait_with_output()?;
    ensure!(output.status.success(), "python3 ended with {}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}

/// Where a library is, downloaded once by a script.
struct Library {
    script: &'static str,
    path: OnceLock<Result<PathBuf, String>>,
}

impl Library {
    const fn new(script: &'static str) -> Self {
        Library { script, path: OnceLock::new() }
    }

    fn path(&self) -> Result<&PathBuf> {
        let fetch = || {
            let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts").join(self.script);
            Ok(String::from_utf8(run(Command::new(script))?.stdout)?.trim().into())
        };
        let path = self.path.get_or_init(|| fetch().map_err(|error: anyhow::Error| format!("{error:#}")));
        path.as_ref().map_err(|error| anyhow!("{error}"))
    }
}

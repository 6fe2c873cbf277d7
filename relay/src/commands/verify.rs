//! `verify`: whether a webhook's signature holds, and if not, what is wrong: a header, the timestamp, the secret or the body.
//!
//! Source: Standard Webhooks 1.0.0 (standardwebhooks.com). A signature alone can't tell whether the secret or the body is
//! another one; so the usual accidents are tried too: a body that was trimmed or written anew, a secret used as text.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::json;

use super::{Outcome, answer, time};
use crate::cli::Verify;
use crate::config::shown;
use crate::destination::signature::Key;
use crate::error::{Error, Result};

pub fn verify(given: &Verify) -> Result<Outcome> {
    let secret = text("secret", &given.secret_file)?;
    let headers = text("headers", &given.headers)?;
    let body = read("body", &given.body)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    let judged = judge(&secret, &headers, &body, now, given.tolerance);
    let (holds, why) = match &judged {
        Ok(()) => (true, "the signature holds".to_owned()),
        Err(Fault { why, .. }) => (false, why.clone()),
    };
    let fault = judged.err().map(|fault| fault.what);
    answer(&given.output, &json!({"holds": holds, "fault": fault, "detail": why}), || match fault {
        Some(fault) => format!("FAIL  {fault}: {why}\n"),
        None => format!("ok    {why}\n"),
    })?;
    Ok(Outcome::well_if(holds))
}

fn read(what: &str, path: &Path) -> Result<Vec<u8>> {
    let read = std::fs::read(path);
    read.map_err(|error| Error::Configuration(format!("the file of the {what}{} can't be read: {error}", shown(path))))
}

fn text(what: &str, path: &Path) -> Result<String> {
    let text = String::from_utf8(read(what, path)?);
    text.map_err(|_| Error::Configuration(format!("the file of the {what}{} is no text", shown(path))))
}

/// What is wrong: `header`, `timestamp`, `secret`, `body`, or `secret or body`, which look the same.
#[derive(Debug, PartialEq)]
struct Fault {
    what: &'static str,
    why: String,
}

fn fault<T>(what: &'static str, why: impl Into<String>) -> std::result::Result<T, Fault> {
    Err(Fault { what, why: why.into() })
}

fn judge(secret: &str, headers: &str, body: &[u8], now: f64, tolerance: Duration) -> std::result::Result<(), Fault> {
    let headers = parse_headers(headers);
    let header = |name: &'static str| match headers.get(name).map(String::as_str) {
        Some(value) if !value.is_empty() => Ok(value),
        Some(_) => fault("header", format!("{name} is empty")),
        None => fault("header", format!("{name} is missing")),
    };
    let (id, timestamp) = (header("webhook-id")?, header("webhook-timestamp")?);
    let signatures: Vec<&str> = header("webhook-signature")?.split_whitespace().collect();
    let Ok(sent) = timestamp.parse::<u64>() else {
        return fault("timestamp", "webhook-timestamp is not a whole number of seconds since 1970");
    };
    let key = key_of(secret)?;
    let mark = key.mark();
    if !signatures.iter().any(|signature| signature.starts_with(mark)) {
        return fault(
            "header",
            format!("webhook-signature holds no signature that begins with {mark} as this secret's do"),
        );
    }
    let holds = |key: &Key, body: &[u8]| signatures.iter().any(|signature| key.holds(signature, id, sent, body));
    if !holds(&key, body) {
        return why_not(secret, &key, body, holds);
    }
    in_time(sent, now, tolerance)
}

/// Lines `Name: value`; the first line of a request or an answer, and what has no colon, is passed over.
fn parse_headers(text: &str) -> HashMap<String, String> {
    let lines = text.lines().filter_map(|line| line.trim_start_matches(['<', '>', ' ']).split_once(':'));
    lines.map(|(name, value)| (name.trim().to_ascii_lowercase(), value.trim().to_owned())).collect()
}

/// `whsec_…`, also without its beginning, or the public key `whpk_…`.
fn key_of(secret: &str) -> std::result::Result<Key, Fault> {
    let secret = secret.trim();
    match Key::parse(secret).or_else(|_| Key::parse(&format!("whsec_{secret}"))) {
        _ if secret.is_empty() => fault("secret", "its file is empty"),
        Ok(key) => Ok(key),
        Err(_) => fault("secret", "it is not whsec_ (or whpk_, of a public key) and base64"),
    }
}

/// Receivers refuse what is old, so that nobody can send it again.
fn in_time(sent: u64, now: f64, tolerance: Duration) -> std::result::Result<(), Fault> {
    // No clock is that far in the future; milliseconds are.
    if sent > 100_000_000_000 {
        return fault("timestamp", "webhook-timestamp is in milliseconds, and has to be in seconds");
    }
    let age = now - sent as f64;
    let limit = time::shown(tolerance.as_secs_f64());
    if age > tolerance.as_secs_f64() {
        return fault("timestamp", format!("the signature holds, but is {} old, over {limit}", time::shown(age)));
    }
    if -age > tolerance.as_secs_f64() {
        let ahead = time::shown(-age);
        return fault("timestamp", format!("the signature holds, but is from {ahead} in the future, over {limit}"));
    }
    Ok(())
}

fn why_not(
    secret: &str,
    key: &Key,
    body: &[u8],
    holds: impl Fn(&Key, &[u8]) -> bool,
) -> std::result::Result<(), Fault> {
    for (how, other) in other_bodies(body) {
        if holds(key, &other) {
            return fault("body", format!("the signature is of another body: {how}"));
        }
    }
    let secret = secret.trim();
    for text in [secret, secret.strip_prefix("whsec_").unwrap_or(secret)] {
        if holds(&Key::of_text(text), body) {
            return fault(
                "secret",
                "whoever signed took the secret's text for the key; the key is its base64, decoded",
            );
        }
    }
    fault(
        "secret or body",
        "no signature is of this id, timestamp and body with this secret: either the secret is another one, or the body \
         (or webhook-id or webhook-timestamp) is not, byte for byte, what was signed",
    )
}

/// What bodies become on their way into a file, undone.
fn other_bodies(body: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    let trimmed = body.trim_ascii();
    let mut others = vec![
        ("without the white space around it", trimmed.to_vec()),
        ("with a line end after it", [trimmed, b"\n"].concat()),
        ("with other line ends", String::from_utf8_lossy(body).replace("\r\n", "\n").into_bytes()),
        ("empty", Vec::new()),
    ];
    if let Ok(value) = serde_json::from_slice::<serde_json::Value>(body) {
        others.push(("the same JSON, written without spaces", value.to_string().into_bytes()));
        others.push(("the same JSON, written with line ends", format!("{value:#}").into_bytes()));
    }
    others
}

#[cfg(test)]
mod tests {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;
    use hmac::{Hmac, KeyInit, Mac};
    use ring::signature::{Ed25519KeyPair, KeyPair};
    use sha2::Sha256;

    use super::*;

    const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\n";
    const HEADERS: &str = "POST /hook HTTP/1.1\r\nWebhook-Id: msg_p5jXN8AQM9LWM0D4loKWxJek\r\n\
                           webhook-timestamp: 1614265330\r\n\
                           webhook-signature: v1,AAAA v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=\r\n";
    const BODY: &[u8] = br#"{"test": 2432232314}"#;
    const NOW: f64 = 1_614_265_400.0;

    fn what(secret: &str, headers: &str, body: &[u8], now: f64) -> Option<&'static str> {
        judge(secret, headers, body, now, Duration::from_secs(300)).err().map(|fault| fault.what)
    }

    /// The example of the Standard Webhooks libraries.
    #[test]
    fn a_genuine_request_holds() {
        assert_eq!(what(SECRET, HEADERS, BODY, NOW), None);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let without = |name: &str| {
            HEADERS.lines().filter(|line| !line.to_lowercase().starts_with(name)).collect::<Vec<_>>().join("\n")
        };
        for name in ["webhook-id", "webhook-timestamp", "webhook-signature"] {
            let fault = judge(SECRET, &without(name), BODY, NOW, Duration::from_secs(300)).expect_err(name);
            assert_eq!(fault, Fault { what: "header", why: format!("{name} is missing") });
        }
        assert_eq!(what("hunter2!", HEADERS, BODY, NOW), Some("secret"));
        assert_eq!(what(" \n", HEADERS, BODY, NOW), Some("secret"));
        assert_eq!(what("whsec_AAAA", HEADERS, BODY, NOW), Some("secret or body"));
        assert_eq!(what(SECRET, HEADERS, b"{\"test\": 1}", NOW), Some("secret or body"));
        assert_eq!(what(SECRET, HEADERS, b"{\"test\": 2432232314}\n", NOW), Some("body"));
        assert_eq!(what(SECRET, HEADERS, BODY, NOW + 1000.0), Some("timestamp"));
        assert_eq!(what(SECRET, HEADERS, BODY, NOW - 1000.0), Some("timestamp"));
        assert_eq!(what(SECRET, &HEADERS.replace("1614265330", "soon"), BODY, NOW), Some("timestamp"));
        assert_eq!(what(SECRET, &HEADERS.replace("v1,", "v1a,"), BODY, NOW), Some("header"));
    }

    fn signed(signature: String) -> String {
        format!("webhook-id: a\nwebhook-timestamp: 1614265330\nwebhook-signature: {signature}")
    }

    #[test]
    fn a_key_that_was_taken_as_text_is_recognised() {
        let mut mac = Hmac::<Sha256>::new_from_slice(SECRET.trim().as_bytes()).unwrap();
        mac.update(b"a.1614265330.");
        mac.update(BODY);
        let headers = signed(format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes())));
        assert_eq!(what(SECRET, &headers, BODY, NOW), Some("secret"));
    }

    #[test]
    fn a_public_key_verifies_asymmetric_signatures() {
        let pair = Ed25519KeyPair::from_seed_unchecked(&[7; 32]).unwrap();
        let public = format!("whpk_{}", STANDARD.encode(pair.public_key()));
        let signature = pair.sign(&[b"a.1614265330.", BODY].concat());
        let headers = signed(format!("v1,AAAA v1a,{}", STANDARD.encode(signature)));
        assert_eq!(what(&public, &headers, BODY, NOW), None);
        assert_eq!(what(&public, &headers, b"{}", NOW), Some("secret or body"));
        assert_eq!(what(&public, HEADERS, BODY, NOW), Some("header"));
    }
}

//! Webhooks: one signed POST an event, after Standard Webhooks 1.0.
//!
//! | answer | outcome |
//! | --- | --- |
//! | 2xx | delivered |
//! | 410 | gone: the destination is disabled |
//! | 413 | rejected: too large for the receiver |
//! | 3xx (not followed), any other status | failed; `Retry-After` is honoured |
//! | no answer in time | failed |
//! | an address that is not public and not allowed | failed |
//! | no connection: refused, unknown name, TLS, timeout | unavailable |

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER};
use reqwest::{Client, Response, StatusCode, Url, redirect};
use serde_json::Value;

pub use super::address::Networks;
use super::address::{Guard, Refused};
use super::body::Format;
use super::signature::Keys;
use super::{ConfigError, Event, Outcome, Spec, duration};

const TIMEOUT: Duration = Duration::from_secs(30);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const CONCURRENCY: usize = 10;

/// Of an answer no more is read than this.
const MAX_ANSWER: usize = 64 * 1024;

/// Of an answer no more is shown than this.
const MAX_SHOWN: usize = 200;

/// A receiver may not put an event off for longer.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(24 * 3600);

pub struct Webhook {
    client: Client,
    url: Url,
    networks: Arc<Networks>,
    keys: Keys,
    format: Format,
    headers: HeaderMap,
    concurrency: usize,
    timeout: Duration,
}

impl Webhook {
    /// Connects to nothing yet.
    pub fn build(spec: &Spec, networks: Arc<Networks>) -> Result<Self, ConfigError> {
        let of = |error: ConfigError| ConfigError(format!("destination {}: {error}", spec.name));
        let url = parse_url(spec.url.as_deref().unwrap_or_default()).map_err(of)?;
        let timeout = duration(&spec.settings, "timeout").map_err(of)?.unwrap_or(TIMEOUT);
        let concurrency =
            spec.settings.get("concurrency").and_then(|v| v.as_u64()).map_or(CONCURRENCY, |n| n.max(1) as usize);
        let client = Client::builder()
            .redirect(redirect::Policy::none())
            .no_proxy()
            .timeout(timeout)
            .connect_timeout(duration(&spec.settings, "connect_timeout").map_err(of)?.unwrap_or(CONNECT_TIMEOUT))
            .pool_max_idle_per_host(concurrency)
            .tcp_nodelay(true)
            .user_agent(concat!("pg_outbox/", env!("CARGO_PKG_VERSION")))
            .dns_resolver(Arc::new(Guard::new(networks.clone())))
            .build()
            .map_err(|error| of(ConfigError(error.without_url().to_string())))?;
        Ok(Webhook {
            client,
            url,
            networks,
            keys: Keys::parse(&spec.secrets).map_err(of)?,
            format: Format::parse(spec.settings.get("format").and_then(|v| v.as_str())).map_err(of)?,
            headers: own_headers(&spec.settings).map_err(of)?,
            concurrency,
            timeout,
        })
    }

    pub fn concurrency(&self) -> usize {
        self.concurrency
    }

    /// Resolves the host and judges its addresses; sends nothing.
    pub async fn check(&self) -> Result<(), String> {
        self.judge_literal().map_err(|refused| refused.to_string())?;
        let (host, port) = (self.url.host_str().unwrap_or_default(), self.url.port_or_known_default().unwrap_or(443));
        let host = host.trim_matches(['[', ']']);
        let found =
            tokio::net::lookup_host((host, port)).await.map_err(|error| format!("can't resolve {host}: {error}"))?;
        match found.map(|at| at.ip()).partition::<Vec<_>, _>(|ip| self.networks.allow(*ip)) {
            (allowed, refused) if allowed.is_empty() => {
                Err(refused.first().map_or("no address".into(), |ip| Refused(*ip).to_string()))
            }
            _ => Ok(()),
        }
    }

    pub async fn deliver(&self, event: &Event) -> Outcome {
        if let Err(refused) = self.judge_literal() {
            return failed(refused.to_string(), None);
        }
        let body = match self.format.body(event) {
            Ok(body) => body,
            Err(error) => return Outcome::Rejected { error: format!("event_data is not JSON: {error}") },
        };
        match self.client.post(self.url.clone()).headers(self.headers(event, &body)).body(body).send().await {
            Ok(answer) => judge(answer).await,
            Err(error) => self.no_answer(error),
        }
    }

    /// A host that is an address is not resolved, so it is judged here.
    fn judge_literal(&self) -> Result<(), Refused> {
        let address = match self.url.host() {
            Some(url::Host::Ipv4(v4)) => v4.into(),
            Some(url::Host::Ipv6(v6)) => v6.into(),
            _ => return Ok(()),
        };
        if self.networks.allow(address) { Ok(()) } else { Err(Refused(address)) }
    }

    fn headers(&self, event: &Event, body: &[u8]) -> HeaderMap {
        let id = event.event_id.to_string();
        let timestamp = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let mut headers = self.headers.clone();
        let mut put = |name: &'static str, value: &str| {
            if let Ok(value) = HeaderValue::from_str(value) {
                headers.insert(name, value);
            }
        };
        for name in ["traceparent", "tracestate"] {
            if let Some(value) = event.metadata.get(name).and_then(|v| v.as_str()) {
                put(name, value);
            }
        }
        put("webhook-signature", &self.keys.sign(&id, timestamp, body));
        put("webhook-timestamp", &timestamp.to_string());
        put("webhook-id", &id);
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(self.format.content_type()));
        headers
    }

    fn no_answer(&self, error: reqwest::Error) -> Outcome {
        let error = error.without_url();
        let text = causes(&error);
        if let Some(refused) = refused(&error) {
            failed(refused.to_string(), None)
        } else if error.is_connect() {
            Outcome::Unavailable { error: format!("can't connect: {text}"), retry_in: None }
        } else if error.is_timeout() {
            failed(format!("no answer within {} s", self.timeout.as_secs_f32()), None)
        } else {
            failed(format!("no answer: {text}"), None)
        }
    }
}

fn failed(error: String, retry_in: Option<Duration>) -> Outcome {
    Outcome::Failed { error, retry_in }
}

/// http or https, a host, no user name. The error does not show the URL.
fn parse_url(text: &str) -> Result<Url, ConfigError> {
    let url = Url::parse(text).map_err(|error| ConfigError(format!("malformed URL: {error}")))?;
    if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
        return Err(ConfigError("malformed URL: neither http nor https".into()));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(ConfigError("malformed URL: it holds a user name or a password".into()));
    }
    Ok(url)
}

fn own_headers(settings: &Value) -> Result<HeaderMap, ConfigError> {
    let mut headers = HeaderMap::new();
    let object = match settings.get("headers") {
        None | Some(Value::Null) => return Ok(headers),
        Some(Value::Object(object)) => object,
        Some(_) => return Err(ConfigError("settings.headers is an object of names and values".into())),
    };
    for (name, value) in object {
        let ours = ["host", "content-length", "content-type", "transfer-encoding", "connection"];
        let lower = name.to_ascii_lowercase();
        if ours.contains(&lower.as_str()) || lower.starts_with("webhook-") {
            return Err(ConfigError(format!("settings.headers can't set {name}")));
        }
        let name = HeaderName::from_bytes(lower.as_bytes())
            .map_err(|_| ConfigError(format!("settings.headers: {name:?} is no header name")))?;
        let text = match value {
            Value::String(text) => text.clone(),
            Value::Number(_) | Value::Bool(_) => value.to_string(),
            _ => return Err(ConfigError(format!("settings.headers: the value of {name} is no text"))),
        };
        let mut value = HeaderValue::from_str(&text)
            .map_err(|_| ConfigError(format!("settings.headers: the value of {name} is no header value")))?;
        value.set_sensitive(true);
        headers.insert(name, value);
    }
    Ok(headers)
}

async fn judge(answer: Response) -> Outcome {
    let status = answer.status();
    let retry_in = answer.headers().get(RETRY_AFTER).and_then(|v| retry_after(v.to_str().ok()?, SystemTime::now()));
    let shown = read(answer).await;
    if status.is_success() {
        return Outcome::Delivered;
    }
    let error = if status.is_redirection() {
        format!("{status}: redirects are not followed")
    } else {
        format!("{status}{shown}")
    };
    match status {
        StatusCode::GONE => Outcome::Gone { error },
        StatusCode::PAYLOAD_TOO_LARGE => Outcome::Rejected { error: format!("too large for the receiver: {error}") },
        _ => failed(error, retry_in),
    }
}

/// The beginning of the answer, fit to be shown. Read to a limit, so that the connection can be used again.
async fn read(mut answer: Response) -> String {
    let mut bytes = Vec::new();
    while let Ok(Some(chunk)) = answer.chunk().await {
        bytes.extend_from_slice(&chunk[..chunk.len().min(MAX_ANSWER - bytes.len())]);
        if bytes.len() >= MAX_ANSWER {
            break;
        }
    }
    let text: String =
        String::from_utf8_lossy(&bytes).chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_SHOWN).collect();
    if text.trim().is_empty() { String::new() } else { format!(": {}", text.trim()) }
}

/// Seconds or an HTTP date (RFC 9110, section 10.2.3). What is over already leaves the destination's own backoff.
fn retry_after(text: &str, now: SystemTime) -> Option<Duration> {
    let wait = match text.trim().parse::<u64>() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => httpdate::parse_http_date(text.trim()).ok()?.duration_since(now).unwrap_or_default(),
    };
    Some(wait.min(MAX_RETRY_AFTER)).filter(|wait| !wait.is_zero())
}

fn refused(error: &reqwest::Error) -> Option<Refused> {
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        if let Some(refused) = error.downcast_ref::<Refused>() {
            return Some(*refused);
        }
        cause = error.source();
    }
    None
}

/// The innermost cause says most.
fn causes(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text = error.to_string();
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = UNIX_EPOCH + Duration::from_secs(784_111_777);
        assert_eq!(retry_after("120", now), Some(Duration::from_secs(120)));
        assert_eq!(retry_after("Sun, 06 Nov 1994 08:50:37 GMT", now), Some(Duration::from_secs(60)));
        assert_eq!(retry_after("Sun, 06 Nov 1994 08:40:00 GMT", now), None);
        assert_eq!(retry_after("0", now), None);
        assert_eq!(retry_after("999999999", now), Some(MAX_RETRY_AFTER));
        assert_eq!(retry_after("soon", now), None);
    }

    #[test]
    fn hosts_written_as_numbers_are_the_addresses_they_mean() {
        for url in [
            "http://2130706433/",
            "http://0x7f.1/",
            "http://0177.0.0.1/",
            "http://127.1/",
            "http://[::ffff:127.0.0.1]/",
            "http://0/",
        ] {
            let url = parse_url(url).expect("a URL");
            let address = match url.host() {
                Some(url::Host::Ipv4(v4)) => v4.into(),
                Some(url::Host::Ipv6(v6)) => v6.into(),
                other => panic!("{url} has the host {other:?}"),
            };
            assert!(!Networks::default().allow(address), "{url}");
        }
    }

    #[test]
    fn urls_that_hide_or_lack_a_host_are_malformed() {
        for url in
            ["", "example.com/hook", "ftp://example.com", "http://user:pw@example.com/", "http://user@127.0.0.1/"]
        {
            assert!(parse_url(url).is_err_and(|e| !e.to_string().contains("pw")), "{url}");
        }
    }

    #[test]
    fn own_headers_do_not_replace_what_is_signed() {
        for name in ["Webhook-Id", "host", "Content-Type", "bad name"] {
            assert!(own_headers(&serde_json::json!({"headers": {name: "x"}})).is_err(), "{name}");
        }
        for wrong in [serde_json::json!(["x"]), serde_json::json!({"x": null}), serde_json::json!({"x": {}})] {
            assert!(own_headers(&serde_json::json!({ "headers": wrong })).is_err(), "{wrong}");
        }
        let headers = own_headers(&serde_json::json!({"headers": {"x-version": 2}})).expect("headers");
        assert_eq!(headers["x-version"], "2");
        let headers = own_headers(&serde_json::json!({"headers": {"X-Api-Key": "k"}})).expect("headers");
        assert!(!format!("{headers:?}").contains('k') || !format!("{:?}", headers["x-api-key"]).contains('k'));
    }
}

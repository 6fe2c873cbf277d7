//! Webhooks: one signed POST an event, after Standard Webhooks 1.0. What an answer means is in `answer`.
//!
//! | no answer | whose fault | outcome |
//! | --- | --- | --- |
//! | none in time; the connection breaks after it was made | the event's, perhaps | failed |
//! | a kept connection ends just then | nobody's | sent again at once, on another connection |
//! | no connection: refused, TLS, `connect_timeout`, a proxy that makes none | the receiver's | unavailable |
//! | the relay's own proxy can't be reached; any proxy wants another login | this relay's | unable |
//! | no files, no network, no name resolution, an authority or an address that this relay does not accept | this relay's | unable |

use std::borrow::Cow;
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use reqwest::header::{CONNECTION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Client, RequestBuilder, Response, StatusCode, Url};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};

use super::address::{Networks, Refused};
use super::answer;
use super::body::{Parts, Style};
use super::clients::{ClientKey, Clients};
use super::cloud_event;
use super::connecting::Progress;
use super::json::{Object, unescape};
use super::keep::{Host, MOST_OF_HOST, Permit};
use super::route::{Route, judge_name};
use super::signature::Signer;
use super::{Attempted, ConfigError, Event, Outcome, Spec, concurrency, duration};
use crate::spans::{self, Attribute};

const TIMEOUT: Duration = Duration::from_secs(30);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const CONCURRENCY: usize = 10;

/// Maximum headers of the operator's own.
const MAX_HEADERS: usize = 100;

pub struct Webhook {
    clients: Arc<Clients>,
    client: Arc<Client>,
    settings: Settings,
    /// Bodies of answers that are read to their end, so that their connections can be used again.
    rests: Arc<Semaphore>,
}

/// What a destination's row says.
pub struct Settings {
    url: Url,
    host: Host,
    client: ClientKey,
    signer: Signer,
    style: Style,
    headers: HeaderMap,
    concurrency: usize,
    timeout: Duration,
}

/// Why there is no answer.
enum Silence {
    /// A connection that had served another request ended: the receiver may not even have seen this one.
    Ended(reqwest::Error),
    Over(Outcome),
}

impl Settings {
    /// The error shows neither the URL nor a secret.
    pub fn parse(spec: &Spec) -> Result<Self, ConfigError> {
        let of = |error: ConfigError| ConfigError(format!("destination {}: {error}", spec.name));
        let settings = Object::new(spec.settings.as_str());
        let url = parse_url(spec.url.as_deref().unwrap_or_default()).map_err(of)?;
        Ok(Settings {
            host: url.origin().ascii_serialization().into(),
            url,
            client: ClientKey {
                connect_timeout: duration(&settings, "connect_timeout").map_err(of)?.unwrap_or(CONNECT_TIMEOUT),
                route: Route::parse(&settings).map_err(of)?,
            },
            signer: Signer::parse(&settings, &spec.secrets).map_err(of)?,
            style: Style::of_webhook(&settings).map_err(of)?,
            headers: own_headers(&settings).map_err(of)?,
            concurrency: concurrency(&settings, CONCURRENCY),
            timeout: duration(&settings, "timeout").map_err(of)?.unwrap_or(TIMEOUT),
        })
    }
}

impl Webhook {
    /// Connects to nothing yet.
    pub fn build(spec: &Spec, clients: Arc<Clients>) -> Result<Self, ConfigError> {
        let settings = Settings::parse(spec)?;
        let of = |error: ConfigError| ConfigError(format!("destination {}: {error}", spec.name));
        let client = clients.get(&settings.client).map_err(of)?;
        let rests = Arc::new(Semaphore::new(settings.concurrency));
        Ok(Webhook { clients, client, settings, rests })
    }

    pub fn concurrency(&self) -> usize {
        self.settings.concurrency
    }

    fn networks(&self) -> &Networks {
        self.clients.networks()
    }

    /// Resolves the host and judges its addresses; sends nothing.
    pub async fn check(&self) -> Result<(), String> {
        self.may_send().await?;
        judge_name(&self.settings.url, self.networks()).await
    }

    fn route(&self) -> &Route {
        &self.settings.client.route
    }

    /// Networks and rules differ between relays, and change: another relay may be allowed to do what this one may not.
    async fn may_send(&self) -> Result<(), String> {
        let (routes, url) = (self.clients.routes(), &self.settings.url);
        match routes.refuse(url) {
            Some(why) => Err(why),
            None => routes.judge(self.route(), url, self.networks()).await,
        }
    }

    /// The path may hold a token: it is not shown.
    pub fn attributes(&self, status: Option<u16>) -> Vec<Attribute> {
        let url = &self.settings.url;
        let mut all = vec![spans::text("messaging.system", "webhook"), spans::text("http.request.method", "POST")];
        all.extend(url.host_str().map(|host| spans::text("server.address", host)));
        all.extend(url.port_or_known_default().map(|port| Attribute::number("server.port", port.into())));
        all.extend(status.map(|status| Attribute::number("http.response.status_code", status.into())));
        all
    }

    pub async fn deliver(&self, event: &Event, span: Option<&str>) -> Attempted {
        let deadline = Instant::now() + self.settings.timeout;
        let may_send = timeout_at(deadline, self.may_send()).await;
        if let Err(error) = may_send.unwrap_or_else(|_| Err(self.too_late("no name resolution"))) {
            return Outcome::Unable { error }.into();
        }
        let body = match self.settings.style.body(event) {
            Ok(body) => body,
            Err(error) => {
                return Outcome::Rejected { error: format!("the event can't be written as JSON: {error}") }.into();
            }
        };
        let sending = Progress::default();
        let permit = self.clients.keep().permit(&self.settings.host);
        match timeout_at(deadline, self.attempt(event, span, &body, &sending, permit.as_ref())).await {
            // Its status says what became of the event, however long the rest takes.
            Ok(Ok(answer)) => {
                let status = answer.status();
                let outcome = match self.is_of_proxy(&answer) {
                    true => Outcome::Unable { error: format!("the proxy wants another login: {status}") },
                    false => answer::judge(answer, &self.rests, permit).await,
                };
                Attempted { outcome, status: Some(status.as_u16()) }
            }
            Ok(Err(outcome)) => outcome.into(),
            Err(_) if sending.is_connecting() => {
                unavailable(format!("can't connect: {}", self.too_late("no connection"))).into()
            }
            Err(_) => failed(self.too_late("no answer")).into(),
        }
    }

    /// One request, and another each time that a kept connection turns out to have ended; the last is on a new one.
    async fn attempt(
        &self,
        event: &Event,
        span: Option<&str>,
        body: &Parts,
        progress: &Progress,
        permit: Option<&Permit>,
    ) -> Result<Response, Outcome> {
        let mut ended = String::new();
        for _ in 0..=MOST_OF_HOST {
            match self.send(event, span, body, progress, permit).await {
                Ok(answer) => return Ok(answer),
                Err(Silence::Over(outcome)) => return Err(outcome),
                Err(Silence::Ended(error)) => ended = causes(&error),
            }
        }
        Err(unavailable(format!("no answer: {ended}")))
    }

    async fn send(
        &self,
        event: &Event,
        span: Option<&str>,
        body: &Parts,
        progress: &Progress,
        permit: Option<&Permit>,
    ) -> Result<Response, Silence> {
        progress.begin();
        let mut request = self.request(event, span, body);
        if permit.is_none() {
            request = request.header(CONNECTION, HeaderValue::from_static("close"));
        }
        progress.of(request.send()).await.map_err(|error| self.silence(error.without_url(), progress))
    }

    fn request(&self, event: &Event, span: Option<&str>, body: &Parts) -> RequestBuilder {
        let url = self.settings.url.clone();
        self.client.post(url).headers(self.headers(event, span, body)).body(body.clone().into_body())
    }

    fn too_late(&self, what: &str) -> String {
        format!("{what} within {} s", self.settings.timeout.as_secs_f32())
    }

    /// 407 is what a proxy answers, and no receiver.
    fn is_of_proxy(&self, answer: &Response) -> bool {
        answer.status() == StatusCode::PROXY_AUTHENTICATION_REQUIRED && self.clients.routes().has_proxy(self.route())
    }

    fn silence(&self, error: reqwest::Error, progress: &Progress) -> Silence {
        let text = causes(&error);
        if error.is_builder() {
            Silence::Over(Outcome::Unable { error: format!("can't make a request: {text}") })
        } else if let Some(refused) = cause::<Refused>(&error) {
            Silence::Over(Outcome::Unable { error: refused.to_string() })
        } else if error.is_connect() {
            let through = if self.clients.routes().has_proxy(self.route()) { " through the proxy" } else { "" };
            let error_text = format!("can't connect{through}: {text}");
            let of_proxy =
                text.contains(WANTS_LOGIN) || self.clients.routes().is_own_proxy(self.route()) && is_of_network(&error);
            Silence::Over(match of_proxy || is_of_this_host(&error) {
                true => Outcome::Unable { error: error_text },
                false => unavailable(error_text),
            })
        } else if is_alert(&error) {
            Silence::Over(unavailable(format!("can't connect: {text}")))
        } else if progress.reused_a_connection() && is_broken(&error) {
            Silence::Ended(error)
        } else {
            Silence::Over(failed(format!("no answer: {text}")))
        }
    }

    fn headers(&self, event: &Event, span: Option<&str>, body: &Parts) -> HeaderMap {
        let id = event.event_id.to_string();
        let timestamp = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let mut headers = self.settings.headers.clone();
        let mut put = |name: &str, value: &str| {
            if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name.as_bytes()), HeaderValue::from_str(value)) {
                headers.insert(name, value);
            }
        };
        for (name, value) in self.settings.style.attributes(event).iter().flat_map(|attributes| attributes.iter()) {
            put(&format!("ce-{name}"), &cloud_event::header_value(value));
        }
        for name in ["traceparent", "tracestate"] {
            if let Some(value) = event.metadata.string(name) {
                put(name, &value);
            }
        }
        if let Some(span) = span {
            put("traceparent", span);
        }
        if let Some((name, value)) = self.settings.signer.sign(&id, timestamp, body) {
            put(name.as_str(), &value);
        }
        put("webhook-timestamp", &timestamp.to_string());
        put("webhook-id", &id);
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(self.settings.style.content_type()));
        headers
    }
}

fn failed(error: String) -> Outcome {
    Outcome::Failed { error, retry_in: None }
}

fn unavailable(error: String) -> Outcome {
    Outcome::Unavailable { error }
}

/// What the HTTP client says when a proxy answers 407 to CONNECT.
const WANTS_LOGIN: &str = "proxy authorization required";

/// Whether no TCP connection was made. Through a proxy only one is: to the proxy.
fn is_of_network(error: &reqwest::Error) -> bool {
    find(error, |cause| cause.downcast_ref::<io::Error>()?.raw_os_error()).is_some()
}

/// Whether the receiver's TLS refused, as it does for want of a certificate: TLS 1.3 says so after the handshake.
fn is_alert(error: &reqwest::Error) -> bool {
    matches!(tls_error(error), Some(rustls::Error::AlertReceived(_)))
}

fn tls_error(error: &reqwest::Error) -> Option<&rustls::Error> {
    find(error, |cause| {
        let inner = || cause.downcast_ref::<io::Error>()?.get_ref()?.downcast_ref::<rustls::Error>();
        cause.downcast_ref::<rustls::Error>().or_else(inner)
    })
}

/// Whether the cause lies with this relay's host: what it lacks, and what it alone believes.
fn is_of_this_host(error: &reqwest::Error) -> bool {
    // EPERM, ENOMEM, EACCES, ENFILE, EMFILE, EAFNOSUPPORT, EADDRNOTAVAIL, ENETDOWN, ENETUNREACH, ENOBUFS
    const LACKS: [i32; 10] = [1, 12, 13, 23, 24, 97, 99, 100, 101, 105];
    let lacks =
        find(error, |cause| cause.downcast_ref::<io::Error>()?.raw_os_error().filter(|code| LACKS.contains(code)));
    let unknown_issuer = rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer);
    error.is_dns() || lacks.is_some() || tls_error(error) == Some(&unknown_issuer)
}

/// The connection ended before an answer: by the receiver, without a word of HTTP.
fn is_broken(error: &reqwest::Error) -> bool {
    let ended = [
        io::ErrorKind::ConnectionReset,
        io::ErrorKind::ConnectionAborted,
        io::ErrorKind::BrokenPipe,
        io::ErrorKind::UnexpectedEof,
        io::ErrorKind::NotConnected,
    ];
    let io = find(error, |cause| Some(ended.contains(&cause.downcast_ref::<io::Error>()?.kind())));
    let http = find(error, |cause| {
        let error = cause.downcast_ref::<hyper::Error>()?;
        Some(error.is_incomplete_message() || error.is_canceled() || error.is_closed())
    });
    io.unwrap_or(false) || http.unwrap_or(false)
}

/// The first of the causes that the function knows.
fn find<'a, T>(
    error: &'a reqwest::Error,
    mut known: impl FnMut(&'a (dyn std::error::Error + 'static)) -> Option<T>,
) -> Option<T> {
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        if let Some(found) = known(error) {
            return Some(found);
        }
        cause = error.source();
    }
    None
}

fn cause<T: std::error::Error + 'static>(error: &reqwest::Error) -> Option<&T> {
    find(error, |cause| cause.downcast_ref::<T>())
}

/// The innermost cause says most.
pub fn causes(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    find(error, |cause| {
        text = cause.to_string();
        None::<()>
    });
    text
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

fn own_headers(settings: &Object) -> Result<HeaderMap, ConfigError> {
    let mut headers = HeaderMap::new();
    if settings.member("headers").is_none() {
        return Ok(headers);
    }
    let wrong = || ConfigError("settings.headers is an object of names and values".into());
    let object = settings.object("headers").ok_or_else(wrong)?;
    if object.len() > MAX_HEADERS {
        return Err(ConfigError(format!("settings.headers has more than {MAX_HEADERS} headers")));
    }
    for (name, value) in &object {
        let ours = ["host", "content-length", "content-type", "transfer-encoding", "connection"];
        let lower = name.to_ascii_lowercase();
        if ours.contains(&lower.as_str()) || lower.starts_with("webhook-") {
            return Err(ConfigError(format!("settings.headers can't set {name}")));
        }
        let header = HeaderName::from_bytes(lower.as_bytes())
            .map_err(|_| ConfigError(format!("settings.headers: {name:?} is no header name")))?;
        headers.insert(header, header_value(name, value.get())?);
    }
    Ok(headers)
}

/// Texts, numbers as they are stored, true and false.
fn header_value(name: &str, text: &str) -> Result<HeaderValue, ConfigError> {
    let text = match text.as_bytes().first() {
        Some(b'{' | b'[' | b'n') | None => None,
        _ => Some(unescape(text).unwrap_or(Cow::Borrowed(text))),
    };
    let text = text.ok_or_else(|| ConfigError(format!("settings.headers: the value of {name} is no text")))?;
    let mut value = HeaderValue::from_str(&text)
        .map_err(|_| ConfigError(format!("settings.headers: the value of {name} is no header value")))?;
    value.set_sensitive(true);
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let own = |headers: &str| own_headers(&Object::new(format!(r#"{{"headers": {headers}}}"#)));
        for name in ["Webhook-Id", "host", "Content-Type", "bad name"] {
            assert!(own(&format!(r#"{{"{name}": "x"}}"#)).is_err(), "{name}");
        }
        for wrong in [r#"["x"]"#, r#"{"x": null}"#, r#"{"x": {}}"#, r#"{"x": "a\r\nb"}"#, "7"] {
            assert!(own(wrong).is_err(), "{wrong}");
        }
        let headers = own(r#"{"x-version": 2.50, "x-on": true, "X-Api-Key": "k"}"#).expect("headers");
        assert_eq!(
            (&headers["x-version"], &headers["x-on"]),
            (&"2.50".parse().expect("text"), &"true".parse().expect("text"))
        );
        assert!(!format!("{:?}", headers["x-api-key"]).contains('k'));
    }
}

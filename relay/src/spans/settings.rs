//! What the environment says of the collector, in the variables of OpenTelemetry.
//! Source: <https://opentelemetry.io/docs/specs/otel/protocol/exporter/>.

use std::time::Duration;

use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};

use super::attribute::{Attribute, text};
use crate::error::{Error, Result};
use crate::postgres::Variables;

#[derive(Clone)]
pub struct Settings {
    pub url: Url,
    pub headers: HeaderMap,
    pub timeout: Duration,
    /// Of the resource, without what the relay adds.
    pub resource: Vec<Attribute>,
    /// The share of events without a trace context that begin a trace.
    pub of_roots: f64,
}

impl Settings {
    /// None: no collector is named. An error shows no value.
    pub fn read(variables: Variables) -> Result<Option<Self>> {
        let given = |name: &str| variables(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
        let of_traces = |name: &str| {
            let own = name.replacen("OTLP_", "OTLP_TRACES_", 1);
            given(&own).map(|value| (own.clone(), value)).or_else(|| given(name).map(|value| (name.to_owned(), value)))
        };
        let is_off = given("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true"))
            || given("OTEL_TRACES_EXPORTER").is_some_and(|value| value == "none");
        let Some((name, endpoint)) = of_traces("OTEL_EXPORTER_OTLP_ENDPOINT").filter(|_| !is_off) else {
            return Ok(None);
        };
        if let Some((name, _)) = of_traces("OTEL_EXPORTER_OTLP_PROTOCOL").filter(|(_, value)| value == "grpc") {
            return Err(wrong(&name, "asks for grpc; spans are sent over HTTP: set http/json"));
        }
        let headers = match of_traces("OTEL_EXPORTER_OTLP_HEADERS") {
            Some((name, list)) => headers(&name, &list)?,
            None => HeaderMap::new(),
        };
        let timeout = match of_traces("OTEL_EXPORTER_OTLP_TIMEOUT") {
            Some((name, value)) => Duration::from_millis(
                value
                    .parse()
                    .ok()
                    .filter(|millis| *millis > 0)
                    .ok_or_else(|| wrong(&name, "is no number of milliseconds"))?,
            ),
            None => Duration::from_secs(10),
        };
        Ok(Some(Settings {
            url: url(&name, &endpoint)?,
            headers,
            timeout,
            resource: resource(given("OTEL_RESOURCE_ATTRIBUTES"), given("OTEL_SERVICE_NAME")),
            of_roots: of_roots(given("OTEL_TRACES_SAMPLER"), given("OTEL_TRACES_SAMPLER_ARG"))?,
        }))
    }
}

fn wrong(name: &str, what: &str) -> Error {
    Error::Configuration(format!("{name} {what}"))
}

/// The endpoint for all signals has the path of traces below it; one for traces alone is taken as it is.
fn url(name: &str, text: &str) -> Result<Url> {
    let text = match name.contains("TRACES") {
        true => text.to_owned(),
        false => format!("{}/v1/traces", text.trim_end_matches('/')),
    };
    let url = Url::parse(&text).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
    url.ok_or_else(|| wrong(name, "is no URL such as http://collector:4318"))
}

/// `key=value,…`, percent-encoded.
fn pairs(list: &str) -> impl Iterator<Item = (String, String)> {
    list.split(',').filter_map(|pair| {
        let (key, value) = pair.split_once('=')?;
        Some((decoded(key.trim()), decoded(value.trim()))).filter(|(key, _)| !key.is_empty())
    })
}

fn decoded(text: &str) -> String {
    let (bytes, mut plain, mut at) = (text.as_bytes(), Vec::with_capacity(text.len()), 0);
    while at < bytes.len() {
        let escape = text.get(at + 1..at + 3).filter(|_| bytes[at] == b'%');
        match escape.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => {
                plain.push(byte);
                at += 3;
            }
            None => {
                plain.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&plain).into_owned()
}

fn headers(name: &str, list: &str) -> Result<HeaderMap> {
    let mut headers = HeaderMap::new();
    for (key, value) in pairs(list) {
        let (Ok(key), Ok(mut value)) = (HeaderName::try_from(key), HeaderValue::try_from(value)) else {
            return Err(wrong(name, "is no list of headers such as api-key=secret,tenant=acme"));
        };
        value.set_sensitive(true);
        headers.insert(key, value);
    }
    Ok(headers)
}

fn resource(attributes: Option<String>, service: Option<String>) -> Vec<Attribute> {
    let mut all: Vec<Attribute> =
        pairs(&attributes.unwrap_or_default()).map(|(key, value)| text(&key, value)).collect();
    if let Some(service) = service {
        all.retain(|attribute| !attribute.is("service.name"));
        all.push(text("service.name", service));
    } else if !all.iter().any(|attribute| attribute.is("service.name")) {
        all.push(text("service.name", "outbox-relay"));
    }
    all
}

/// What has a parent follows it in any case.
fn of_roots(sampler: Option<String>, argument: Option<String>) -> Result<f64> {
    match sampler.as_deref().unwrap_or("parentbased_always_on") {
        "always_on" | "parentbased_always_on" => Ok(1.0),
        "always_off" | "parentbased_always_off" => Ok(0.0),
        "traceidratio" | "parentbased_traceidratio" => {
            let ratio = argument.as_deref().unwrap_or("1").parse::<f64>().ok().filter(|r| (0.0..=1.0).contains(r));
            ratio.ok_or_else(|| wrong("OTEL_TRACES_SAMPLER_ARG", "is no number from 0 to 1"))
        }
        _ => Err(wrong("OTEL_TRACES_SAMPLER", "names no sampler that the relay knows, such as parentbased_always_on")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Option<Settings>> {
        Settings::read(&|name| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn without_an_endpoint_there_are_no_spans() {
        let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4318");
        for variables in [
            &[][..],
            &[("OTEL_EXPORTER_OTLP_ENDPOINT", " ")],
            &[endpoint, ("OTEL_SDK_DISABLED", "TRUE")],
            &[endpoint, ("OTEL_TRACES_EXPORTER", "none")],
        ] {
            assert!(read(variables).expect("no error").is_none());
        }
    }

    #[test]
    fn what_is_for_traces_alone_wins() {
        let read = |variables: &[(&str, &str)]| read(variables).expect("no error").expect("settings");
        let plain = read(&[("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4318/")]);
        assert_eq!(plain.url.as_str(), "http://c:4318/v1/traces");
        assert_eq!(plain.resource, [text("service.name", "outbox-relay")]);
        assert_eq!((plain.timeout, plain.of_roots), (Duration::from_secs(10), 1.0));
        let own = read(&[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4318"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https://t/in"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "api-key=a%20b, x = y"),
            ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "500"),
            ("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=prod,service.name=no"),
            ("OTEL_SERVICE_NAME", "orders"),
            ("OTEL_TRACES_SAMPLER", "parentbased_traceidratio"),
            ("OTEL_TRACES_SAMPLER_ARG", "0.25"),
        ]);
        assert_eq!(own.url.as_str(), "https://t/in");
        assert_eq!((&own.headers["api-key"], &own.headers["x"]), (&"a b".parse().unwrap(), &"y".parse().unwrap()));
        assert_eq!(own.resource, [text("deployment.environment", "prod"), text("service.name", "orders")]);
        assert_eq!((own.timeout, own.of_roots), (Duration::from_millis(500), 0.25));
    }

    #[test]
    fn what_is_wrong_is_named_and_not_shown() {
        for (name, value) in [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "hunter2"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "api key=hunter2"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "hunter2"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
            ("OTEL_TRACES_SAMPLER", "hunter2"),
        ] {
            let error =
                read(&[(name, value), ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c")]).err().expect(name).to_string();
            assert!(error.contains(name) && !error.contains("hunter2"), "{error}");
        }
    }
}

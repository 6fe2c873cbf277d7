//! Which requests are the page's own. Pure: headers in, a verdict out.
//!
//! - `Host` is an address, localhost or a name that the operator gave: no name of somebody else's that leads here can make
//!   a browser take its pages for ours (DNS rebinding).
//! - A request that changes something has a header that no form can send, and the `Origin` of the page itself.

use axum::http::{HeaderMap, header};

pub const REQUEST: &str = "x-outbox-request";

/// Names by which browsers may reach the page, besides addresses and localhost.
pub struct Names(Vec<String>);

impl Names {
    pub fn new(names: &[String]) -> Self {
        Names(names.iter().map(|name| name.to_ascii_lowercase()).collect())
    }

    /// Whether the request was meant for this relay.
    pub fn is_ours(&self, headers: &HeaderMap) -> bool {
        authority(headers).is_some_and(|authority| {
            let host = host_of(&authority);
            is_address(host) || host == "localhost" || host.ends_with(".localhost") || self.given(host)
        })
    }

    /// Whether a page of this relay sent it, when a browser did: the login form has no header of its own.
    pub fn is_own_origin(&self, headers: &HeaderMap) -> bool {
        let Some(origin) = headers.get(header::ORIGIN) else { return false };
        let origin = origin.to_str().unwrap_or_default().to_ascii_lowercase();
        let Some(from) = origin.strip_prefix("https://").or_else(|| origin.strip_prefix("http://")) else {
            return false;
        };
        // A proxy may have put its own idea of the host there; then the name that was given counts.
        authority(headers).is_some_and(|authority| authority == from) || self.given(host_of(from))
    }

    /// Whether it may change something.
    pub fn may_change(&self, headers: &HeaderMap) -> bool {
        let asked = headers.get(REQUEST).is_some_and(|value| value.as_bytes() == b"1");
        let site = headers.get("sec-fetch-site").is_none_or(|value| value.as_bytes() == b"same-origin");
        asked && site && self.is_own_origin(headers)
    }

    fn given(&self, host: &str) -> bool {
        self.0.iter().any(|name| name == host)
    }
}

/// Whether the browser's side of the connection is TLS, by what the proxy before us says.
pub fn is_https(headers: &HeaderMap) -> bool {
    let scheme = headers.get("x-forwarded-proto").and_then(|value| value.to_str().ok());
    scheme.is_some_and(|value| value.split(',').next().unwrap_or_default().trim().eq_ignore_ascii_case("https"))
}

fn authority(headers: &HeaderMap) -> Option<String> {
    Some(headers.get(header::HOST)?.to_str().ok()?.to_ascii_lowercase())
}

/// Without the port.
fn host_of(authority: &str) -> &str {
    match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        _ => authority,
    }
}

fn is_address(host: &str) -> bool {
    let inner = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    match inner {
        Some(inner) => inner.parse::<std::net::Ipv6Addr>().is_ok(),
        None => host.parse::<std::net::Ipv4Addr>().is_ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    fn names() -> Names {
        Names::new(&["Outbox.example.com".into()])
    }

    #[test]
    fn only_hosts_that_cannot_be_somebody_elses_name_are_ours() {
        for (host, ours) in [
            ("127.0.0.1:9464", true),
            ("[::1]:9464", true),
            ("10.1.2.3", true),
            ("localhost:1", true),
            ("a.localhost", true),
            ("outbox.example.com", true),
            ("OUTBOX.example.com:8443", true),
            ("evil.example", false),
            ("evil.example:9464", false),
            ("127.0.0.1.evil.example", false),
            ("outbox.example.com.evil.example", false),
            ("[::1", false),
            ("", false),
        ] {
            assert_eq!(names().is_ours(&headers(&[("host", host)])), ours, "{host}");
        }
        assert!(!names().is_ours(&headers(&[])));
    }

    #[test]
    fn a_change_needs_the_header_and_the_pages_own_origin() {
        let own = [("host", "localhost:9464"), ("origin", "http://localhost:9464"), (REQUEST, "1")];
        assert!(names().may_change(&headers(&own)));
        assert!(!names().may_change(&headers(&own[..2])));
        assert!(!names().may_change(&headers(&[own[0], own[2]])));
        for origin in ["null", "http://localhost:9465", "http://localhost", "https://evil.example", "localhost:9464"] {
            assert!(!names().may_change(&headers(&[own[0], ("origin", origin), own[2]])), "{origin}");
        }
        assert!(!names().may_change(&headers(&[own[0], own[1], (REQUEST, "2")])));
        assert!(!names().may_change(&headers(&[own[0], own[1], own[2], ("sec-fetch-site", "cross-site")])));
        assert!(names().may_change(&headers(&[own[0], own[1], own[2], ("sec-fetch-site", "same-origin")])));
    }

    #[test]
    fn behind_a_proxy_the_name_that_was_given_counts() {
        let sent = [("host", "10.0.0.7:9464"), (REQUEST, "1"), ("origin", "https://outbox.example.com")];
        assert!(names().may_change(&headers(&sent)));
        assert!(is_https(&headers(&[("x-forwarded-proto", "https, http")])));
        assert!(!is_https(&headers(&[("x-forwarded-proto", "http")])) && !is_https(&headers(&[])));
    }
}

//! The way of a webhook's requests: through which proxy, whom TLS trusts, and what it shows of itself.
//!
//! A proxy is no way around the rule that only public addresses are reached. The host of a request is resolved and judged
//! here as if there were no proxy, and so is the proxy that a destination names. The relay's own proxy is its operator's to
//! choose.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use reqwest::{Certificate, ClientBuilder, Identity, Proxy, Url};

use super::ConfigError;
use super::address::{Guard, Networks, Refused};
use super::json::Object;

/// What holds for all webhooks of this relay.
#[derive(Default)]
pub struct Routes {
    proxy: Option<Url>,
    /// In addition to the system's.
    authorities: Vec<Certificate>,
    https_only: bool,
}

/// Of one destination. Holds a private key and perhaps a password: it is never shown, nor printed for debugging.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Route {
    via: Via,
    /// Certificates to trust instead of the system's, as PEM.
    authorities: Option<Arc<str>>,
    /// A certificate and its key, as PEM.
    identity: Option<Arc<str>>,
}

#[derive(Clone, Default, PartialEq, Eq, Hash)]
enum Via {
    /// The relay's own proxy, if it has one.
    #[default]
    Relay,
    Proxy(Url),
    Direct,
}

impl Routes {
    /// Reads the file of authorities. The error shows neither the proxy nor the path.
    pub fn new(proxy: Option<&str>, authorities: Option<&Path>, https_only: bool) -> Result<Self, ConfigError> {
        let proxy = proxy.map(|url| parse_proxy(url, "webhook_proxy")).transpose()?;
        let wrong = |what: &str| ConfigError(format!("the file of webhook_ca_cert {what}"));
        let authorities = match authorities {
            Some(path) => {
                let pem = std::fs::read(path).map_err(|error| wrong(&format!("can't be read: {error}")))?;
                certificates(&pem).ok_or_else(|| wrong("holds no certificate in PEM"))?
            }
            None => Vec::new(),
        };
        Ok(Routes { proxy, authorities, https_only })
    }

    /// Why nothing is sent to this URL; none: it may be.
    pub fn refuse(&self, url: &Url) -> Option<String> {
        (self.https_only && url.scheme() != "https")
            .then(|| "this relay sends to https alone, and the URL is http".into())
    }

    fn proxy<'a>(&'a self, route: &'a Route) -> Option<&'a Url> {
        match &route.via {
            Via::Relay => self.proxy.as_ref(),
            Via::Proxy(url) => Some(url),
            Via::Direct => None,
        }
    }

    /// Whether requests go through the relay's own proxy.
    pub fn is_own_proxy(&self, route: &Route) -> bool {
        route.via == Via::Relay && self.proxy.is_some()
    }

    /// Whether requests go through a proxy.
    pub fn has_proxy(&self, route: &Route) -> bool {
        self.proxy(route).is_some()
    }

    /// A client that takes this way.
    pub fn apply(
        &self,
        route: &Route,
        networks: &Arc<Networks>,
        builder: ClientBuilder,
    ) -> Result<ClientBuilder, ConfigError> {
        let mut builder = builder.no_proxy();
        if let Some(url) = self.proxy(route) {
            let proxy = Proxy::all(url.clone()).map_err(|_| ConfigError("the proxy's URL is malformed".into()))?;
            builder = builder.proxy(proxy);
        }
        // The client looks for the proxy, or for the host: the relay's own proxy is the only one that may be anywhere.
        if !self.is_own_proxy(route) {
            builder = builder.dns_resolver(Arc::new(Guard::new(networks.clone())));
        }
        builder = match route.authorities.as_deref().and_then(|pem| certificates(pem.as_bytes())) {
            Some(own) => builder.tls_certs_only(own),
            None if self.authorities.is_empty() => builder,
            None => builder.tls_certs_merge(self.authorities.iter().cloned()),
        };
        Ok(match &route.identity {
            Some(pem) => builder.identity(identity(pem)?),
            None => builder,
        })
    }

    /// Judges what the client does not: hosts that are addresses already, and the host of a request that a proxy resolves.
    pub async fn judge(&self, route: &Route, url: &Url, networks: &Networks) -> Result<(), String> {
        let refused = |error: Refused| error.to_string();
        judge_literal(url, networks).map_err(refused)?;
        if let Via::Proxy(proxy) = &route.via {
            judge_literal(proxy, networks).map_err(refused)?;
        }
        if self.has_proxy(route) { judge_name(url, networks).await } else { Ok(()) }
    }
}

impl Route {
    /// From a destination's settings. The error shows no value.
    pub fn parse(settings: &Object) -> Result<Self, ConfigError> {
        let via = match settings.string("proxy").as_deref() {
            None if settings.member("proxy").is_some() => return Err(ConfigError("settings.proxy is no text".into())),
            None => Via::Relay,
            Some("none") => Via::Direct,
            Some(url) => Via::Proxy(parse_proxy(url, "settings.proxy")?),
        };
        let authorities = settings.string("ca_certificate").map(Arc::<str>::from);
        if authorities.as_deref().is_some_and(|pem| certificates(pem.as_bytes()).is_none()) {
            return Err(ConfigError("settings.ca_certificate holds no certificate in PEM".into()));
        }
        let pair = (settings.string("client_certificate"), settings.string("client_key"));
        let pem: Option<Arc<str>> = match pair {
            (Some(certificate), Some(key)) => Some(format!("{certificate}\n{key}").into()),
            (None, None) => None,
            _ => return Err(ConfigError("settings.client_certificate and settings.client_key go together".into())),
        };
        if let Some(pem) = &pem {
            identity(pem)?;
        }
        Ok(Route { via, authorities, identity: pem })
    }
}

/// None unless it holds at least one.
fn certificates(pem: &[u8]) -> Option<Vec<Certificate>> {
    Certificate::from_pem_bundle(pem).ok().filter(|all| !all.is_empty())
}

fn identity(pem: &str) -> Result<Identity, ConfigError> {
    Identity::from_pem(pem.as_bytes()).map_err(|_| {
        ConfigError("settings.client_certificate and settings.client_key are no certificate and key".into())
    })
}

fn parse_proxy(text: &str, what: &str) -> Result<Url, ConfigError> {
    let url = Url::parse(text).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
    url.ok_or_else(|| ConfigError(format!("{what} must be the URL of a proxy, http:// or https://, a host and a port")))
}

/// A host that is an address is not resolved.
fn judge_literal(url: &Url, networks: &Networks) -> Result<(), Refused> {
    let address: IpAddr = match url.host() {
        Some(url::Host::Ipv4(v4)) => v4.into(),
        Some(url::Host::Ipv6(v6)) => v6.into(),
        _ => return Ok(()),
    };
    if networks.allow(address) { Ok(()) } else { Err(Refused(address)) }
}

/// Resolves the host and judges its addresses: one that is allowed will do, as for a request without a proxy.
pub async fn judge_name(url: &Url, networks: &Networks) -> Result<(), String> {
    let (host, port) = (url.host_str().unwrap_or_default(), url.port_or_known_default().unwrap_or(443));
    let host = host.trim_matches(['[', ']']);
    let found = tokio::net::lookup_host((host, port)).await;
    let found = found.map_err(|error| format!("can't resolve {host}: {error}"))?;
    match found.map(|at| at.ip()).partition::<Vec<_>, _>(|ip| networks.allow(*ip)) {
        (allowed, refused) if allowed.is_empty() => {
            Err(refused.first().map_or("no address".into(), |ip| Refused(*ip).to_string()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(settings: serde_json::Value) -> Result<Route, ConfigError> {
        Route::parse(&Object::new(settings.to_string()))
    }

    #[test]
    fn what_is_wrong_is_refused_and_not_shown() {
        for wrong in [
            serde_json::json!({"proxy": "hunter2"}),
            serde_json::json!({"proxy": "socks5://u:hunter2@h:1"}),
            serde_json::json!({"proxy": 1}),
            serde_json::json!({"ca_certificate": "hunter2"}),
            serde_json::json!({"client_certificate": "hunter2", "client_key": "hunter2"}),
            serde_json::json!({"client_key": "hunter2"}),
        ] {
            let error = parse(wrong.clone()).err().unwrap_or_else(|| panic!("{wrong} was taken")).to_string();
            assert!(!error.contains("hunter2"), "{error}");
        }
        let error = Routes::new(Some("ftp://u:hunter2@h"), None, false).err().expect("no proxy").to_string();
        assert!(error.contains("webhook_proxy") && !error.contains("hunter2"), "{error}");
        assert!(Routes::new(None, Some(Path::new("/nowhere/hunter2")), false).is_err());
    }

    #[test]
    fn a_destination_can_have_a_proxy_of_its_own_or_none() {
        let routes = Routes::new(Some("http://proxy.example:3128"), None, false).expect("a proxy");
        let proxy = |settings| {
            let route = parse(settings).expect("settings");
            routes.proxy(&route).map(Url::to_string)
        };
        assert_eq!(proxy(serde_json::json!({})).as_deref(), Some("http://proxy.example:3128/"));
        assert_eq!(proxy(serde_json::json!({"proxy": "https://own"})).as_deref(), Some("https://own/"));
        assert_eq!(proxy(serde_json::json!({"proxy": "none"})), None);
    }

    #[test]
    fn https_alone_is_https_alone() {
        let url = |text| Url::parse(text).expect("a URL");
        let routes = Routes { https_only: true, ..Routes::default() };
        assert!(routes.refuse(&url("http://h/")).is_some() && routes.refuse(&url("https://h/")).is_none());
        assert!(Routes::default().refuse(&url("http://h/")).is_none());
    }

    #[tokio::test]
    async fn a_proxy_is_no_way_around_the_rule_of_addresses() {
        let networks = Networks::new(&["10.1.0.0/16".into()]).expect("a network");
        let own = Routes::new(Some("http://127.0.0.1:3128"), None, false).expect("a proxy");
        let judge = async |routes: &Routes, settings, url| {
            let url = Url::parse(url).expect("a URL");
            routes.judge(&parse(settings).expect("settings"), &url, &networks).await
        };
        let none = || serde_json::json!({});
        assert!(judge(&own, none(), "http://10.1.2.3/").await.is_ok());
        assert!(judge(&own, none(), "http://10.2.0.1/").await.is_err_and(|error| error.contains("10.2.0.1")));
        assert!(judge(&own, none(), "http://localhost/").await.is_err_and(|error| error.contains("is not public")));
        assert!(
            judge(&own, none(), "http://nowhere.invalid/").await.is_err_and(|error| error.contains("can't resolve"))
        );
        let inside = serde_json::json!({"proxy": "http://127.0.0.1:3128"});
        let refused = judge(&Routes::default(), inside, "http://10.1.2.3/").await;
        assert!(refused.is_err_and(|error| error.contains("127.0.0.1 is not public")));
        // Without a proxy the client judges what it resolves.
        assert!(judge(&Routes::default(), none(), "http://nowhere.invalid/").await.is_ok());
    }
}

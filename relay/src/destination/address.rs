//! Which addresses a webhook may reach: public ones, and networks that the operator names.
//!
//! Names are resolved here and judged before the connection is made, and the connection goes to an address that was
//! judged: an answer that changes in between changes nothing.
//!
//! Source of the list: IANA's special-purpose address registries (RFC 6890 and its updates).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use ipnet::IpNet;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};

use super::ConfigError;

/// The networks that are allowed although they are not public.
#[derive(Debug, Default)]
pub struct Networks {
    of_relay: Vec<IpNet>,
    of_database: RwLock<Vec<IpNet>>,
    changes: AtomicU64,
}

impl Networks {
    pub fn new(list: &[String]) -> Result<Self, ConfigError> {
        Ok(Networks { of_relay: parse(list.iter().map(String::as_str))?, ..Networks::default() })
    }

    /// The value of `outbox.webhook_allow_networks`: CIDR notation, separated by commas.
    pub fn set_of_database(&self, list: &str) -> Result<(), ConfigError> {
        let networks = parse(list.split(','))?;
        let mut present = self.of_database.write().unwrap_or_else(PoisonError::into_inner);
        if *present != networks {
            *present = networks;
            self.changes.fetch_add(1, Ordering::SeqCst);
        }
        Ok(())
    }

    /// How often they have changed.
    pub fn generation(&self) -> u64 {
        self.changes.load(Ordering::SeqCst)
    }

    pub fn allow(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        let named = |networks: &[IpNet]| networks.iter().any(|network| network.contains(&address));
        is_public(address)
            || named(&self.of_relay)
            || named(&self.of_database.read().unwrap_or_else(PoisonError::into_inner))
    }
}

fn parse<'a>(list: impl Iterator<Item = &'a str>) -> Result<Vec<IpNet>, ConfigError> {
    list.map(str::trim)
        .filter(|text| !text.is_empty())
        .map(|text| {
            text.parse::<IpNet>()
                .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
                .map_err(|_| ConfigError(format!("{text:?} is not a network: use CIDR notation such as 10.1.0.0/16")))
        })
        .collect()
}

/// Whether the address belongs to the public internet. An IPv6 address that carries an IPv4 one is judged by that too.
pub fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => is_public_v4(v4),
        IpAddr::V6(v6) => is_public_v6(v6),
    }
}

/// Public by its number, but reachable only inside Azure, where it answers for the host: metadata and more.
const AZURE_HOST: Ipv4Addr = Ipv4Addr::new(168, 63, 129, 16);

fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    address != AZURE_HOST
        && !matches!(
            (a, b, c),
            (0 | 10 | 127, _, _)
                | (100, 64..=127, _)
                | (169, 254, _)
                | (172, 16..=31, _)
                | (192, 0, 0 | 2)
                | (192, 88, 99)
                | (192, 168, _)
                | (198, 18..=19, _)
                | (198, 51, 100)
                | (203, 0, 113)
                | (224..=255, _, _)
        )
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    let s = address.segments();
    let v4 = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        is_public_v4(Ipv4Addr::new(a, b, c, d))
    };
    match s {
        // ::/96, with :: and ::1 and IPv4-compatible addresses; ::ffff:0:0/96, IPv4-mapped
        [0, 0, 0, 0, 0, 0, ..] => false,
        [0, 0, 0, 0, 0, 0xffff, high, low] => v4(high, low),
        // NAT64, well-known and local
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => v4(high, low),
        [0x64, 0xff9b, ..] => false,
        // 6to4
        [0x2002, high, low, ..] => v4(high, low),
        // 2001::/23 with Teredo, ORCHID, benchmarking; documentation
        [0x2001, 0..=0x1ff, ..] | [0x2001, 0xdb8, ..] | [0x3fff, 0..=0xfff, ..] => false,
        // only 2000::/3 is global unicast: neither ULA, link-local, site-local nor multicast
        [first, ..] => first & 0xe000 == 0x2000,
    }
}

/// Finds the addresses of a host.
type Lookup = Arc<dyn Fn(String) -> BoxFuture<'static, std::io::Result<Vec<SocketAddr>>> + Send + Sync>;

/// Resolves names to the addresses that are allowed, and to an error if there is none. The connection is made to what
/// this returns; nobody resolves the name again.
#[derive(Clone)]
pub struct Guard {
    networks: Arc<Networks>,
    lookup: Lookup,
}

impl Guard {
    /// Asks the system.
    pub fn new(networks: Arc<Networks>) -> Self {
        let lookup = |name: String| async move { Ok(tokio::net::lookup_host((name, 0)).await?.collect()) }.boxed();
        Guard { networks, lookup: Arc::new(lookup) }
    }
}

impl Resolve for Guard {
    fn resolve(&self, name: Name) -> Resolving {
        let (networks, lookup) = (self.networks.clone(), self.lookup.clone());
        Box::pin(async move {
            let found = lookup(name.as_str().to_owned()).await?;
            let allowed: Vec<SocketAddr> = found.iter().copied().filter(|at| networks.allow(at.ip())).collect();
            match (allowed.is_empty(), found.first()) {
                (true, Some(refused)) => Err(Refused(refused.ip()).into()),
                _ => Ok(Box::new(allowed.into_iter()) as Addrs),
            }
        })
    }
}

/// An address that is neither public nor allowed.
#[derive(Debug, Clone, Copy)]
pub struct Refused(pub IpAddr);

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "address {} is not public; an operator can allow its network with outbox.webhook_allow_networks",
            self.0
        )
    }
}

impl std::error::Error for Refused {}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[test]
    fn only_public_addresses_are_public() {
        for public in [
            "1.1.1.1",
            "93.184.216.34",
            "172.32.0.1",
            "100.128.0.1",
            "2606:4700::1111",
            "::ffff:8.8.8.8",
            "2002:808:808::1",
        ] {
            assert!(is_public(public.parse().expect("an address")), "{public}");
        }
        for inside in [
            "0.0.0.0",
            "10.0.0.1",
            "100.64.0.1",
            "127.0.0.1",
            "127.8.8.8",
            "169.254.169.254",
            "172.16.0.1",
            "192.0.0.1",
            "192.0.2.1",
            "192.168.1.1",
            "198.18.0.1",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::127.0.0.1",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "fe80::1",
            "fc00::1",
            "fd00:ec2::254",
            "fec0::1",
            "ff02::1",
            "64:ff9b::7f00:1",
            "64:ff9b:1::1",
            "2002:7f00:1::",
            "2001::1",
            "2001:db8::1",
            "100::1",
        ] {
            assert!(!is_public(inside.parse().expect("an address")), "{inside}");
        }
    }

    #[test]
    fn an_operator_opens_what_is_named_and_no_more() {
        let networks = Networks::new(&["127.0.0.0/8".into()]).expect("a network");
        networks.set_of_database(" 10.1.0.0/16, fd00::/8 ,").expect("networks");
        for (address, allowed) in [
            ("127.0.0.1", true),
            ("::ffff:127.0.0.1", true),
            ("10.1.2.3", true),
            ("10.2.0.1", false),
            ("fd12::1", true),
            ("::1", false),
        ] {
            assert_eq!(networks.allow(address.parse().expect("an address")), allowed, "{address}");
        }
        assert!(networks.set_of_database("10.0.0.0/99").is_err());
    }

    /// A client that makes a new connection for each request, and whose name service gives these answers in turn.
    fn client(answers: Vec<Vec<IpAddr>>) -> reqwest::Client {
        let _installed = rustls::crypto::ring::default_provider().install_default();
        let networks = Networks::new(&["127.0.0.1/32".into()]).expect("a network");
        let answers = std::sync::Mutex::new(answers.into_iter());
        let lookup = move |_: String| {
            let next = answers.lock().expect("no panic").next().expect("the name is resolved once a connection");
            let found = next.into_iter().map(|ip| SocketAddr::new(ip, 0)).collect();
            std::future::ready(Ok(found)).boxed()
        };
        let guard = Guard { networks: Arc::new(networks), lookup: Arc::new(lookup) };
        let client = reqwest::Client::builder().no_proxy().pool_max_idle_per_host(0).dns_resolver(Arc::new(guard));
        client.build().expect("a client")
    }

    /// Answers every request; gives its port, and how many connections there were.
    fn server(ip: IpAddr, port: u16) -> (u16, Arc<AtomicUsize>) {
        let listener = TcpListener::bind((ip, port)).expect("a free port");
        let (port, count) = (listener.local_addr().expect("an address").port(), Arc::<AtomicUsize>::default());
        let connections = count.clone();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                connections.fetch_add(1, Ordering::SeqCst);
                let _ = stream.read(&mut [0; 4096]);
                let _ = stream.write_all(b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n");
            }
        });
        (port, count)
    }

    #[tokio::test]
    async fn the_address_that_was_judged_is_the_one_that_is_connected_to() {
        let [allowed, inside]: [IpAddr; 2] = ["127.0.0.1", "127.0.0.2"].map(|text| text.parse().expect("an address"));
        let (port, reached) = server(allowed, 0);
        let (_, stolen) = server(inside, port);
        // The name points to the allowed address while it is judged, to the other one from then on.
        let client = client(vec![vec![allowed], vec![inside], vec![inside, allowed]]);
        let url = format!("http://rebinding.example:{port}/");
        assert_eq!(client.get(&url).send().await.expect("an answer").status(), 204);
        let error = client.get(&url).send().await.expect_err("the address is refused now");
        let mut cause = std::error::Error::source(&error);
        while let Some(inner) = cause.filter(|inner| !inner.is::<Refused>()) {
            cause = inner.source();
        }
        assert_eq!(cause.map(ToString::to_string), Some(Refused(inside).to_string()));
        // Of several addresses only those that are allowed are tried.
        assert_eq!(client.get(&url).send().await.expect("an answer").status(), 204);
        assert_eq!((reached.load(Ordering::SeqCst), stolen.load(Ordering::SeqCst)), (2, 0));
    }
}

//! TCP to a name that has several addresses, of which some may be dead: the next is tried when the one before has failed
//! or has not answered for a moment, and the first that answers is taken.
//!
//! Source: RFC 8305, "Happy Eyeballs Version 2".

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;

/// How long an address is waited for before the next is tried beside it.
const HEAD_START: Duration = Duration::from_millis(250);

/// The addresses of a name, the two families in turn, each in the resolver's order.
pub async fn resolve(name: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    let found: Vec<SocketAddr> = tokio::net::lookup_host((name, port)).await?.collect();
    match found.is_empty() {
        true => Err(io::Error::new(io::ErrorKind::NotFound, "the name has no address")),
        false => Ok(alternate(found)),
    }
}

fn alternate(addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let first_is_v6 = addresses.first().is_some_and(SocketAddr::is_ipv6);
    let (one, other): (Vec<_>, Vec<_>) = addresses.into_iter().partition(|address| address.is_ipv6() == first_is_v6);
    let (mut one, mut other) = (one.into_iter(), other.into_iter());
    let mut all = Vec::new();
    loop {
        match (one.next(), other.next()) {
            (None, None) => return all,
            (a, b) => all.extend(a.into_iter().chain(b)),
        }
    }
}

/// Connects to whichever of the addresses answers first. The error is that of the last which failed.
pub async fn first_to_answer<T>(
    addresses: Vec<SocketAddr>,
    connect: impl Fn(SocketAddr) -> BoxFuture<'static, io::Result<T>>,
) -> io::Result<(SocketAddr, T)> {
    let mut waiting = addresses.into_iter();
    let mut under_way = FuturesUnordered::new();
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    loop {
        if let Some(address) = waiting.next() {
            let connecting = connect(address);
            under_way.push(async move { (address, connecting.await) });
        }
        if under_way.is_empty() {
            return Err(last);
        }
        tokio::select! {
            Some((address, result)) = under_way.next() => match result {
                Ok(stream) => return Ok((address, stream)),
                Err(error) => last = error,
            },
            () = tokio::time::sleep(HEAD_START), if waiting.len() > 0 => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> SocketAddr {
        ([192, 0, 2, last], 1).into()
    }

    #[tokio::test]
    async fn a_dead_address_does_not_hide_a_living_one() {
        let connect = |to: SocketAddr| -> BoxFuture<'static, io::Result<()>> {
            Box::pin(async move {
                match to {
                    to if to == address(1) => std::future::pending().await,
                    to if to == address(2) => Err(io::Error::from(io::ErrorKind::ConnectionRefused)),
                    _ => Ok(()),
                }
            })
        };
        for order in [[1, 2, 3], [2, 1, 3], [3, 2, 1]] {
            let (found, ()) = first_to_answer(order.map(address).to_vec(), connect).await.unwrap();
            assert_eq!(found, address(3), "{order:?}");
        }
        let refused = first_to_answer(vec![address(2)], connect).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        assert!(first_to_answer(vec![], connect).await.is_err());
    }

    #[test]
    fn both_families_are_tried_early() {
        let six = |last: u16| SocketAddr::from(([0xfd00, 0, 0, 0, 0, 0, 0, last], 1));
        assert_eq!(alternate(vec![six(1), six(2), address(1)]), [six(1), address(1), six(2)]);
    }
}

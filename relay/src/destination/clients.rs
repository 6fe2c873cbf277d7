//! HTTP clients, shared by all webhooks that need the same. A client has one pool of connections and one state of TLS; it
//! goes with the last lane that uses it.
//!
//! Connections that were made before the allowed networks changed may lead to where nobody may go any more, so that each
//! change brings new clients.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use reqwest::{Client, redirect};

use super::ConfigError;
use super::address::Networks;
use super::connecting::Watch;
use super::keep::{IDLE, Keep, MOST_OF_HOST};
use super::route::{Route, Routes};
use super::webhook::causes;

/// What makes one client different from another.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct ClientKey {
    pub connect_timeout: Duration,
    pub route: Route,
}

/// Clients by what they are for.
pub struct Clients {
    networks: Arc<Networks>,
    routes: Routes,
    keep: Arc<Keep>,
    /// With the generation of the networks.
    made: Mutex<HashMap<(u64, ClientKey), Weak<Client>>>,
}

impl Clients {
    pub fn new(networks: Arc<Networks>, routes: Routes) -> Self {
        Clients { networks, routes, keep: Arc::default(), made: Mutex::default() }
    }

    pub fn networks(&self) -> &Arc<Networks> {
        &self.networks
    }

    pub fn routes(&self) -> &Routes {
        &self.routes
    }

    /// Which connections may be kept, of all clients.
    pub fn keep(&self) -> &Arc<Keep> {
        &self.keep
    }

    /// The client for this key, as the networks are now. Connects to nothing yet.
    pub fn get(&self, key: &ClientKey) -> Result<Arc<Client>, ConfigError> {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        let generation = self.networks.generation();
        if let Some(client) = made.get(&(generation, key.clone())).and_then(Weak::upgrade) {
            return Ok(client);
        }
        let client = Arc::new(self.build(key)?);
        made.retain(|_, client| client.strong_count() > 0);
        made.insert((generation, key.clone()), Arc::downgrade(&client));
        Ok(client)
    }

    fn build(&self, key: &ClientKey) -> Result<Client, ConfigError> {
        let builder = self.routes.apply(&key.route, &self.networks, Client::builder())?;
        builder
            .redirect(redirect::Policy::none())
            .connect_timeout(key.connect_timeout)
            .connector_layer(Watch)
            .pool_max_idle_per_host(MOST_OF_HOST)
            .pool_idle_timeout(IDLE)
            .tcp_nodelay(true)
            .user_agent(concat!("pg_outbox/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| ConfigError(format!("this relay has no HTTP client: {}", causes(&error.without_url()))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(seconds: u64) -> ClientKey {
        ClientKey { connect_timeout: Duration::from_secs(seconds), route: Route::default() }
    }

    #[test]
    fn webhooks_that_need_the_same_share_a_client_until_the_networks_change() {
        let _installed = rustls::crypto::ring::default_provider().install_default();
        let networks = Arc::new(Networks::default());
        let clients = Clients::new(networks.clone(), Routes::default());
        let first = clients.get(&key(5)).expect("a client");
        assert!(Arc::ptr_eq(&first, &clients.get(&key(5)).expect("a client")));
        assert!(!Arc::ptr_eq(&first, &clients.get(&key(6)).expect("a client")));
        networks.set_of_database("10.0.0.0/8").expect("a network");
        let other = clients.get(&key(5)).expect("a client");
        assert!(!Arc::ptr_eq(&first, &other));
        drop((first, other));
        let last = clients.get(&key(7)).expect("a client");
        assert_eq!(clients.made.lock().expect("no panic").len(), 1, "those that nobody uses are gone");
        drop(last);
    }
}

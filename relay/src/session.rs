//! Sessions with PostgreSQL, one after the other: connect, listen, attach, catch up, work; on any loss the same again.
//!
//! Listening comes before catching up, so that nothing committed in between is missed. When a session is lost, all that it
//! held is dropped here: the server gives it back by itself, to whoever claims next. So it does when a session panics.

use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use tokio::sync::mpsc::unbounded_channel;

use crate::backoff::Backoff;
use crate::config::Config;
use crate::destination::Environment;
use crate::dispatch::{Dispatcher, answer_limit};
use crate::error::{Error, Result};
use crate::metrics::Metrics;
use crate::postgres::{Connector, Pair};
use crate::shutdown::Shutdown;
use crate::store::Store;
use crate::systemd::Systemd;
use crate::ui;

/// Until a session listens and is attached; beyond that something stands in the way that may be gone at the next try.
const OPEN_TIMEOUT: Duration = Duration::from_secs(60);

/// The session that is at work, for those that only want to ask it something; without one, why there is none.
#[derive(Clone)]
pub struct Current(Arc<Mutex<std::result::Result<Arc<Store>, String>>>);

impl Default for Current {
    fn default() -> Self {
        Current(Arc::new(Mutex::new(Err("not connected to PostgreSQL yet".into()))))
    }
}

impl Current {
    pub fn store(&self) -> std::result::Result<Arc<Store>, String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, store: std::result::Result<Arc<Store>, String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = store;
        ui::happened();
    }
}

pub struct Sessions {
    pub config: Arc<Config>,
    pub connector: Connector,
    pub environment: Arc<Environment>,
    pub metrics: Metrics,
    pub current: Current,
    pub shutdown: Shutdown,
    pub systemd: Systemd,
}

impl Sessions {
    /// Works until a shutdown is requested and all that is held is settled or given back.
    pub async fn run(&self) -> Result<()> {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(3))
            .ok_or_else(|| Error::Configuration("reconnection schedule".into()))?;
        while !self.shutdown.is_requested() {
            let started = Instant::now();
            let result = AssertUnwindSafe(self.session())
                .catch_unwind()
                .await
                .unwrap_or_else(|_| Err(Error::Server("the relay failed, see the line before; it begins anew".into())));
            self.metrics.connected.set(0);
            let error = match result {
                Ok(()) => return Ok(()),
                // Trying again can't help.
                Err(error @ Error::Configuration(_)) => return Err(error),
                Err(error) => error,
            };
            let reason = format!("no session with PostgreSQL: {error}");
            self.systemd.waiting(&reason);
            self.current.set(Err(reason));
            self.metrics.reconnects.inc();
            if started.elapsed() > Duration::from_secs(30) {
                backoff.reset();
            }
            let wait = backoff.next();
            let again_in_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
            tracing::warn!(%error, again_in_ms, database = self.connector.target(), "no session with PostgreSQL");
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.shutdown.requested() => {}
            }
        }
        Ok(())
    }

    async fn session(&self) -> Result<()> {
        let (notified, mut notifications) = unbounded_channel();
        let open = async {
            let pair = Pair::open(&self.connector, Some(notified), answer_limit(&self.config.tuning)).await?;
            let patterns = self.environment.patterns().like();
            let opening = Store::open(pair, &self.config.consumer, patterns, &mut notifications);
            let (store, claims, settles) = opening.await?;
            Ok::<_, Error>((Arc::new(store), claims, settles))
        };
        let (store, mut claims, mut settles) = tokio::select! {
            opened = tokio::time::timeout(OPEN_TIMEOUT, open) => opened.unwrap_or_else(|_| {
                Err(Error::Server(format!("PostgreSQL let nobody attach within {} s", OPEN_TIMEOUT.as_secs())))
            })?,
            () = self.shutdown.requested() => return Ok(()),
        };
        self.current.set(Ok(store.clone()));
        self.metrics.connected.set(1);
        self.systemd.ready();
        tracing::info!(consumer = self.config.consumer, database = self.connector.target(), "listening");
        let mut dispatcher = Dispatcher::new(store, self.environment.clone(), self.config.tuning, self.metrics.clone());
        tokio::select! {
            biased;
            result = dispatcher.run(&mut notifications, &self.shutdown) => result,
            result = claims.ended() => lost(result),
            result = settles.ended() => lost(result),
        }
    }
}

fn lost(result: Result<()>) -> Result<()> {
    result.and(Err(Error::Server("the connection was closed".into())))
}

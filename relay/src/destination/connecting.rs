//! How far a request's connection came: whether it had to be made, and whether it was.
//!
//! The HTTP client keeps that to itself, but it matters. A request that failed on a connection which another request had
//! used before may only have met its end; and what ran out of time before there was a connection was never sent.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll};

use futures_util::future::BoxFuture;
use tower_layer::Layer;
use tower_service::Service;

const REUSED: u8 = 0;
const CONNECTING: u8 = 1;
const CONNECTED: u8 = 2;

/// Of one request.
#[derive(Clone, Default)]
pub struct Progress(Arc<AtomicU8>);

tokio::task_local! {
    static OF_REQUEST: Progress;
}

impl Progress {
    /// The next request of the same attempt.
    pub fn begin(&self) {
        self.0.store(REUSED, Ordering::SeqCst);
    }

    /// Sends the request that this is the progress of.
    pub async fn of<T>(&self, request: impl Future<Output = T>) -> T {
        OF_REQUEST.scope(self.clone(), request).await
    }

    /// A connection was asked for and is not made yet.
    pub fn is_connecting(&self) -> bool {
        self.0.load(Ordering::SeqCst) == CONNECTING
    }

    /// The request went out on a connection that had served another.
    pub fn reused_a_connection(&self) -> bool {
        self.0.load(Ordering::SeqCst) == REUSED
    }
}

/// Goes around the client's connector.
#[derive(Clone)]
pub struct Watch;

impl<S> Layer<S> for Watch {
    type Service = Watched<S>;

    fn layer(&self, connector: S) -> Watched<S> {
        Watched(connector)
    }
}

#[derive(Clone)]
pub struct Watched<S>(S);

impl<S, R> Service<R> for Watched<S>
where
    S: Service<R>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<S::Response, S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: R) -> Self::Future {
        // The client asks for a connection within the request that needs it.
        let progress = OF_REQUEST.try_with(Progress::clone).unwrap_or_default();
        progress.0.store(CONNECTING, Ordering::SeqCst);
        let connecting = self.0.call(request);
        Box::pin(async move {
            let connection = connecting.await?;
            progress.0.store(CONNECTED, Ordering::SeqCst);
            Ok(connection)
        })
    }
}

//! The relay's own pages: `/metrics`, `/healthz` (the process lives) and `/readyz` (it listens and is attached).

use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;

use crate::error::{Error, Result};
use crate::metrics::Metrics;
use crate::session::Current;

#[derive(Clone)]
struct Pages {
    metrics: Metrics,
    current: Current,
}

/// Binds now, so that an address in use is an error at the start, and serves in the background.
pub async fn serve(address: SocketAddr, metrics: Metrics, current: Current) -> Result<()> {
    let listener = TcpListener::bind(address)
        .await
        .map_err(|error| Error::Listen(format!("can't listen on {address}: {error}")))?;
    let pages = Router::new()
        .route("/metrics", get(show_metrics))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readiness))
        .with_state(Pages { metrics, current });
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, pages).await {
            tracing::error!(%error, "the HTTP listener has ended");
        }
    });
    Ok(())
}

async fn readiness(State(pages): State<Pages>) -> Response {
    match pages.current.store() {
        Some(_) => (StatusCode::OK, "ready\n").into_response(),
        None => (StatusCode::SERVICE_UNAVAILABLE, "not connected to PostgreSQL\n").into_response(),
    }
}

/// Asks the database for its gauges now, and goes without them when it does not answer soon.
async fn show_metrics(State(pages): State<Pages>) -> Response {
    let stats = match pages.current.store() {
        Some(store) => tokio::time::timeout(Duration::from_secs(2), store.stats())
            .await
            .ok()
            .and_then(|r| r.inspect_err(|error| tracing::warn!(%error, "outbox.stats() failed")).ok()),
        None => None,
    };
    match pages.metrics.render(stats.as_ref()) {
        Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

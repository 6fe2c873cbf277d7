//! The relay's own pages: `/metrics`, `/healthz` (the process lives) and `/readyz` (it listens and is attached).
//!
//! Nobody holds a connection: each is for one request, which has seconds to arrive, and when too many are open the oldest
//! goes. What the relay needs its descriptors for is delivery. The streams of the page (`ui`) alone stay, few and not for
//! ever.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{Request, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tower_service::Service;

use crate::error::{Error, Result};
use crate::metrics::Metrics;
use crate::session::Current;
use crate::store::Figures;

/// More than any number of scrapers and probes need at once.
const MOST_CONNECTIONS: usize = 64;

/// For a request's head to arrive.
const HEAD: Duration = Duration::from_secs(5);

/// For a connection as a whole, its answer included.
const CONNECTION: Duration = Duration::from_secs(20);

/// For a stream; whoever still looks connects again.
const STREAM: Duration = Duration::from_secs(3600);

/// For a peer that takes nothing any more.
const SILENCE: Duration = Duration::from_secs(30);

/// Bytes of a request's head.
const BUFFER: usize = 16 * 1024;

/// Comes with each request: whether its connection stays open for a stream.
#[derive(Clone, Default)]
pub struct Stays(Arc<AtomicBool>);

impl Stays {
    pub fn stay(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn is_stream(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Clone)]
struct Pages {
    metrics: Metrics,
    current: Current,
}

/// Binds now, so that an address in use is an error at the start, and serves in the background.
pub async fn serve(address: SocketAddr, metrics: Metrics, current: Current, ui: Option<Router>) -> Result<()> {
    let listener = TcpListener::bind(address)
        .await
        .map_err(|error| Error::Listen(format!("can't listen on {address}: {error}")))?;
    let pages = Router::new()
        .route("/metrics", get(show_metrics))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readiness))
        .with_state(Pages { metrics, current })
        .merge(ui.unwrap_or_default());
    tokio::spawn(accept(listener, pages));
    Ok(())
}

async fn accept(listener: TcpListener, pages: Router) {
    let mut open: VecDeque<(JoinHandle<()>, Stays)> = VecDeque::new();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                open.retain(|(connection, _)| !connection.is_finished());
                if open.len() >= MOST_CONNECTIONS {
                    let oldest = open.iter().position(|(_, stays)| !stays.is_stream()).unwrap_or(0);
                    if let Some((connection, _)) = open.remove(oldest) {
                        connection.abort();
                    }
                }
                let stays = Stays::default();
                open.push_back((tokio::spawn(answer(stream, pages.clone(), stays.clone())), stays));
            }
            Err(error) => {
                tracing::warn!(%error, "a connection to the HTTP listener could not be taken");
                sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

async fn answer(stream: TcpStream, pages: Router, stays: Stays) {
    let socket = SockRef::from(&stream);
    // Not on every system; then a peer that is gone costs its connection until the time is up.
    let _unsupported = socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(SILENCE).with_interval(SILENCE));
    let _unsupported = socket.set_tcp_user_timeout(Some(SILENCE));
    let of_request = stays.clone();
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(of_request.clone());
        pages.clone().call(request)
    });
    let mut server = http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(HEAD).keep_alive(false).max_buf_size(BUFFER);
    let connection = server.serve_connection(TokioIo::new(stream), service);
    // Whoever asked and did not wait, or asked badly, has no need of a line in the log.
    tokio::select! {
        _ended = connection => {}
        () = time_is_up(&stays) => {}
    }
}

async fn time_is_up(stays: &Stays) {
    sleep(CONNECTION).await;
    if stays.is_stream() {
        sleep(STREAM).await;
    }
}

async fn readiness(State(pages): State<Pages>) -> Response {
    match pages.current.store() {
        Ok(_) => (StatusCode::OK, "ready\n").into_response(),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")).into_response(),
    }
}

/// Asks the database for its gauges now, and goes without them when it does not answer soon.
async fn show_metrics(State(pages): State<Pages>) -> Response {
    match pages.metrics.render(figures(&pages).await.as_ref()) {
        Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

async fn figures(pages: &Pages) -> Option<Figures> {
    let store = pages.current.store().ok()?;
    let (named, most) = pages.metrics.named_destinations();
    let asked = timeout(Duration::from_secs(2), store.figures(named, most)).await.ok()?;
    asked.inspect_err(|error| tracing::warn!(%error, "outbox.metrics() failed")).ok().flatten()
}

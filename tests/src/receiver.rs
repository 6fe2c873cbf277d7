//! A real HTTP server for webhooks: records each request and answers as the test says.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use axum::response::Response;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use uuid::Uuid;

use crate::wait;

/// A request as it arrived.
#[derive(Debug, Clone)]
pub struct Received {
    pub at: SystemTime,
    pub method: Method,
    pub path: String,
    pub headers: HeaderMap,
    pub body: Vec<u8>,
}

/// How a request is answered.
#[derive(Debug, Clone, Default)]
pub enum Reply {
    /// 204 at once.
    #[default]
    Accept,
    Status(u16),
    /// A status with headers and a body.
    With(u16, Vec<(&'static str, String)>, Vec<u8>),
    /// The same as another, after a while.
    After(Duration, Box<Reply>),
    /// Nothing, ever; the connection stays open.
    Never,
    /// A status and headers, then a body that never ends and never stops.
    EndlessBody(u16),
}

type Script = Box<dyn Fn(usize, &Received) -> Reply + Send + Sync>;

struct Shared {
    script: Mutex<Script>,
    received: Mutex<Vec<Received>>,
}

/// Serves in threads of its own until dropped; then connections break and new ones are refused.
pub struct Receiver {
    address: SocketAddr,
    shared: Arc<Shared>,
    runtime: Option<Runtime>,
}

impl Receiver {
    /// Accepts everything on a free port of 127.0.0.1.
    pub fn start() -> Result<Self> {
        Self::on(crate::scratch::free_port()?)
    }

    /// The same on a given port, such as that of one dropped before.
    pub fn on(port: u16) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let shared =
            Arc::new(Shared { script: Mutex::new(Box::new(|_, _| Reply::Accept)), received: Mutex::default() });
        let listener =
            std::net::TcpListener::bind(("127.0.0.1", port)).with_context(|| format!("can't listen on port {port}"))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let router = Router::new().fallback(handle).with_state(shared.clone());
        runtime.spawn(async move {
            match TcpListener::from_std(listener) {
                Ok(listener) => axum::serve(listener, router).await,
                Err(error) => Err(error),
            }
        });
        Ok(Receiver { address, shared, runtime: Some(runtime) })
    }

    /// Answers from now on as the function says; it gets the number of requests before, and the request.
    pub fn reply_with(&self, script: impl Fn(usize, &Received) -> Reply + Send + Sync + 'static) {
        *lock(&self.shared.script) = Box::new(script);
    }

    /// Answers all requests alike from now on.
    pub fn reply(&self, reply: Reply) {
        self.reply_with(move |_, _| reply.clone());
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}/{}", self.address, path.trim_start_matches('/'))
    }

    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// All requests so far, in the order of arrival.
    pub fn received(&self) -> Vec<Received> {
        lock(&self.shared.received).clone()
    }

    pub fn count(&self) -> usize {
        lock(&self.shared.received).len()
    }

    /// Waits for that many requests in all, and returns them.
    pub async fn wait_for(&self, count: usize, limit: Duration) -> Result<Vec<Received>> {
        let look = async || Ok((self.count() >= count).then(|| self.received()));
        wait::until(&format!("{count} webhook requests"), limit, look)
            .await
            .with_context(|| format!("{} arrived", self.count()))
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Received {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// The event's identity, from `webhook-id`.
    pub fn event_id(&self) -> Result<Uuid> {
        Ok(self.header("webhook-id").context("no webhook-id")?.parse()?)
    }

    pub fn json(&self) -> Result<serde_json::Value> {
        Ok(serde_json::from_slice(&self.body)?)
    }
}

async fn handle(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let at = SystemTime::now();
    let (parts, body) = request.into_parts();
    let body = to_bytes(body, usize::MAX).await.map(|bytes| bytes.to_vec()).unwrap_or_default();
    let received = Received { at, method: parts.method, path: parts.uri.to_string(), headers: parts.headers, body };
    let number = {
        let mut all = lock(&shared.received);
        all.push(received.clone());
        all.len() - 1
    };
    let mut reply = lock(&shared.script)(number, &received);
    while let Reply::After(delay, then) = reply {
        tokio::time::sleep(delay).await;
        reply = *then;
    }
    match reply {
        Reply::Status(status) => response(status, &[], Body::empty()),
        Reply::With(status, headers, body) => response(status, &headers, body.into()),
        Reply::Never => std::future::pending().await,
        Reply::EndlessBody(status) => {
            let chunks = futures_util::stream::repeat_with(|| Ok::<_, std::io::Error>(vec![b'x'; 4096]));
            response(status, &[], Body::from_stream(chunks))
        }
        Reply::Accept | Reply::After(..) => response(204, &[], Body::empty()),
    }
}

fn response(status: u16, headers: &[(&'static str, String)], body: Body) -> Response {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    for (name, value) in headers {
        if let Ok(value) = HeaderValue::from_str(value) {
            response.headers_mut().append(HeaderName::from_static(name), value);
        }
    }
    response
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

//! What keeps open pages up to date: when something has happened and somebody looks, `outbox.stats()` is asked, at most once
//! a second for all of them together, and each page is told. While nothing happens nothing is asked.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures_util::stream::unfold;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::database::Database;
use super::login::Login;
use super::queries;
use super::tail::Heard;
use crate::error::Result;
use crate::timer::sleep_until;

/// Pages that are kept up to date at once.
const MOST_VIEWERS: usize = 32;

/// Between two questions.
const PACE: Duration = Duration::from_secs(1);

/// After the last thing that happened it is asked again so often: what follows from it may take a moment.
const TRAILING: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(3)];

pub struct Hub {
    heard: &'static Heard,
    database: Database,
    viewers: Arc<Semaphore>,
    /// Tells this process from the one before it, for pages that connect again.
    boot: u64,
    news: watch::Sender<Arc<News>>,
}

/// What all pages were told last.
#[derive(Default)]
struct News {
    number: u64,
    json: String,
}

impl Hub {
    pub fn start(heard: &'static Heard, database: Database) -> Arc<Self> {
        let boot = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
        let hub = Arc::new(Hub {
            heard,
            database,
            viewers: Arc::new(Semaphore::new(MOST_VIEWERS)),
            boot: u64::try_from(boot).unwrap_or_default(),
            news: watch::Sender::new(Arc::new(News { number: 0, json: "{}".into() })),
        });
        tokio::spawn(hub.clone().tell());
        hub
    }

    async fn tell(self: Arc<Self>) {
        let (mut again_at, mut asked) = (None, 0);
        loop {
            tokio::select! {
                () = self.heard.happened.notified() => asked = 0,
                () = sleep_until(again_at), if again_at.is_some() => {}
            }
            if self.viewers.available_permits() == MOST_VIEWERS {
                again_at = None;
                continue;
            }
            self.push().await;
            again_at = TRAILING.get(asked).map(|wait| Instant::now() + *wait);
            asked += 1;
            tokio::time::sleep(PACE).await;
        }
    }

    async fn push(&self) {
        let stats = match self.stats().await {
            Ok(stats) => format!("\"stats\":{stats}"),
            Err(error) => format!("\"error\":{}", serde_json::Value::String(error.to_string())),
        };
        let number = self.news.borrow().number + 1;
        self.news.send_replace(Arc::new(News { number, json: format!("{{{stats}}}") }));
    }

    pub async fn stats(&self) -> Result<String> {
        queries::text(&self.database.ask(queries::STATS, &[]).await?)
    }

    /// Streams whose session has ended end.
    pub fn look_at_sessions(&self) {
        self.news.send_modify(|_| {});
    }

    /// A stream of news for the page of one session, which saw `last` before it lost its stream; none when too many look.
    pub fn stream(&self, login: Arc<Login>, token: String, last: Option<&str>) -> Option<Response> {
        let viewer = self.viewers.clone().try_acquire_owned().ok()?;
        let mut news = self.news.subscribe();
        let now = news.borrow_and_update().clone();
        let missed = last.is_some_and(|last| last != self.id(&now));
        let first = if missed { self.event("changed", &now) } else { self.event("hello", &now) };
        let listener =
            Listener { news, told: now.number, boot: self.boot, login, token, first: Some(first), _viewer: viewer };
        let body = Body::from_stream(unfold(listener, |mut listener| async {
            let chunk = listener.next().await?;
            Some((Ok::<_, std::convert::Infallible>(Bytes::from(chunk)), listener))
        }));
        Some(([(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-store")], body).into_response())
    }

    fn id(&self, news: &News) -> String {
        format!("{}-{}", self.boot, news.number)
    }

    fn event(&self, kind: &str, news: &News) -> String {
        event(self.boot, kind, news)
    }
}

fn event(boot: u64, kind: &str, news: &News) -> String {
    format!("id: {boot}-{}\nevent: {kind}\nretry: 2000\ndata: {}\n\n", news.number, news.json)
}

/// One open page.
struct Listener {
    news: watch::Receiver<Arc<News>>,
    told: u64,
    boot: u64,
    login: Arc<Login>,
    token: String,
    first: Option<String>,
    _viewer: OwnedSemaphorePermit,
}

impl Listener {
    /// The next thing to say; none: the stream ends.
    async fn next(&mut self) -> Option<String> {
        if let Some(first) = self.first.take() {
            return Some(first);
        }
        loop {
            self.news.changed().await.ok()?;
            let news = self.news.borrow_and_update().clone();
            if !self.login.is_session(&self.token) {
                return None;
            }
            if news.number != self.told {
                self.told = news.number;
                return Some(event(self.boot, "changed", &news));
            }
        }
    }
}

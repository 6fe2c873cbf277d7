//! The page for operators at `/ui/`, when a password is configured. It shows what the database's own functions and views say
//! and what this relay has just done; it does what the relay's role may do.
//!
//! - `files`: what browsers load; `answer`: how they are answered
//! - `guard`: which requests are the page's own; `login`: who may look
//! - `database`: the session of the page's own; `queries`: what it asks there
//! - `stream`: how open pages are kept up to date; `tail`: what delivery tells the page, and all that it knows of it
//! - `actions`: what an operator does

mod actions;
mod answer;
mod database;
mod files;
mod guard;
mod login;
mod queries;
mod stream;
mod tail;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Extension, Path, RawQuery, Request, State};
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use axum::{Router, routing::post};
use tokio::sync::Mutex;
use tokio_postgres::types::ToSql;

use self::database::Database;
use self::guard::Names;
use self::login::{Login, Tried};
use self::stream::Hub;
pub use self::tail::{attempted, begun, happened};
use crate::config;
use crate::error::Result;
use crate::http::Stays;
use crate::postgres::Connector;

/// An answer serves everybody who asks the same so soon after.
const FRESH: Duration = Duration::from_secs(1);

/// Bytes of a request's body.
const BODY: usize = 16 * 1024;

#[derive(Clone)]
pub struct Page(Arc<Inner>);

struct Inner {
    login: Arc<Login>,
    names: Names,
    cookie: String,
    consumer: String,
    database: Database,
    heard: &'static tail::Heard,
    hub: Arc<Hub>,
    answers: Mutex<HashMap<String, (Instant, String)>>,
}

impl Page {
    fn database(&self) -> &Database {
        &self.0.database
    }

    /// The answer to a question, which may be a second old.
    async fn answer(&self, key: &str, sql: &str, parameters: &[&(dyn ToSql + Sync)]) -> Result<String> {
        let mut answers = self.0.answers.lock().await;
        answers.retain(|_, (at, _)| at.elapsed() < FRESH);
        if let Some((_, answer)) = answers.get(key) {
            return Ok(answer.clone());
        }
        let answer = queries::text(&self.database().ask(sql, parameters).await?)?;
        answers.insert(key.to_owned(), (Instant::now(), answer.clone()));
        Ok(answer)
    }

    async fn forget_answers(&self) {
        self.0.answers.lock().await.clear();
    }

    /// The token of the request's session, if it has one that lasts.
    fn session(&self, headers: &HeaderMap) -> Option<String> {
        let token = cookie(headers, &self.0.cookie)?;
        self.0.login.is_session(&token).then_some(token)
    }
}

/// What is served below `/ui`.
pub fn pages(ui: &config::Ui, port: u16, consumer: &str, connector: Connector) -> Result<Router> {
    let (heard, database) = (tail::begin(), Database::new(connector));
    let page = Page(Arc::new(Inner {
        login: Arc::new(Login::new(&ui.password)?),
        names: Names::new(&ui.hosts),
        // Cookies know no ports: several relays of one host would log each other out.
        cookie: format!("outbox_session_{port}"),
        consumer: consumer.to_owned(),
        heard,
        hub: Hub::start(heard, database.clone()),
        database,
        answers: Mutex::default(),
    }));
    let data = Router::new()
        .route("/ui/stream", get(stream))
        .route("/ui/api/me", get(me))
        .route("/ui/api/overview", get(overview))
        .route("/ui/api/stats", get(stats))
        .route("/ui/api/destinations", get(destinations))
        .route("/ui/api/dead", get(dead))
        .route("/ui/api/waiting", get(waiting))
        .route("/ui/api/events/{event_id}", get(event))
        .route("/ui/api/tail", get(recent))
        .route("/ui/api/under-way", get(under_way))
        .route("/ui/api/{action}", post(actions::act))
        .route("/ui/logout", post(logout))
        .layer(middleware::from_fn_with_state(page.clone(), only_own_sessions));
    let shown = || get(show).post(log_in);
    Ok(Router::new()
        .route("/ui", get(|| async { (StatusCode::PERMANENT_REDIRECT, [(header::LOCATION, "/ui/")]) }))
        .route("/ui/", shown())
        .route("/ui/login", shown())
        .route("/ui/destinations", shown())
        .route("/ui/dead", shown())
        .route("/ui/waiting", shown())
        .route("/ui/tail", shown())
        .route("/ui/events/{event_id}", shown())
        .route("/ui/assets/{name}", get(files::serve))
        .merge(data)
        .layer(middleware::from_fn_with_state(page.clone(), only_own_hosts))
        .layer(middleware::from_fn(answer::add_headers))
        .layer(DefaultBodyLimit::max(BODY))
        .with_state(page))
}

async fn only_own_hosts(State(page): State<Page>, request: Request, next: Next) -> Response {
    if page.0.names.is_ours(request.headers()) {
        return next.run(request).await;
    }
    let why = "this name is not the relay's: use its address, or give the name with OUTBOX_UI_HOSTS\n";
    (StatusCode::FORBIDDEN, why).into_response()
}

/// Data and changes are for those who are logged in, and changes for the page itself alone.
async fn only_own_sessions(State(page): State<Page>, request: Request, next: Next) -> Response {
    let headers = request.headers();
    if !request.method().is_safe() && !page.0.names.may_change(headers) {
        let why = "a change needs the header X-Outbox-Request: 1 and the page's own Origin";
        return answer::refused(StatusCode::FORBIDDEN, why);
    }
    match page.session(headers) {
        Some(_) => next.run(request).await,
        None => answer::refused(StatusCode::UNAUTHORIZED, "not logged in"),
    }
}

/// The page, or the login where it would be.
async fn show(State(page): State<Page>, uri: Uri, headers: HeaderMap) -> Response {
    match page.session(&headers) {
        Some(_) if uri.path() == "/ui/login" => to_page("/ui/"),
        Some(_) => Html(files::SHELL).into_response(),
        None => Html(login_page("")).into_response(),
    }
}

async fn log_in(State(page): State<Page>, uri: Uri, headers: HeaderMap, body: Bytes) -> Response {
    if headers.contains_key(header::ORIGIN) && !page.0.names.is_own_origin(&headers) {
        return (StatusCode::FORBIDDEN, "another page's form\n").into_response();
    }
    let mut fields = url::form_urlencoded::parse(&body);
    let password = fields.find(|(name, _)| name == "password").map(|(_, value)| value.into_owned());
    match page.0.login.attempt(&password.unwrap_or_default()).await {
        Ok(Tried::Right(token)) => {
            // Without a host, whatever the request line named.
            let here = uri.path_and_query().map_or("/ui/", |here| here.as_str());
            let to = if uri.path() == "/ui/login" { "/ui/" } else { here };
            let cookie = set_cookie(&page, &headers, &token, Login::life());
            ([(header::SET_COOKIE, cookie)], to_page(to)).into_response()
        }
        Ok(Tried::Wrong) => {
            if let Some(tries) = page.0.login.wrong_tries_to_tell() {
                tracing::warn!(tries, "wrong passwords for the page");
            }
            (StatusCode::UNAUTHORIZED, Html(login_page("Wrong password."))).into_response()
        }
        Ok(Tried::TooMany) => {
            let page = Html(login_page("Too many tries at the moment. Try again in a few seconds."));
            (StatusCode::TOO_MANY_REQUESTS, [(header::RETRY_AFTER, "5")], page).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

fn login_page(error: &'static str) -> String {
    files::LOGIN.replace("<!-- error -->", error)
}

/// By GET, whatever the request was.
fn to_page(path: &str) -> Response {
    (StatusCode::SEE_OTHER, [(header::LOCATION, path)]).into_response()
}

async fn logout(State(page): State<Page>, headers: HeaderMap) -> Response {
    if let Some(token) = page.session(&headers) {
        page.0.login.end(&token);
        page.0.hub.look_at_sessions();
    }
    ([(header::SET_COOKIE, set_cookie(&page, &headers, "", 0))], answer::json("{}".into())).into_response()
}

fn set_cookie(page: &Page, headers: &HeaderMap, token: &str, seconds: u64) -> String {
    let secure = if guard::is_https(headers) { "; Secure" } else { "" };
    format!("{}={token}; Path=/ui; HttpOnly; SameSite=Strict; Max-Age={seconds}{secure}", page.0.cookie)
}

fn cookie(headers: &HeaderMap, name: &str) -> Option<String> {
    let all = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
    let mut pairs = all.flat_map(|value| value.split(';')).filter_map(|pair| pair.trim().split_once('='));
    pairs.find(|(key, _)| *key == name).map(|(_, value)| value.to_owned())
}

async fn stream(State(page): State<Page>, Extension(stays): Extension<Stays>, headers: HeaderMap) -> Response {
    let Some(token) = page.session(&headers) else {
        return answer::refused(StatusCode::UNAUTHORIZED, "not logged in");
    };
    let last = headers.get("last-event-id").and_then(|value| value.to_str().ok());
    match page.0.hub.stream(page.0.login.clone(), token, last) {
        Some(response) => {
            stays.stay();
            response
        }
        None => answer::refused(StatusCode::SERVICE_UNAVAILABLE, "too many pages are open"),
    }
}

async fn me(State(page): State<Page>) -> Response {
    let role = page.answer("me", queries::ROLE, &[]).await;
    answer::answer(role.map(|role| {
        let [database, consumer] = [page.database().target(), page.0.consumer.clone()].map(serde_json::Value::from);
        let version = env!("CARGO_PKG_VERSION");
        format!(r#"{{"database":{database},"consumer":{consumer},"version":"{version}","role":{role}}}"#)
    }))
}

async fn stats(State(page): State<Page>) -> Response {
    answer::answer(page.answer("stats", queries::STATS, &[]).await)
}

async fn overview(State(page): State<Page>) -> Response {
    answer::answer(page.answer("health", queries::HEALTH, &[]).await)
}

async fn destinations(State(page): State<Page>, RawQuery(query): RawQuery) -> Response {
    let [name] = fields(query.as_deref(), ["name"]);
    answer::answer(page.answer(&format!("destinations\n{name}"), queries::DESTINATIONS, &[&name]).await)
}

async fn dead(State(page): State<Page>, RawQuery(query): RawQuery) -> Response {
    let filter = fields(query.as_deref(), ["destination", "type", "error", "since", "until"]);
    let parameters: Vec<&(dyn ToSql + Sync)> = filter.iter().map(|value| value as _).collect();
    answer::answer(page.answer(&format!("dead\n{}", filter.join("\n")), queries::DEAD, &parameters).await)
}

async fn waiting(State(page): State<Page>) -> Response {
    answer::answer(page.answer("waiting", queries::WAITING, &[]).await)
}

async fn event(State(page): State<Page>, Path(event_id): Path<String>) -> Response {
    match event_id.parse::<uuid::Uuid>() {
        Ok(id) => {
            let id = id.to_string();
            answer::answer(page.answer(&format!("event\n{id}"), queries::EVENT, &[&id]).await)
        }
        Err(_) => answer::refused(StatusCode::BAD_REQUEST, "an event_id is a UUID"),
    }
}

/// From memory; nothing is asked.
async fn recent(State(page): State<Page>, RawQuery(query): RawQuery) -> Response {
    let [after] = fields(query.as_deref(), ["after"]);
    remembered(&page.0.heard.after(after.parse().unwrap_or(0)))
}

async fn under_way(State(page): State<Page>) -> Response {
    remembered(&page.0.heard.under_way())
}

fn remembered(what: &impl serde::Serialize) -> Response {
    match serde_json::to_string(what) {
        Ok(text) => answer::json(text),
        Err(error) => answer::refused(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

/// Fields of a query string; what is left out is empty.
fn fields<const N: usize>(query: Option<&str>, names: [&str; N]) -> [String; N] {
    let all: HashMap<_, _> = url::form_urlencoded::parse(query.unwrap_or_default().as_bytes()).collect();
    names.map(|name| all.get(name).map(|value| value.trim().to_owned()).unwrap_or_default())
}

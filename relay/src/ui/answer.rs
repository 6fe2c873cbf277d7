//! How the page answers: JSON, pages and files, each with the headers that keep browsers from doing more than they should.

use axum::extract::Request;
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::error::Error;

/// Everything comes from the relay itself; nothing is inline, framed or guessed at.
const POLICY: &str =
    "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'";

pub fn json(text: String) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], text).into_response()
}

pub fn refused(status: StatusCode, why: &str) -> Response {
    let body = serde_json::json!({ "error": why }).to_string();
    (status, [(header::CONTENT_TYPE, "application/json")], body).into_response()
}

/// What PostgreSQL said, in a status that tells who has to do something about it.
pub fn failed(error: &Error) -> Response {
    let code = match error {
        Error::Database(error) => error.code().map(|code| code.code()),
        _ => None,
    };
    let status = match code {
        Some("42501") => StatusCode::FORBIDDEN,
        Some("42704") => StatusCode::NOT_FOUND,
        Some(code) if code.starts_with("22") || code.starts_with("42") => StatusCode::BAD_REQUEST,
        Some("57014") => StatusCode::GATEWAY_TIMEOUT,
        Some(_) => StatusCode::CONFLICT,
        None => StatusCode::SERVICE_UNAVAILABLE,
    };
    refused(status, &error.to_string())
}

pub fn answer(result: crate::error::Result<String>) -> Response {
    result.map_or_else(|error| failed(&error), json)
}

/// Adds the headers to whatever the page answers. Only files may be kept by browsers, and are asked for anew each time.
pub async fn add_headers(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::REFERRER_POLICY, "same-origin"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    if !headers.contains_key(header::CACHE_CONTROL) {
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    }
    response
}

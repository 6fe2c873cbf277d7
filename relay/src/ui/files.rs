//! The files of the page, which are part of the binary.

use std::fmt::Write;
use std::sync::LazyLock;

use axum::extract::Path;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};

pub const SHELL: &str = include_str!("../../ui/index.html");
pub const LOGIN: &str = include_str!("../../ui/login.html");

const SCRIPT: &str = "text/javascript; charset=utf-8";

macro_rules! files {
    ($($name:literal: $kind:expr),* $(,)?) => {
        [$(File { name: $name, kind: $kind, content: include_bytes!(concat!("../../ui/", $name)) }),*]
    };
}

struct File {
    name: &'static str,
    kind: &'static str,
    content: &'static [u8],
}

static FILES: [File; 13] = files![
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "preact.js": SCRIPT,
    "app.js": SCRIPT,
    "api.js": SCRIPT,
    "parts.js": SCRIPT,
    "dialog.js": SCRIPT,
    "overview.js": SCRIPT,
    "destinations.js": SCRIPT,
    "dead.js": SCRIPT,
    "waiting.js": SCRIPT,
    "event.js": SCRIPT,
    "tail.js": SCRIPT,
];

/// What a browser compares to know that it has a file already.
static TAGS: LazyLock<Vec<String>> = LazyLock::new(|| {
    FILES
        .iter()
        .map(|file| {
            let hash = Sha256::digest(file.content);
            let hex = hash.iter().take(12).fold(String::new(), |mut hex, byte| {
                // Writing to a String can't fail.
                let _ = write!(hex, "{byte:02x}");
                hex
            });
            format!("\"{hex}\"")
        })
        .collect()
});

pub async fn serve(Path(name): Path<String>, headers: HeaderMap) -> Response {
    let Some(at) = FILES.iter().position(|file| file.name == name) else {
        return StatusCode::NOT_FOUND.into_response();
    };
    let (file, tag) = (&FILES[at], TAGS[at].as_str());
    let fixed = [(header::ETAG, tag), (header::CACHE_CONTROL, "no-cache"), (header::CONTENT_TYPE, file.kind)];
    let known = headers.get(header::IF_NONE_MATCH).and_then(|value| value.to_str().ok());
    match known.is_some_and(|known| known.split(',').any(|one| one.trim().trim_start_matches("W/") == tag)) {
        true => (StatusCode::NOT_MODIFIED, fixed).into_response(),
        false => (fixed, file.content).into_response(),
    }
}

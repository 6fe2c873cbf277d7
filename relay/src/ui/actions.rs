//! What an operator does on the page. Whether the role may is PostgreSQL's to say.

use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Response;
use serde::Deserialize;
use tokio_postgres::types::ToSql;

use super::{Page, answer, queries, tail};
use crate::error::Result;

/// What a request names. What it leaves out is empty, and what it names and nobody knows is refused.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Asked {
    event_id: String,
    destination: String,
    r#type: String,
    error: String,
    since: String,
    until: String,
    /// Count, and change nothing.
    preview: bool,
}

pub async fn act(State(page): State<Page>, Path(action): Path<String>, body: Bytes) -> Response {
    let asked: Asked = match serde_json::from_slice(&body) {
        Ok(asked) => asked,
        Err(error) => return answer::refused(StatusCode::BAD_REQUEST, &format!("not a request of the page: {error}")),
    };
    let Some((sql, parameters)) = statement(&action, &asked) else {
        return answer::refused(StatusCode::NOT_FOUND, "no such action");
    };
    if action == "purge-all" && !asked.since.is_empty() {
        return answer::refused(StatusCode::BAD_REQUEST, "a purge has no beginning: leave out since");
    }
    let done = run(&page, sql, &parameters).await;
    if !asked.preview {
        note(&action, &asked, &done);
        page.forget_answers().await;
        tail::happened();
    }
    answer::answer(done.map(|result| serde_json::json!({ "result": result }).to_string()))
}

type Parameters<'a> = Vec<&'a (dyn ToSql + Sync)>;

fn statement<'a>(action: &str, asked: &'a Asked) -> Option<(&'static str, Parameters<'a>)> {
    let Asked { event_id, destination, r#type, error, since, until, preview } = asked;
    Some(match action {
        "pause" => (queries::PAUSE, vec![destination]),
        "resume" => (queries::RESUME, vec![destination]),
        "test" => (queries::SEND_TEST, vec![destination]),
        "rotate" => (queries::ROTATE, vec![destination]),
        "replay" => (queries::REPLAY, vec![event_id, destination]),
        "purge" => (queries::PURGE, vec![event_id, destination]),
        "replay-all" => (queries::REPLAY_FAILED, vec![destination, r#type, error, since, until, preview]),
        "purge-all" => (queries::PURGE_FAILED, vec![destination, r#type, error, until, preview]),
        _ => return None,
    })
}

/// The text that a function returned, if it returns any.
async fn run(page: &Page, sql: &str, parameters: &[&(dyn ToSql + Sync)]) -> Result<Option<String>> {
    let rows = page.database().ask(sql, parameters).await?;
    let text = rows.first().filter(|row| row.columns()[0].type_() == &tokio_postgres::types::Type::TEXT);
    Ok(text.map(|row| row.try_get::<_, Option<String>>(0)).transpose()?.flatten())
}

/// One line for each change that was asked for. The result of a rotation is a secret.
fn note(action: &str, asked: &Asked, done: &Result<Option<String>>) {
    let Asked { event_id, destination, r#type, error, since, until, .. } = asked;
    let result = match done {
        Ok(_) if action == "rotate" => "done",
        Ok(result) => result.as_deref().unwrap_or("done"),
        Err(_) => "refused",
    };
    tracing::info!(action, event_id, destination, r#type, error, since, until, result, "asked for on the page");
}

//! What a receiver's answer means.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use reqwest::header::RETRY_AFTER;
use reqwest::{Response, StatusCode};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::Outcome;
use super::keep::Permit;

/// Maximum bytes of a response body to read.
const MAX_ANSWER: usize = 64 * 1024;

/// Maximum characters of a response body to show.
const MAX_SHOWN: usize = 200;

/// How long the rest of an answer is waited for: to show it, or so that its connection can be used again.
const PATIENCE: Duration = Duration::from_secs(2);

/// A receiver may not put its deliveries off for longer.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(24 * 3600);

/// The status line decides: a receiver has taken the event when it says so, whatever becomes of the body. `rests` bounds
/// the bodies that are read to their end meanwhile; the connections of further ones are closed, as are those without a
/// `permit`.
pub async fn judge(answer: Response, rests: &Arc<Semaphore>, permit: Option<Permit>) -> Outcome {
    let status = answer.status();
    if status.is_success() {
        match (permit, rests.clone().try_acquire_owned()) {
            (Some(permit), Ok(rest)) => {
                tokio::spawn(async move {
                    read(answer, Some(permit)).await;
                    drop(rest);
                });
            }
            // An answer without a body leaves its connection behind all the same.
            (Some(permit), Err(_)) => permit.keep(),
            (None, _) => {}
        }
        return Outcome::Delivered;
    }
    let retry_in = answer.headers().get(RETRY_AFTER).and_then(|v| retry_after(v.to_str().ok()?, SystemTime::now()));
    let shown = read(answer, permit).await;
    let error = match status.is_redirection() {
        true => format!("{status}: redirects are not followed"),
        false => format!("{status}{shown}"),
    };
    match status {
        StatusCode::GONE => Outcome::Gone { error },
        StatusCode::PAYLOAD_TOO_LARGE => Outcome::Rejected { error: format!("too large for the receiver: {error}") },
        StatusCode::TOO_MANY_REQUESTS
        | StatusCode::BAD_GATEWAY
        | StatusCode::SERVICE_UNAVAILABLE
        | StatusCode::GATEWAY_TIMEOUT => Outcome::Throttled { error, retry_in },
        _ => Outcome::Failed { error, retry_in },
    }
}

/// The beginning of the body, fit to be shown. Read to its end it leaves its connection behind.
async fn read(mut answer: Response, permit: Option<Permit>) -> String {
    let mut bytes = Vec::new();
    let mut whole = false;
    let reading = async {
        while let Ok(Some(chunk)) = answer.chunk().await {
            bytes.extend_from_slice(&chunk[..chunk.len().min(MAX_ANSWER - bytes.len())]);
            if bytes.len() >= MAX_ANSWER {
                return;
            }
        }
        whole = true;
    };
    // What has come by then is shown.
    let _in_time = timeout(PATIENCE, reading).await;
    if whole && let Some(permit) = permit {
        permit.keep();
    }
    let text: String =
        String::from_utf8_lossy(&bytes).chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_SHOWN).collect();
    if text.trim().is_empty() { String::new() } else { format!(": {}", text.trim()) }
}

/// Seconds or an HTTP date (RFC 9110, section 10.2.3). What is over already leaves the destination's own backoff.
fn retry_after(text: &str, now: SystemTime) -> Option<Duration> {
    let text = text.trim();
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let wait = match text.parse::<u64>() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) if digits => MAX_RETRY_AFTER,
        Err(_) => httpdate::parse_http_date(text).ok()?.duration_since(now).unwrap_or_default(),
    };
    Some(wait.min(MAX_RETRY_AFTER)).filter(|wait| !wait.is_zero())
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = UNIX_EPOCH + Duration::from_secs(784_111_777);
        assert_eq!(retry_after("120", now), Some(Duration::from_secs(120)));
        assert_eq!(retry_after("Sun, 06 Nov 1994 08:50:37 GMT", now), Some(Duration::from_secs(60)));
        assert_eq!(retry_after("Sun, 06 Nov 1994 08:40:00 GMT", now), None);
        assert_eq!(retry_after("0", now), None);
        assert_eq!(retry_after("999999999", now), Some(MAX_RETRY_AFTER));
        assert_eq!(retry_after(&"9".repeat(30), now), Some(MAX_RETRY_AFTER));
        assert_eq!(retry_after("soon", now), None);
    }

    proptest! {
        #[test]
        fn any_retry_after_is_a_moment_within_bounds_or_none(text in "([0-9]{0,40}|.{0,40}|[A-Z][a-z]{2}, [0-9]{2} Nov [0-9]{4} [0-9]{2}:[0-9]{2}:[0-9]{2} GMT)") {
            let wait = retry_after(&text, UNIX_EPOCH + Duration::from_secs(784_111_777));
            prop_assert!(wait.is_none_or(|wait| !wait.is_zero() && wait <= MAX_RETRY_AFTER));
        }
    }
}

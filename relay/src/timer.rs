//! Timers that may not be set.

use std::time::Instant;

/// Sleeps until that moment; none: for ever.
pub async fn sleep_until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment.into()).await,
        None => std::future::pending().await,
    }
}

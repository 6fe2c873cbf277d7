//! Waiting for a condition, which nearly every pause of a test should be.

use std::future::Future;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

/// Long enough for anything that works at all, on a machine that is busy with other tests.
pub const LONG: Duration = Duration::from_secs(60);

/// Pauses between looks: short at first, so that what is quick is seen at once.
struct Pauses(Duration);

impl Pauses {
    fn new() -> Self {
        Pauses(Duration::from_millis(1))
    }

    fn next(&mut self) -> Duration {
        let pause = self.0;
        self.0 = (self.0 * 3 / 2).min(Duration::from_millis(50));
        pause
    }
}

/// Looks until there is something, and returns it. An error of a look counts as "not yet"; the last one is part of the
/// error after `limit`.
pub async fn until<T, Fut>(what: &str, limit: Duration, mut look: impl FnMut() -> Fut) -> Result<T>
where
    Fut: Future<Output = Result<Option<T>>>,
{
    let started = Instant::now();
    let mut pauses = Pauses::new();
    loop {
        let left = limit.saturating_sub(started.elapsed());
        let last = match tokio::time::timeout(left.max(Duration::from_millis(1)), look()).await {
            Ok(Ok(Some(found))) => return Ok(found),
            Ok(Ok(None)) => None,
            Ok(Err(error)) => Some(format!("{error:#}")),
            Err(_) => Some("the last look did not end".into()),
        };
        if started.elapsed() >= limit {
            let last = last.map(|error| format!(": {error}")).unwrap_or_default();
            return Err(anyhow!("waited {limit:?} for {what}{last}"));
        }
        tokio::time::sleep(pauses.next()).await;
    }
}

/// The same where nothing can be awaited, as in `Drop`; false when the time is up.
pub fn blocking(limit: Duration, mut is_so: impl FnMut() -> bool) -> bool {
    let started = Instant::now();
    let mut pauses = Pauses::new();
    loop {
        if is_so() {
            return true;
        }
        if started.elapsed() >= limit {
            return false;
        }
        std::thread::sleep(pauses.next());
    }
}

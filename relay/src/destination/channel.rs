//! Channels in confirm mode, and what has been found out by them.

use std::collections::HashSet;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lapin::Channel;
use lapin::options::ConfirmSelectOptions;
use tokio::time::timeout;

use super::Outcome;
use super::broker::{Broker, Link, describe};
use super::returns::Returns;

/// After a failure nobody tries again for this long: many deliveries fail together.
pub const PAUSE: Duration = Duration::from_millis(100);

/// Names remembered; templates can yield any number.
const MAX_REMEMBERED: usize = 10_000;

/// A channel in confirm mode.
pub struct Open {
    pub link: Arc<Link>,
    pub channel: Channel,
    pub returns: Returns,
    /// What has been found out while this channel was open.
    pub known: Known,
    /// A confirm was given up, and with it perhaps the return of another message: nothing that follows is believed.
    pub retired: AtomicBool,
}

/// Why there is no channel.
pub enum NoChannel {
    /// There is no connection: this relay's trouble.
    Down(String),
    /// The broker takes no messages.
    Blocked(String),
    /// The broker opens none.
    Refused(String),
}

impl From<NoChannel> for Outcome {
    fn from(why: NoChannel) -> Self {
        match why {
            NoChannel::Down(error) => Outcome::Unable { error },
            NoChannel::Blocked(error) | NoChannel::Refused(error) => Outcome::Unavailable { error },
        }
    }
}

impl NoChannel {
    pub fn text(self) -> String {
        match self {
            NoChannel::Down(text) | NoChannel::Blocked(text) | NoChannel::Refused(text) => text,
        }
    }
}

/// The channel of a purpose, made anew after it was closed or given up.
#[derive(Default)]
pub struct Slot {
    current: tokio::sync::Mutex<Current>,
}

#[derive(Default)]
struct Current {
    open: Option<Arc<Open>>,
    /// Why no channel could be opened, and when: many deliveries fail together.
    failed: Option<(Instant, String)>,
}

impl Slot {
    /// The error says why there is none.
    pub async fn open(&self, broker: &Arc<Broker>, limit: Duration) -> Result<Arc<Open>, NoChannel> {
        let mut current = self.current.lock().await;
        let alive = |open: &Arc<Open>| open.channel.status().connected() && open.link.connection.status().connected();
        let kept = current.open.take().filter(alive);
        if let Some(open) = kept.as_ref().filter(|open| !open.is_retired()) {
            current.open = kept.clone();
            return open.link.unless_blocked(std::future::ready(open.clone())).await.map_err(NoChannel::Blocked);
        }
        // Thousands of deliveries are under way at a time: what is rare takes no room in each of them.
        Box::pin(reopen(&mut current, kept, broker, limit)).await
    }

    pub async fn forget(&self, open: &Arc<Open>) {
        let mut current = self.current.lock().await;
        if current.open.as_ref().is_some_and(|c| Arc::ptr_eq(c, open)) {
            current.open = None;
        }
    }
}

async fn reopen(
    current: &mut Current,
    kept: Option<Arc<Open>>,
    broker: &Arc<Broker>,
    limit: Duration,
) -> Result<Arc<Open>, NoChannel> {
    if let Some((_, error)) = current.failed.clone().filter(|(at, _)| at.elapsed() < PAUSE) {
        current.open = kept;
        return Err(NoChannel::Refused(error));
    }
    let link = broker.link().await.map_err(NoChannel::Down)?;
    let opened = link.unless_blocked(timeout(limit, open_channel(&link, kept.as_deref()))).await;
    let channel = match opened {
        Ok(Ok(Ok(channel))) => Ok(channel),
        Ok(Ok(Err(error))) if !link.connection.status().connected() => {
            broker.abandon(&link);
            return Err(NoChannel::Down(format!("connection to RabbitMQ lost: {}", describe(&error))));
        }
        Ok(Ok(Err(error))) => Err(format!("RabbitMQ opens no channel: {}", describe(&error))),
        Ok(Err(_)) => Err(format!("RabbitMQ opens no channel within {} s", limit.as_secs_f32())),
        Err(blocked) => {
            current.open = kept;
            return Err(NoChannel::Blocked(blocked));
        }
    };
    match channel {
        Ok(channel) => {
            let open = Arc::new(Open {
                link,
                channel,
                returns: Returns::default(),
                known: Known::default(),
                retired: AtomicBool::new(false),
            });
            *current = Current { open: Some(open.clone()), failed: None };
            Ok(open)
        }
        Err(error) => {
            *current = Current { open: kept, failed: Some((Instant::now(), error.clone())) };
            Err(NoChannel::Refused(error))
        }
    }
}

impl Open {
    pub fn is_retired(&self) -> bool {
        self.retired.load(std::sync::atomic::Ordering::SeqCst)
    }
}

/// What is left of the channel before goes first: its messages keep their place before those of the new one.
async fn open_channel(link: &Link, before: Option<&Open>) -> lapin::Result<Channel> {
    if let Some(before) = before {
        before.channel.close(200, "OK".into()).await?;
    }
    let channel = link.connection.create_channel().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    Ok(channel)
}

/// What the broker is known to take: nothing else goes out on a channel that many deliveries share.
#[derive(Default)]
pub struct Known(Mutex<Facts>);

#[derive(Default)]
struct Facts {
    exchanges: HashSet<String>,
    /// Exchange and routing key.
    keys: HashSet<(String, String)>,
    /// Bytes of the largest message that was taken.
    size: usize,
    declared: HashSet<Declared>,
}

/// Something that was declared: each is once for a channel's life.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Declared {
    Exchange(String),
    Queue(String),
    Binding { queue: String, exchange: String, key: String },
}

impl Known {
    fn lock(&self) -> MutexGuard<'_, Facts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether such a message was taken before. `by_key`: keys are judged as well.
    pub fn is_taken(&self, exchange: &str, key: &str, size: usize, by_key: bool) -> bool {
        let facts = self.lock();
        facts.size >= size
            && facts.exchanges.contains(exchange)
            && (!by_key || facts.keys.contains(&(exchange.to_owned(), key.to_owned())))
    }

    pub fn taken(&self, exchange: &str, key: &str, size: usize, by_key: bool) {
        let mut facts = self.lock();
        facts.size = facts.size.max(size);
        remember(&mut facts.exchanges, exchange.to_owned());
        if by_key {
            remember(&mut facts.keys, (exchange.to_owned(), key.to_owned()));
        }
    }

    pub fn is_declared(&self, what: &Declared) -> bool {
        self.lock().declared.contains(what)
    }

    pub fn declared(&self, what: Declared) {
        remember(&mut self.lock().declared, what);
    }

    /// Somebody may have deleted what was declared.
    pub fn doubt_declared(&self, what: &[Declared]) {
        let mut facts = self.lock();
        what.iter().for_each(|one| {
            facts.declared.remove(one);
        });
    }
}

/// Beyond the bound all is found out again.
fn remember<T: std::hash::Hash + Eq>(set: &mut HashSet<T>, what: T) {
    if set.len() >= MAX_REMEMBERED {
        set.clear();
    }
    set.insert(what);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_taken_before_is_known_to_be_taken() {
        let known = Known::default();
        assert!(!known.is_taken("x", "k", 0, false), "never seen");
        known.taken("x", "k", 100, true);
        assert!(known.is_taken("x", "other", 100, false) && known.is_taken("x", "k", 1, true));
        assert!(!known.is_taken("x", "k", 101, false), "larger than any before");
        assert!(!known.is_taken("y", "k", 1, false) && !known.is_taken("x", "other", 1, true));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let known = Known::default();
        for n in 0..=MAX_REMEMBERED {
            known.declared(Declared::Queue(n.to_string()));
        }
        assert!(known.lock().declared.len() <= MAX_REMEMBERED);
        assert!(known.is_declared(&Declared::Queue(MAX_REMEMBERED.to_string())));
    }
}

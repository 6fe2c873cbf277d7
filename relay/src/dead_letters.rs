//! What the log says of dead letters: the first of a destination at once, further ones once a minute with their count. Pure:
//! the caller brings the clock. While none came, nothing is kept and there is no timer.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use serde::Deserialize;
use uuid::Uuid;

const MINUTE: Duration = Duration::from_secs(60);

/// A delivery that was given up, as `outbox.settle` reports it.
#[derive(Debug, Clone, Deserialize)]
pub struct DeadLetter {
    pub destination: String,
    pub event_id: Uuid,
    pub error: Option<String>,
}

/// A line of the log.
#[derive(Debug, PartialEq)]
pub enum Line {
    First { destination: String, event_id: Uuid, error: Option<String> },
    More { destination: String, count: u64 },
}

impl Line {
    pub fn write(&self) {
        match self {
            Line::First { destination, event_id, error } => {
                tracing::warn!(destination, %event_id, error, "a dead letter");
            }
            Line::More { destination, count } => tracing::warn!(destination, count, "more dead letters in a minute"),
        }
    }
}

#[derive(Default)]
pub struct DeadLetters {
    /// The destinations that were told of within a minute, and how many came since.
    since: HashMap<String, u64>,
    /// When the next line of each may come: the earliest first, since each waits for as long.
    later: VecDeque<(Instant, String)>,
}

impl DeadLetters {
    /// The line for a dead letter, if it is the first for a while.
    pub fn add(&mut self, dead: DeadLetter, now: Instant) -> Option<Line> {
        if let Some(count) = self.since.get_mut(&dead.destination) {
            *count += 1;
            return None;
        }
        self.since.insert(dead.destination.clone(), 0);
        self.later.push_back((now + MINUTE, dead.destination.clone()));
        Some(Line::First { destination: dead.destination, event_id: dead.event_id, error: dead.error })
    }

    /// When the next line is due, or what is kept can go.
    pub fn next(&self) -> Option<Instant> {
        self.later.front().map(|(at, _)| *at)
    }

    /// The lines that are due now.
    pub fn due(&mut self, now: Instant) -> Vec<Line> {
        let mut lines = Vec::new();
        while let Some((_, destination)) = self.later.pop_front_if(|(at, _)| *at <= now) {
            match self.since.remove(&destination) {
                Some(count) if count > 0 => {
                    self.since.insert(destination.clone(), 0);
                    self.later.push_back((now + MINUTE, destination.clone()));
                    lines.push(Line::More { destination, count });
                }
                _ => {}
            }
        }
        lines
    }
}

/// What was counted is told at the latest when the session ends.
impl Drop for DeadLetters {
    fn drop(&mut self) {
        let counted = self.since.drain().filter(|(_, count)| *count > 0);
        counted.for_each(|(destination, count)| Line::More { destination, count }.write());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dead(destination: &str) -> DeadLetter {
        DeadLetter { destination: destination.into(), event_id: Uuid::nil(), error: Some("413".into()) }
    }

    #[test]
    fn the_first_is_told_at_once_and_the_others_once_a_minute() {
        let (mut letters, now) = (DeadLetters::default(), Instant::now());
        assert_eq!(letters.next(), None);
        assert!(matches!(letters.add(dead("a"), now), Some(Line::First { .. })));
        assert!(matches!(letters.add(dead("b"), now), Some(Line::First { .. })));
        for _ in 0..1000 {
            assert_eq!(letters.add(dead("a"), now + MINUTE / 2), None);
        }
        assert!(letters.due(now + MINUTE / 2).is_empty());
        assert_eq!(letters.next(), Some(now + MINUTE));
        let more = |count| [Line::More { destination: "a".into(), count }];
        assert_eq!(letters.due(now + MINUTE), more(1000), "b had no more");
        assert_eq!(letters.add(dead("a"), now + MINUTE), None);
        assert_eq!(letters.due(now + MINUTE * 2), more(1));
        assert!(letters.due(now + MINUTE * 3).is_empty() && letters.next().is_none(), "nothing is kept");
        assert!(matches!(letters.add(dead("a"), now + MINUTE * 4), Some(Line::First { .. })));
    }
}

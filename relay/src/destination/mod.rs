//! What the dispatcher needs of a destination: build it from its row, deliver one event, say how it ended.
//!
//! A destination holds no state that it could not lose: whatever it was given and did not report back is
//! handed out again when the claim ends.

use std::time::{Duration, SystemTime};

use uuid::Uuid;

/// One event as a claim hands it out, shared by all of its destinations.
#[derive(Debug)]
pub struct Event {
    pub id: i64,
    pub event_id: Uuid,
    pub event_type: String,
    pub event_version: String,
    pub aggregate_type: Option<String>,
    pub aggregate_id: Option<String>,
    pub tenant_id: Option<String>,
    /// The JSON text, as PostgreSQL prints it. Always valid JSON.
    pub event_data: String,
    pub metadata: serde_json::Value,
    pub created_at: SystemTime,
    /// 1 for the first attempt.
    pub attempt: u32,
}

/// How one delivery ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The destination has confirmed it.
    Delivered,
    /// This event did not get through; uses up one attempt.
    Failed { error: String, retry_in: Option<Duration> },
    /// This event can never get through: a dead letter.
    Rejected { error: String },
    /// The destination as a whole is down: opens its circuit, uses up no attempt.
    Unavailable { error: String, retry_in: Option<Duration> },
    /// The receiver wants nothing more: a dead letter, and the destination is disabled.
    Gone { error: String },
}

/// One row of `outbox.relay_destinations()`.
#[derive(Clone, PartialEq)]
pub struct Spec {
    pub name: String,
    /// `rabbitmq` or `webhook`.
    pub kind: String,
    pub exchange: Option<String>,
    pub routing_key: Option<String>,
    pub url: Option<String>,
    pub settings: serde_json::Value,
    /// Signing secrets, the current one first.
    pub secrets: Vec<String>,
    pub max_attempts: Option<i32>,
}

impl std::fmt::Debug for Spec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Spec").field("name", &self.name).field("kind", &self.kind).finish_non_exhaustive()
    }
}

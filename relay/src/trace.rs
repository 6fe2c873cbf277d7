//! Each step of an event, for whoever wants to see where the time goes: `--log-level debug`, or the target
//! `outbox_relay::trace` alone. Costs one relaxed load a step when off.

use std::time::{SystemTime, UNIX_EPOCH};

use uuid::Uuid;

const TARGET: &str = "outbox_relay::trace";

pub fn enabled() -> bool {
    tracing::enabled!(target: TARGET, tracing::Level::DEBUG)
}

/// One line: which step, of which event, at which microsecond since 1970.
pub fn step(step: &'static str, event_id: &Uuid, destination: Option<&str>) {
    tracing::debug!(target: TARGET, step, %event_id, destination, at_us = now_us());
}

/// The events that a notification names.
pub fn notified(payload: &str) {
    #[derive(serde::Deserialize)]
    struct Payload {
        events: Vec<Named>,
    }
    #[derive(serde::Deserialize)]
    struct Named {
        event_id: Uuid,
    }
    if enabled()
        && let Ok(payload) = serde_json::from_str::<Payload>(payload)
    {
        payload.events.iter().for_each(|event| step("notified", &event.event_id, None));
    }
}

fn now_us() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
}

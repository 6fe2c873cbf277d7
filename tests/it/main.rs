//! Tests against real servers: one file a subject.

mod claims;
mod connections;
mod delivery;
mod lifecycle;
mod notifications;
mod privileges;
mod queries;
mod relay;
mod smoke;

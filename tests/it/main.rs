//! Tests against real servers: one file a subject.

mod chaos;
mod claims;
mod connections;
mod delivery;
mod encodings;
mod growth;
mod health;
mod lifecycle;
mod model;
mod notifications;
mod owed;
mod pools;
mod privileges;
mod queries;
mod rabbitmq;
mod relay;
mod returns;
mod sessions;
mod smoke;
mod surface;
mod wakeups;
mod webhooks;

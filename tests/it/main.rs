//! Tests against real servers: one file a subject.

mod chaos;
mod claims;
mod connections;
mod delivery;
mod lifecycle;
mod model;
mod notifications;
mod privileges;
mod queries;
mod rabbitmq;
mod relay;
mod smoke;
mod webhooks;

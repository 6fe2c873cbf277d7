//! Tests against real servers: one file a subject.

mod claims;
mod lifecycle;
mod privileges;
mod rabbitmq;
mod smoke;
mod webhooks;

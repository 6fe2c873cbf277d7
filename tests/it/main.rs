//! Tests against real servers: one file a subject.

mod attackers;
mod chaos;
mod claims;
mod connections;
mod delivery;
mod growth;
mod health;
mod housekeeping;
mod lifecycle;
mod model;
mod notifications;
mod owed;
mod owners;
mod privileges;
mod queries;
mod rabbitmq;
mod relay;
mod returns;
mod smoke;
mod timers;
mod wakeups;
mod webhooks;

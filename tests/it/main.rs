//! Tests against real servers: one file a subject.

mod attackers;
mod broker_side;
mod chaos;
mod claims;
mod connections;
mod delivery;
mod faults;
mod growth;
mod health;
mod lifecycle;
mod model;
mod neighbours;
mod notifications;
mod owed;
mod owners;
mod privileges;
mod queries;
mod rabbitmq;
mod relay;
mod returns;
mod smoke;
mod strings;
mod throttle;
mod wakeups;
mod webhooks;

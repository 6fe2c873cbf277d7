//! What the tests, the measurements, the demonstration and `make up` run on: real servers, private and disposable.
//!
//! - [`cluster`]: a PostgreSQL with the extension; [`session`]: a connection to it that hears notifications
//! - [`broker`]: a RabbitMQ, shared or of one's own; [`queue`]: what arrives there
//! - [`receiver`]: an HTTP server for webhooks; [`front`]: what may stand before it, TLS or a proxy; [`reference`]: who
//!   verifies signatures and reads CloudEvents
//! - [`relay`]: the relay's binary; [`trace`]: what it logs of each event; [`http`]: its pages; [`pool`]: a PgBouncer between it and PostgreSQL
//! - [`browser`]: one that shows its page; [`prometheus`]: one that scrapes its metrics
//! - [`tls`]: a certificate authority
//! - [`world`]: what nearly every test begins with
//! - [`wait`]: for conditions
//! - [`detached`]: servers that are left running
//! - [`process`], [`scratch`], [`postgres`], [`rabbit`]: accounts, directories, ports and how the servers are started

pub mod broker;
pub mod browser;
pub mod cluster;
pub mod detached;
pub mod front;
pub mod http;
pub mod orm;
pub mod pool;
pub mod postgres;
pub mod process;
pub mod prometheus;
pub mod queue;
pub mod rabbit;
pub mod receiver;
pub mod reference;
pub mod relay;
pub mod scratch;
pub mod session;
pub mod tls;
pub mod trace;
pub mod wait;
pub mod world;

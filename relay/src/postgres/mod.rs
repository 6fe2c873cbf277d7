//! Connections to PostgreSQL: what the connection string says, TLS as libpq names it, and the connecting itself.

mod connect;
mod conninfo;
mod tls;

pub use connect::Connector;
pub use conninfo::ConnInfo;

//! Connections to PostgreSQL: what the connection string says (`params`, `libpq`, `conninfo`), TLS as libpq names it
//! (`tls_settings`, `tls`), the connecting itself (`socket`, `readable`, `connect`), and what both sessions of a relay
//! have to be (`pair`).

mod connect;
mod conninfo;
mod libpq;
mod pair;
mod params;
mod readable;
mod socket;
mod tls;
mod tls_settings;

pub use connect::{Cancel, Connected, Connector, Driver};
pub use conninfo::ConnInfo;
pub use libpq::{Variables, says_where};
pub use pair::{POOLED, Pair};

//! Memory: the relay's while it drains a large backlog, and what the extension takes of the server's.

use anyhow::Result;

use crate::process::peak_memory;
use crate::sheet::{Must, Sheet};
use crate::stage::Stage;

const EVENTS: usize = 1_000_000;
const BYTES: usize = 1000;
const SHARED: &str =
    "SELECT sum(allocated_size)::float8 / 1048576 FROM pg_shmem_allocations WHERE name ILIKE '%outbox%'";

pub async fn run(sheet: &mut Sheet) -> Result<()> {
    // Shared memory grows with this setting, which the tests' servers have far above PostgreSQL's default.
    let stage = Stage::with(&[("max_worker_processes", "8")]).await?;
    let events = sheet.count(EVENTS);
    stage.fill(events, BYTES, "NULL").await?;
    let (took, relay) = stage.drain(events).await?;
    let peak = peak_memory(relay.pid())?;
    stage.end(relay).await?;
    sheet.raw("events", events)?;
    sheet.raw("seconds", took.as_secs_f64())?;
    sheet.figure("relay, at its most", peak, "MiB", Must::AtMost(40.0));
    sheet.figure("extension, in shared memory", stage.session.one(SHARED).await?, "MiB", Must::AtMost(4.0));
    Ok(())
}

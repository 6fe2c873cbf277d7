use anyhow::{Result, bail}; use crate::sheet::Sheet; pub async fn run(_: &mut Sheet) -> Result<()> { bail!("not yet") }

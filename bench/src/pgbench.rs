//! pgbench: many clients that each insert one event a transaction.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use outbox_tests::cluster::Cluster;
use outbox_tests::process::run;

/// A script, where the server's account can read it.
pub struct Script(PathBuf);

pub struct Outcome {
    pub transactions: u64,
    /// Transactions a second, without the time to connect.
    pub rate: f64,
}

impl Script {
    /// Inserts one small event a transaction into the table.
    pub fn insert(cluster: &Cluster, table: &str) -> Result<Self> {
        let sql = format!(
            "\\set key random(1, 10000)\n\
             INSERT INTO {table} (event_type, aggregate_type, aggregate_id, event_data) \
             VALUES ('bench.created', 'bench', :key::text, '{{\"name\": \"Ada\", \"number\": 42}}');\n"
        );
        let file = cluster.dir().join(format!("{table}.pgbench"));
        fs::write(&file, sql)?;
        Ok(Script(file))
    }

    /// Runs it; `rate` spreads that many transactions a second over the clients.
    pub async fn run(
        &self,
        cluster: &Cluster,
        database: &str,
        clients: usize,
        seconds: usize,
        rate: Option<usize>,
    ) -> Result<Outcome> {
        let mut command = cluster.client("pgbench")?;
        command.args(["-n", "-M", "prepared", "-c", &clients.to_string(), "-j", &clients.min(2).to_string()]);
        command.args(["-T", &seconds.to_string()]).arg("-f").arg(&self.0);
        if let Some(rate) = rate {
            command.args(["-R", &rate.to_string()]);
        }
        command.arg(database);
        let output = tokio::task::spawn_blocking(move || run(command)).await??;
        parse(&String::from_utf8(output.stdout)?)
    }
}

fn parse(text: &str) -> Result<Outcome> {
    let after = |label: &str| {
        let found = text.lines().find_map(|line| line.strip_prefix(label)?.split([' ', '/']).next());
        found.with_context(|| format!("no {label:?} in pgbench's answer:\n{text}"))
    };
    Ok(Outcome {
        transactions: after("number of transactions actually processed: ")?.parse()?,
        rate: after("tps = ")?.parse()?,
    })
}

//! A real Prometheus that scrapes a relay every second.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::process::{Account, Process, run};
use crate::{http, scratch, wait};

/// The rules and the dashboard of this repository.
pub fn ops(file: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../ops").join(file)
}

pub struct Prometheus {
    port: u16,
    _process: Process,
}

impl Prometheus {
    /// Loads rules, which are a file's text.
    pub async fn start(relay: u16, rules: &str) -> Result<Self> {
        let (dir, port) = (scratch::dir("prometheus")?, scratch::free_port()?);
        let config = format!(
            "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: [rules.yml]\nscrape_configs:\n  \
             - {{job_name: outbox-relay, static_configs: [{{targets: ['127.0.0.1:{relay}']}}]}}\n"
        );
        fs::write(dir.join("prometheus.yml"), config)?;
        fs::write(dir.join("rules.yml"), rules)?;
        let mut command = Account::of_servers()?.command("prometheus", Some(Signal::SIGKILL));
        command
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .args(["--log.level=warn", "--storage.tsdb.path=data"]);
        command.arg("--config.file=prometheus.yml").current_dir(&dir).env("HOME", &dir);
        let process = Process::start("prometheus", command, &dir.join("log"))?;
        let look = async || {
            let (status, page) = http::get(port, "/-/ready").await?;
            ensure!(status == 200, "{page}");
            Ok(Some(()))
        };
        wait::until("Prometheus to be ready", wait::LONG, look)
            .await
            .with_context(|| scratch::tail(&dir.join("log"), 20))?;
        Ok(Prometheus { port, _process: process })
    }

    async fn ask(&self, path: &str) -> Result<Value> {
        let (status, page) = http::get(self.port, path).await?;
        ensure!(status == 200, "{path}: {page}");
        Ok(serde_json::from_str::<Value>(&page)?["data"].take())
    }

    /// The series that an expression gives now.
    pub async fn query(&self, expression: &str) -> Result<Vec<Value>> {
        let encoded: String = expression.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let data = self.ask(&format!("/api/v1/query?query={encoded}")).await.with_context(|| expression.to_owned())?;
        Ok(data["result"].as_array().cloned().unwrap_or_default())
    }

    /// The alerts that fire now: name and destination.
    pub async fn firing(&self) -> Result<Vec<(String, String)>> {
        let data = self.ask("/api/v1/alerts").await?;
        let alerts = data["alerts"].as_array().context("no alerts")?;
        let text = |alert: &Value, label: &str| alert["labels"][label].as_str().unwrap_or_default().to_owned();
        let firing = alerts.iter().filter(|alert| alert["state"] == "firing");
        Ok(firing.map(|alert| (text(alert, "alertname"), text(alert, "destination"))).collect())
    }
}

/// Runs `promtool` in the directory of the rules.
pub fn promtool(arguments: &[&str]) -> Result<()> {
    let mut command = Command::new("promtool");
    command.args(arguments).current_dir(ops(""));
    run(command).map(drop)
}

//! The figures: shown as they come, kept raw in a file for each row, and in one table at the end.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::build::Build;
use crate::sample::Spread;

const RULE: usize = 99;

/// What a figure must reach, if anything.
#[derive(Debug, Clone, Copy)]
pub enum Must {
    AtLeast(f64),
    AtMost(f64),
    /// Reported beside the others.
    Nothing,
}

struct Figure {
    row: &'static str,
    what: String,
    value: f64,
    spread: Option<(f64, f64)>,
    unit: &'static str,
    must: Must,
}

pub struct Sheet {
    pub scale: f64,
    dir: PathBuf,
    row: &'static str,
    /// What the run began with: one table is of one build.
    build: Build,
    figures: Vec<Figure>,
    raw: Map<String, Value>,
    failed: Vec<(&'static str, String)>,
}

impl Sheet {
    pub fn new(scale: f64) -> Result<Self> {
        let program = std::env::current_exe()?;
        let dir = program.ancestors().nth(2).context("not in cargo's target directory")?.join("bench");
        fs::create_dir_all(&dir)?;
        let build = Build::installed()?;
        Ok(Sheet { scale, dir, row: "", build, figures: Vec::new(), raw: Map::new(), failed: Vec::new() })
    }

    /// A number of events or rows, scaled.
    pub fn count(&self, full: usize) -> usize {
        ((full as f64 * self.scale).round() as usize).max(1)
    }

    /// Turns or seconds, scaled but at least two.
    pub fn turns(&self, full: usize) -> usize {
        self.count(full).max(2)
    }

    pub fn open(&mut self, row: &'static str, what: &str) -> Result<()> {
        self.row = row;
        self.raw = Map::new();
        println!("\n{row}: {what}");
        self.raw("build", self.build.clone())
    }

    pub fn say(&self, text: impl AsRef<str>) {
        println!("   {}", text.as_ref());
    }

    /// A figure of the table.
    pub fn figure(&mut self, what: impl Into<String>, value: f64, unit: &'static str, must: Must) {
        self.add(what.into(), value, None, unit, must);
    }

    /// The same with its spread; an error if there was nothing to take it of.
    pub fn spread(
        &mut self,
        what: impl Into<String>,
        of: Option<Spread>,
        unit: &'static str,
        must: Must,
    ) -> Result<()> {
        let what = what.into();
        let of = of.with_context(|| format!("nothing was measured for {what:?}"))?;
        self.add(what, of.median, Some((of.least, of.greatest)), unit, must);
        Ok(())
    }

    fn add(&mut self, what: String, value: f64, spread: Option<(f64, f64)>, unit: &'static str, must: Must) {
        let figure = Figure { row: self.row, what, value, spread, unit, must };
        println!("   {}", figure.line());
        self.figures.push(figure);
    }

    /// What only the file shows.
    pub fn raw(&mut self, name: impl Into<String>, value: impl Serialize) -> Result<()> {
        self.raw.insert(name.into(), serde_json::to_value(value)?);
        Ok(())
    }

    /// Ends the row: writes its file, and notes its error if it has one.
    pub fn close(&mut self, outcome: Result<()>, took: Duration) -> Result<()> {
        let outcome = outcome.and_then(|()| {
            ensure!(
                Build::installed()? == self.build,
                "another build was installed during this run: these figures are of neither"
            );
            Ok(())
        });
        let error = outcome.err().map(|error| format!("{error:#}"));
        let figures: Vec<Value> = self.figures.iter().filter(|f| f.row == self.row).map(Figure::json).collect();
        let file = self.dir.join(format!("{}.json", self.row));
        let all = json!({ "row": self.row, "scale": self.scale, "seconds": took.as_secs_f64(), "error": error,
            "figures": figures, "raw": self.raw });
        fs::write(&file, serde_json::to_string_pretty(&all)?).with_context(|| file.display().to_string())?;
        self.say(format!("{:.0} s; raw figures: {}", took.as_secs_f64(), file.display()));
        if let Some(error) = error {
            println!("   FAILED: {error}");
            self.failed.push((self.row, error));
        }
        Ok(())
    }

    pub fn complete(&self) -> bool {
        self.failed.is_empty()
    }

    pub fn print(&self) {
        println!("\n{:<12} {:<42} {:>19} {:>13} {:>8}", "row", "what", "figure", "must reach", "reached");
        println!("{}", "-".repeat(RULE));
        let mut row = "";
        for figure in &self.figures {
            println!("{:<12} {}", if figure.row == row { "" } else { figure.row }, figure.line());
            row = figure.row;
        }
        for (row, error) in &self.failed {
            println!("{row:<12} FAILED: {}", error.lines().next().unwrap_or_default());
        }
        if self.scale != 1.0 {
            println!("\nBENCH_SCALE={}: a quick look; the targets hold at 1.", self.scale);
        }
        println!("\nRaw figures: {}/<row>.json", self.dir.display());
    }
}

impl Figure {
    fn reached(&self) -> Option<bool> {
        match self.must {
            Must::AtLeast(limit) => Some(self.value >= limit),
            Must::AtMost(limit) => Some(self.value <= limit),
            Must::Nothing => None,
        }
    }

    fn line(&self) -> String {
        let number = |value: f64| match value.abs() {
            v if v >= 100.0 => format!("{value:.0}"),
            v if v >= 10.0 => format!("{value:.1}"),
            _ => format!("{value:.2}"),
        };
        let with_unit = |value: f64| format!("{} {}", number(value), self.unit).trim_end().to_owned();
        let spread = self.spread.map(|(least, greatest)| format!(" [{} {}]", number(least), number(greatest)));
        let figure = format!("{}{}", with_unit(self.value), spread.unwrap_or_default());
        let must = match self.must {
            Must::AtLeast(limit) => format!("≥ {}", with_unit(limit)),
            Must::AtMost(limit) => format!("≤ {}", with_unit(limit)),
            Must::Nothing => "-".into(),
        };
        let reached = self.reached().map_or("-", |reached| if reached { "yes" } else { "NO" });
        format!("{:<42} {figure:>19} {must:>13} {reached:>8}", self.what)
    }

    fn json(&self) -> Value {
        json!({ "what": self.what, "value": self.value, "least": self.spread.map(|s| s.0),
            "greatest": self.spread.map(|s| s.1), "unit": self.unit, "must": format!("{:?}", self.must),
            "reached": self.reached() })
    }
}

//! The file of destinations, TOML or JSON: what `destinations apply` reads and `destinations export` writes.
//!
//! It holds no secret. `…` stands for what the database hides; see `plan`.

use std::collections::HashSet;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::config::{describe_toml, shown};
use crate::error::{Error, Result};

/// Stands for a hidden value, as the view outbox.destinations shows it.
pub const HIDDEN: &str = "…";

#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    #[serde(default)]
    pub destination: Vec<Wanted>,
}

/// A destination as the file wants it. What is left out has its default.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    pub name: String,
    pub kind: Kind,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exchange: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub routing_key: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub event_types: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenant_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub filter: Option<String>,
    /// Left out: an operator's pause stays.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub paused: Option<bool>,
    /// Of a new webhook: the file with its signing secret; left out: one is made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret_file: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub settings: Map<String, Value>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    RabbitMq,
    Webhook,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::RabbitMq => "rabbitmq",
            Kind::Webhook => "webhook",
        }
    }
}

/// `-` is standard input.
pub fn read(path: &Path) -> Result<File> {
    let mut text = String::new();
    let read = match path == Path::new("-") {
        true => std::io::stdin().read_to_string(&mut text),
        false => std::fs::File::open(path).and_then(|mut file| file.read_to_string(&mut text)),
    };
    read.map_err(|error| wrong(format!("the file of destinations{} can't be read: {error}", shown(path))))?;
    parse(&text).map_err(|error| wrong(format!("the file of destinations{}, {error}", shown(path))))
}

/// A text that begins with `{` is JSON. Errors quote nothing: a header's value may be a password.
fn parse(text: &str) -> std::result::Result<File, String> {
    let file: File = match text.trim_start().starts_with('{') {
        true => serde_json::from_str(text)
            .map_err(|error| format!("line {}, column {}: {}", error.line(), error.column(), json_fault(&error)))?,
        false => toml::from_str(text).map_err(|error| describe_toml(&error, text))?,
    };
    let mut names = HashSet::new();
    for wanted in &file.destination {
        if !names.insert(wanted.name.as_str()) {
            return Err(format!("destination {} stands there twice", wanted.name));
        }
        wanted.fits_its_kind()?;
    }
    Ok(file)
}

fn json_fault(error: &serde_json::Error) -> &'static str {
    match error.classify() {
        serde_json::error::Category::Data => {
            "a key that is unknown, missing or given twice, or a value of the wrong type"
        }
        _ => "not JSON",
    }
}

fn wrong(message: String) -> Error {
    Error::Configuration(message)
}

impl Wanted {
    fn fits_its_kind(&self) -> std::result::Result<(), String> {
        let given = |keys: &[(&'static str, bool)]| keys.iter().find(|(_, given)| *given).map(|(key, _)| *key);
        let extra = match self.kind {
            Kind::RabbitMq => given(&[("url", self.url.is_some()), ("secret_file", self.secret_file.is_some())]),
            Kind::Webhook => {
                given(&[("exchange", self.exchange.is_some()), ("routing_key", self.routing_key.is_some())])
            }
        };
        match extra {
            Some(key) => Err(format!("destination {}: {key} is nothing that a {} has", self.name, self.kind.name())),
            None if self.kind == Kind::Webhook && self.url.is_none() => {
                Err(format!("destination {}: url is missing", self.name))
            }
            None => Ok(()),
        }
    }

    /// Of a row of outbox.destinations.
    pub fn of_view(mut row: Value) -> Result<Self> {
        let paused = (row["state"] == "paused").then_some(true);
        let Value::Object(all) = &mut row else { return Err(Error::Server("no destination".into())) };
        let keys = ["name", "kind", "url", "exchange", "routing_key", "event_types", "tenant_id", "filter", "settings"];
        all.retain(|key, _| keys.contains(&key.as_str()));
        let read: serde_json::Result<Wanted> = serde_json::from_value(row);
        let mut read = read.map_err(|error| Error::Server(format!("a destination can't be read: {error}")))?;
        read.settings.values_mut().for_each(without_nulls);
        read.settings.retain(|_, value| !value.is_null());
        read.paused = paused;
        Ok(read)
    }
}

/// TOML has no null, and no setting has a use for one.
pub fn without_nulls(value: &mut Value) {
    match value {
        Value::Object(all) => {
            all.values_mut().for_each(without_nulls);
            all.retain(|_, value| !value.is_null());
        }
        Value::Array(all) => all.iter_mut().for_each(without_nulls),
        _ => {}
    }
}

const HEAD: &str = "# The destinations of pg_outbox: outbox-relay destinations apply -f FILE\n\
                    # A value … is hidden, and not in this file; applying it keeps the one that is there.\n";

impl File {
    pub fn to_toml(&self) -> Result<String> {
        let toml = toml::to_string(self);
        let toml = toml.map_err(|error| Error::Server(format!("a destination can't be written as TOML: {error}")))?;
        Ok(format!("{HEAD}\n{toml}"))
    }

    pub fn to_json(&self) -> Result<Value> {
        serde_json::to_value(self).map_err(|error| Error::Server(format!("not JSON: {error}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOML: &str = r#"
        [[destination]]
        name = "crm"
        kind = "webhook"
        url = "https://crm.example.com/hook?…"
        event_types = ["contact.*"]
        paused = true
        [destination.settings]
        timeout = 2.5
        [destination.settings.headers]
        Authorization = "…"

        [[destination]]
        name = "orders"
        kind = "rabbitmq"
    "#;

    #[test]
    fn toml_and_json_say_the_same_and_are_written_as_they_are_read() {
        let file = parse(TOML).expect("valid");
        assert_eq!(file.destination.len(), 2);
        assert_eq!(file.destination[0].settings["headers"]["Authorization"], HIDDEN);
        assert_eq!(parse(&file.to_toml().expect("TOML")), Ok(file.clone()));
        assert_eq!(parse(&file.to_json().expect("JSON").to_string()), Ok(file));
    }

    #[test]
    fn what_is_wrong_is_said_without_a_value() {
        for (text, expected) in [
            ("[[destination]]\nname = 'crm'\nkind = 'webhook'\nur = 'hunter2'", "line 4: a key that is unknown"),
            ("[[destination]]\nname = 'crm'\nkind = 'hunter2'", "line 3: a value that is not allowed"),
            ("[[destination]]\nname = 'crm'\nkind = 'webhook'", "destination crm: url is missing"),
            ("[[destination]]\nname = 'r'\nkind = 'rabbitmq'\nurl = 'hunter2'", "destination r: url is nothing"),
            ("[[destination]]\nname = 'r'\nkind = 'rabbitmq'\n".repeat(2).as_str(), "destination r stands there twice"),
            ("{\"destination\": [{\"name\": \"r\", \"kind\": \"hunter2\"}]}", "line 1, column"),
            ("{hunter2", "line 1, column 2: not JSON"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.starts_with(expected) && !error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn a_row_of_the_view_becomes_an_entry() {
        let row = serde_json::json!({"name": "r", "kind": "rabbitmq", "exchange": "x", "routing_key": "{event_type}",
            "event_types": ["*"], "url": null, "tenant_id": null, "filter": null, "state": "paused",
            "settings": {"a": null, "b": {"c": null, "d": 1}}, "created_at": "2026"});
        let entry = Wanted::of_view(row).expect("valid");
        assert_eq!(entry.paused, Some(true));
        assert_eq!(serde_json::Value::Object(entry.settings), serde_json::json!({"b": {"d": 1}}));
    }
}

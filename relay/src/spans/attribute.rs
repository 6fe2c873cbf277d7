//! Attributes as OTLP's JSON has them: `{"key": …, "value": {"stringValue": …}}`.

use serde::Serialize;

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Attribute {
    key: String,
    value: Value,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
enum Value {
    #[serde(rename = "stringValue")]
    Text(String),
    /// As a text: JSON has no 64 bits.
    #[serde(rename = "intValue")]
    Number(String),
}

impl Attribute {
    pub fn number(key: &str, value: usize) -> Self {
        Attribute { key: key.to_owned(), value: Value::Number(value.to_string()) }
    }

    pub fn is(&self, key: &str) -> bool {
        self.key == key
    }
}

pub fn text(key: &str, value: impl Into<String>) -> Attribute {
    Attribute { key: key.to_owned(), value: Value::Text(value.into()) }
}

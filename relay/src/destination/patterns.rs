//! Patterns among the settings: which members of an event's metadata go along.

use super::ConfigError;
use super::json::Object;
use crate::pattern;

/// A name matches when one of them does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Patterns(Vec<String>);

impl Patterns {
    /// A list of texts among the settings, or the fallback.
    pub fn parse(settings: &Object, key: &str, fallback: &[&str]) -> Result<Self, ConfigError> {
        let Some(text) = settings.member(key) else {
            return Ok(Patterns(fallback.iter().map(|pattern| (*pattern).to_owned()).collect()));
        };
        let list = serde_json::from_str(text);
        list.map(Patterns).map_err(|_| ConfigError(format!("settings.{key} is a list of patterns")))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn match_name(&self, name: &str) -> bool {
        self.0.iter().any(|pattern| pattern::matches(pattern.as_bytes(), name.as_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_texts_is_what_settings_hold() {
        let read = |text: &str| Patterns::parse(&Object::new(text), "metadata", &["*"]);
        assert!(read("{}").expect("the fallback").match_name("any"));
        assert!(read(r#"{"metadata": []}"#).expect("an empty list").is_empty());
        let some = read(r#"{"metadata": ["a", "b*"]}"#).expect("a list");
        assert!(some.match_name("a") && some.match_name("bc") && !some.match_name("c"));
        assert!(read(r#"{"metadata": "a"}"#).is_err() && read(r#"{"metadata": [1]}"#).is_err());
    }
}

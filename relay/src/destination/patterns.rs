//! Patterns whose `*` stands for any run of characters, as everywhere in settings.

use super::ConfigError;
use super::json::Object;

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
        self.0.iter().any(|pattern| matches(pattern, name))
    }
}

/// The first literal is at the start, the last one at the end, and those between are found in turn.
fn matches(pattern: &str, name: &str) -> bool {
    let Some((first, rest)) = pattern.split_once('*') else { return pattern == name };
    let (middle, last) = rest.rsplit_once('*').unwrap_or(("", rest));
    let Some(mut left) = name.strip_prefix(first).and_then(|name| name.strip_suffix(last)) else { return false };
    for literal in middle.split('*') {
        let Some(at) = left.find(literal) else { return false };
        left = &left[at + literal.len()..];
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_any_run_of_characters() {
        for (pattern, name, expected) in [
            ("*", "", true),
            ("*", "anything", true),
            ("a", "a", true),
            ("a", "ab", false),
            ("a*", "a", true),
            ("*a", "ba", true),
            ("a*a", "a", false),
            ("a*a", "aa", true),
            ("a*b*c", "a-b-c", true),
            ("a*b*c", "a-c-b", false),
            ("a**c", "abc", true),
            ("x-*-id", "x-request-id", true),
            ("é*", "été", true),
            ("", "", true),
            ("", "a", false),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }

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

//! JSON that is carried as text: members of an object are looked at one by one, and one that no number type or stack
//! could hold costs nobody else anything.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::OnceLock;

use serde_json::value::RawValue;

/// A JSON value, exactly as PostgreSQL printed it. Its members are found when the first one is asked for.
#[derive(Debug, Default)]
pub struct Object {
    text: String,
    members: OnceLock<BTreeMap<String, Box<RawValue>>>,
}

impl Object {
    pub fn new(text: impl Into<String>) -> Self {
        Object { text: text.into(), members: OnceLock::new() }
    }

    /// The text of a member; none if it is absent or null, or if the value is no object.
    pub fn member(&self, key: &str) -> Option<&str> {
        if self.text.is_empty() || self.text == "{}" {
            return None;
        }
        self.all().get(key).map(|value| value.get()).filter(|text| *text != "null")
    }

    /// All members, sorted by name; those that are null too.
    pub fn members(&self) -> impl Iterator<Item = (&str, &RawValue)> {
        self.all().iter().map(|(name, value)| (name.as_str(), &**value))
    }

    fn all(&self) -> &BTreeMap<String, Box<RawValue>> {
        self.members.get_or_init(|| serde_json::from_str(&self.text).unwrap_or_default())
    }

    /// A member that is a string, unescaped.
    pub fn string(&self, key: &str) -> Option<Cow<'_, str>> {
        unescape(self.member(key)?)
    }

    /// A member as text: a string unescaped, anything else as it is stored, digit for digit.
    pub fn shown(&self, key: &str) -> Option<Cow<'_, str>> {
        let text = self.member(key)?;
        Some(unescape(text).unwrap_or(Cow::Borrowed(text)))
    }

    /// The members of a member that is an object; none if it is none.
    pub fn object(&self, key: &str) -> Option<BTreeMap<String, Box<RawValue>>> {
        serde_json::from_str(self.member(key)?).ok()
    }
}

/// What a JSON string says; none for anything else.
pub fn unescape(text: &str) -> Option<Cow<'_, str>> {
    let inner = text.strip_prefix('"')?.strip_suffix('"')?;
    match inner.contains('\\') {
        false => Some(Cow::Borrowed(inner)),
        true => serde_json::from_str::<String>(text).ok().map(Cow::Owned),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_keep_every_digit_and_every_level() {
        let deep = format!("{}1{}", "[".repeat(5000), "]".repeat(5000));
        let text = format!(
            r#"{{"n": 1.50, "big": 12345678901234567890123, "huge": 1{}, "deep": {deep}, "s": "a\"bé", "none": null}}"#,
            "0".repeat(400)
        );
        let object = Object::new(text);
        assert_eq!(object.shown("n").as_deref(), Some("1.50"));
        assert_eq!(object.shown("big").as_deref(), Some("12345678901234567890123"));
        assert_eq!(object.shown("huge").map(|text| text.len()), Some(401));
        assert_eq!(object.shown("deep").as_deref(), Some(&*deep));
        assert_eq!(object.string("s").as_deref(), Some("a\"bé"));
        assert_eq!((object.string("n"), object.shown("none"), object.shown("absent")), (None, None, None));
    }

    #[test]
    fn what_is_no_object_has_no_members() {
        for text in ["", "{}", "null", "[1]", "7", "\"x\""] {
            assert_eq!(Object::new(text).member("x"), None, "{text}");
        }
    }
}

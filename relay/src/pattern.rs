//! Patterns in which `*` stands for any run of characters, and those of destinations' names: which ones a relay serves.

/// Any of several patterns; without one, every name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Patterns(Vec<String>);

impl Patterns {
    /// `None` if one of them could match no name.
    pub fn new(patterns: &[String]) -> Option<Self> {
        let given: Vec<String> = patterns.iter().map(|p| p.trim().to_owned()).filter(|p| !p.is_empty()).collect();
        let of_names = |c: char| c.is_ascii_alphanumeric() || "_.-*".contains(c);
        given.iter().all(|pattern| pattern.chars().all(of_names)).then_some(Patterns(given))
    }

    pub fn matches(&self, name: &str) -> bool {
        self.0.is_empty() || self.0.iter().any(|pattern| matches(pattern.as_bytes(), name.as_bytes()))
    }

    /// The same patterns for SQL's `LIKE`; none: every name.
    pub fn like(&self) -> Option<Vec<String>> {
        (!self.0.is_empty()).then(|| self.0.iter().map(|pattern| like(pattern)).collect())
    }
}

/// The pattern for SQL's `LIKE`, as `outbox._like_pattern()` writes it.
pub fn like(pattern: &str) -> String {
    let mut like = String::with_capacity(pattern.len() + 4);
    for c in pattern.chars() {
        match c {
            '*' => like.push('%'),
            '\\' | '%' | '_' => like.extend(['\\', c]),
            c => like.push(c),
        }
    }
    like
}

/// Where the text does not go on as the pattern does, the last `*` takes one character more.
pub fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut last: Option<(usize, usize)> = None;
    while t < text.len() {
        if pattern.get(p) == Some(&b'*') {
            last = Some((p + 1, t));
            p += 1;
        } else if pattern.get(p) == Some(&text[t]) {
            (p, t) = (p + 1, t + 1);
        } else if let Some((after, from)) = last {
            last = Some((after, from + 1));
            (p, t) = (after, from + 1);
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|c| *c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patterns(list: &[&str]) -> Patterns {
        Patterns::new(&list.iter().map(|p| (*p).to_owned()).collect::<Vec<_>>()).expect("patterns")
    }

    #[test]
    fn an_asterisk_stands_for_any_run_of_characters() {
        for (pattern, name, expected) in [
            ("crm", "crm", true),
            ("crm", "crm2", false),
            ("crm*", "crm", true),
            ("*crm", "my-crm", true),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-b-b", false),
            ("*", "x", true),
            ("a_c", "abc", false),
            ("*ab", "aab", true),
            ("a**b", "ab", true),
        ] {
            assert_eq!(patterns(&[pattern]).matches(name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn no_pattern_is_every_name_and_several_add_up() {
        assert!(patterns(&[]).matches("any") && patterns(&["", " "]).like().is_none());
        let both = patterns(&["a*", "b_1"]);
        assert!(both.matches("a") && both.matches("b_1") && !both.matches("bx1"));
        assert_eq!(both.like(), Some(vec!["a%".into(), "b\\_1".into()]));
    }

    #[test]
    fn what_like_takes_for_its_own_is_escaped() {
        for (pattern, expected) in [("*", "%"), ("a_b%c\\d*", "a\\_b\\%c\\\\d%"), ("*timeout*", "%timeout%")] {
            assert_eq!(like(pattern), expected);
        }
    }

    #[test]
    fn what_no_name_holds_is_refused() {
        assert!(Patterns::new(&["a b".into()]).is_none() && Patterns::new(&["a%".into()]).is_none());
    }
}

//! The destinations that this relay serves, as it last read them. One that has nothing to do is an entry here and nothing
//! else.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use crate::destination::Spec;

/// Which destinations are to be read, or were.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Which {
    All,
    These(BTreeSet<String>),
}

impl Which {
    /// What a notification of a change says: the name of the destination, or nothing.
    pub fn named(payload: &str) -> Self {
        match payload {
            "" => Which::All,
            name => Which::These(BTreeSet::from([name.to_owned()])),
        }
    }

    pub fn and(self, other: Self) -> Self {
        match (self, other) {
            (Which::These(mut some), Which::These(more)) => {
                some.extend(more);
                Which::These(some)
            }
            _ => Which::All,
        }
    }
}

#[derive(Default)]
pub struct Directory {
    by_name: HashMap<Arc<str>, Spec>,
    of_brokers: usize,
}

/// What became of a destination that was read.
#[derive(Debug, PartialEq, Eq)]
pub enum Change {
    Added,
    Changed,
    Same,
}

impl Directory {
    pub fn get(&self, name: &str) -> Option<&Spec> {
        self.by_name.get(name)
    }

    pub fn specs(&self) -> impl Iterator<Item = &Spec> {
        self.by_name.values()
    }

    /// Those of a broker.
    pub fn of_brokers(&self) -> usize {
        self.of_brokers
    }

    pub fn webhooks(&self) -> usize {
        self.by_name.len() - self.of_brokers
    }

    pub fn put(&mut self, spec: Spec) -> Change {
        let name = spec.name.clone();
        if self.by_name.get(&name) == Some(&spec) {
            return Change::Same;
        }
        self.of_brokers += usize::from(spec.is_rabbitmq());
        match self.by_name.insert(name, spec) {
            Some(before) => {
                self.of_brokers -= usize::from(before.is_rabbitmq());
                Change::Changed
            }
            None => Change::Added,
        }
    }

    /// Removes those that were to be read and were not there; their names.
    pub fn remove_missing(&mut self, which: &Which, found: &BTreeSet<Arc<str>>) -> Vec<Arc<str>> {
        let missing: Vec<Arc<str>> = match which {
            Which::All => self.by_name.keys().filter(|name| !found.contains(*name)).cloned().collect(),
            Which::These(names) => {
                let known = names.iter().filter_map(|name| self.by_name.get_key_value(name.as_str()));
                known.map(|(name, _)| name.clone()).filter(|name| !found.contains(name)).collect()
            }
        };
        for name in &missing {
            if let Some(spec) = self.by_name.remove(name) {
                self.of_brokers -= usize::from(spec.is_rabbitmq());
            }
        }
        missing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str, kind: &str, url: &str) -> Spec {
        Spec { name: name.into(), kind: kind.into(), url: Some(url.into()), ..Spec::default() }
    }

    #[test]
    fn what_is_read_is_new_changed_or_the_same() {
        let mut directory = Directory::default();
        assert_eq!(directory.put(spec("a", "webhook", "x")), Change::Added);
        assert_eq!(directory.put(spec("a", "webhook", "x")), Change::Same);
        assert_eq!(directory.put(spec("a", "webhook", "y")), Change::Changed);
        assert_eq!(directory.put(spec("b", "rabbitmq", "")), Change::Added);
        assert_eq!((directory.webhooks(), directory.of_brokers()), (1, 1));
    }

    #[test]
    fn only_what_was_asked_for_can_be_missing() {
        let mut directory = Directory::default();
        for name in ["a", "b", "c"] {
            directory.put(spec(name, "webhook", ""));
        }
        let found = BTreeSet::from([Arc::from("a")]);
        let asked = Which::named("a").and(Which::named("b")).and(Which::named("unknown"));
        assert_eq!(directory.remove_missing(&asked, &found), [Arc::from("b")]);
        assert!(directory.get("c").is_some());
        assert_eq!(directory.remove_missing(&Which::named(""), &found), [Arc::from("c")]);
        assert_eq!(directory.webhooks(), 1);
    }

    #[test]
    fn a_change_without_a_name_may_be_of_any() {
        assert_eq!(Which::named("a").and(Which::All), Which::All);
        assert_eq!(Which::named(""), Which::All);
    }
}

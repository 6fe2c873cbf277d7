//! The destinations that this relay serves, as it last read them. One that has nothing to do is an entry here and nothing
//! else.

use std::collections::{BTreeMap, BTreeSet, HashMap};
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
    /// How many each broker has.
    of_brokers: BTreeMap<Arc<str>, usize>,
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

    /// The brokers that have any.
    pub fn brokers(&self) -> impl Iterator<Item = &Arc<str>> {
        self.of_brokers.keys()
    }

    /// How many a broker has.
    pub fn of_broker(&self, name: &str) -> usize {
        self.of_brokers.get(name).copied().unwrap_or(0)
    }

    pub fn webhooks(&self) -> usize {
        self.by_name.len() - self.of_brokers.values().sum::<usize>()
    }

    fn count(&mut self, spec: &Spec) {
        if let Some(broker) = spec.broker() {
            *self.of_brokers.entry(broker.into()).or_default() += 1;
        }
    }

    fn uncount(&mut self, spec: &Spec) {
        let Some(broker) = spec.broker() else { return };
        if let Some(count) = self.of_brokers.get_mut(broker) {
            *count -= 1;
            if *count == 0 {
                self.of_brokers.remove(broker);
            }
        }
    }

    pub fn put(&mut self, spec: Spec) -> Change {
        let name = spec.name.clone();
        if self.by_name.get(&name) == Some(&spec) {
            return Change::Same;
        }
        self.count(&spec);
        match self.by_name.insert(name, spec) {
            Some(before) => {
                self.uncount(&before);
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
                self.uncount(&spec);
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
        assert_eq!((directory.webhooks(), directory.of_broker("default")), (1, 1));
        let elsewhere = Spec { broker: Some("eu".into()), ..spec("b", "rabbitmq", "") };
        assert_eq!(directory.put(elsewhere), Change::Changed);
        assert_eq!((directory.of_broker("default"), directory.of_broker("eu"), directory.webhooks()), (0, 1, 1));
        assert_eq!(directory.brokers().map(|name| &**name).collect::<Vec<_>>(), ["eu"]);
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

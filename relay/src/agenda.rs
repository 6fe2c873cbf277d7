//! What the dispatcher may begin next. Pure: one claim, one settlement and one reading of the destinations may be under way
//! at a time, and an event is never handed to a destination as it was before a change that was committed before the event.
//!
//! ```text
//!   destinations:  Known ──changed──> Stale ──begin──> Reading ──read──> Known
//!                                       ^                 │ changed
//!                                       └──read── ReadingStale
//!
//!   claim:  None ──begin──> Asked ──answer──> None
//!                             └──answer while the destinations are not known──> Kept ──read──> None
//! ```

use crate::directory::Which;

pub struct Agenda<B> {
    destinations: Destinations,
    claim: Claim<B>,
    settling: bool,
    stopping: bool,
}

/// What is known of the destinations.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Destinations {
    Known,
    /// These have changed.
    Stale(Which),
    Reading,
    /// These changed after the reading began.
    ReadingStale(Which),
}

enum Claim<B> {
    None,
    Asked,
    /// Its answer waits for the destinations to be read.
    Kept(B),
}

impl<B> Agenda<B> {
    /// First all destinations are read.
    pub fn new() -> Self {
        Agenda { destinations: Destinations::Stale(Which::All), claim: Claim::None, settling: false, stopping: false }
    }

    /// Nothing new begins from here on.
    pub fn stop(&mut self) {
        self.stopping = true;
    }

    pub fn is_stopping(&self) -> bool {
        self.stopping
    }

    /// The destinations are not, or not yet, known as they are now.
    fn is_reading(&self) -> bool {
        match self.destinations {
            Destinations::Known => false,
            Destinations::Stale(_) => !self.stopping,
            Destinations::Reading | Destinations::ReadingStale(_) => true,
        }
    }

    pub fn destinations_changed(&mut self, which: Which) {
        self.destinations = match std::mem::replace(&mut self.destinations, Destinations::Known) {
            Destinations::Known => Destinations::Stale(which),
            Destinations::Stale(others) => Destinations::Stale(others.and(which)),
            Destinations::Reading => Destinations::ReadingStale(which),
            Destinations::ReadingStale(others) => Destinations::ReadingStale(others.and(which)),
        };
    }

    /// The destinations to read now, which the caller does; none if there are none or they are being read.
    pub fn begin_reading(&mut self) -> Option<Which> {
        if self.stopping || !matches!(self.destinations, Destinations::Stale(_)) {
            return None;
        }
        match std::mem::replace(&mut self.destinations, Destinations::Reading) {
            Destinations::Stale(which) => Some(which),
            _ => None,
        }
    }

    /// The destinations were read. The claim's answer that waited for them.
    pub fn destinations_read(&mut self) -> Option<B> {
        match std::mem::replace(&mut self.destinations, Destinations::Known) {
            Destinations::ReadingStale(which) => {
                self.destinations = Destinations::Stale(which);
                return None;
            }
            _known => {}
        }
        match std::mem::replace(&mut self.claim, Claim::None) {
            Claim::Kept(batch) => Some(batch),
            claim => {
                self.claim = claim;
                None
            }
        }
    }

    pub fn may_claim(&self) -> bool {
        matches!(self.claim, Claim::None) && !self.is_reading() && !self.stopping
    }

    pub fn claim_began(&mut self) {
        self.claim = Claim::Asked;
    }

    /// A claim's answer came; none: it is kept until the destinations are read.
    pub fn claim_answered(&mut self, batch: B) -> Option<B> {
        if self.is_reading() {
            self.claim = Claim::Kept(batch);
            return None;
        }
        self.claim = Claim::None;
        Some(batch)
    }

    pub fn may_settle(&self) -> bool {
        !self.settling
    }

    pub fn settlement_began(&mut self) {
        self.settling = true;
    }

    pub fn settled(&mut self) {
        self.settling = false;
    }

    /// After a shutdown, what was not begun is released once nothing else is under way.
    pub fn may_give_back(&self) -> bool {
        self.stopping && !self.settling && matches!(self.claim, Claim::None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ready to claim.
    fn agenda() -> Agenda<u8> {
        let mut agenda = Agenda::new();
        assert!(!agenda.may_claim());
        assert_eq!((agenda.begin_reading(), agenda.begin_reading()), (Some(Which::All), None));
        assert!(!agenda.may_claim() && agenda.destinations_read().is_none());
        assert!(agenda.may_claim());
        agenda
    }

    #[test]
    fn a_claim_that_is_answered_after_a_change_waits_until_it_is_read() {
        let mut agenda = agenda();
        agenda.claim_began();
        agenda.destinations_changed(Which::named("a"));
        assert_eq!(agenda.claim_answered(7), None);
        assert!(agenda.begin_reading() == Some(Which::named("a")) && !agenda.may_claim());
        assert_eq!(agenda.destinations_read(), Some(7));
        assert!(agenda.may_claim());
    }

    #[test]
    fn a_change_while_they_are_read_has_them_read_again() {
        let mut agenda = agenda();
        agenda.claim_began();
        agenda.destinations_changed(Which::named("a"));
        assert!(agenda.begin_reading().is_some());
        agenda.destinations_changed(Which::named("a"));
        assert_eq!(agenda.claim_answered(7), None);
        assert_eq!(agenda.destinations_read(), None);
        assert!(agenda.begin_reading().is_some());
        assert_eq!(agenda.destinations_read(), Some(7));
    }

    #[test]
    fn many_changes_are_read_at_once() {
        let mut agenda = agenda();
        agenda.destinations_changed(Which::named("a"));
        agenda.destinations_changed(Which::named("b"));
        assert_eq!(agenda.begin_reading(), Some(Which::named("a").and(Which::named("b"))));
        for name in ["c", "d"] {
            agenda.destinations_changed(Which::named(name));
        }
        assert_eq!(agenda.destinations_read(), None);
        assert_eq!(agenda.begin_reading(), Some(Which::named("c").and(Which::named("d"))));
    }

    #[test]
    fn after_a_shutdown_nothing_begins_and_what_is_held_is_given_back() {
        let mut agenda = agenda();
        agenda.claim_began();
        agenda.destinations_changed(Which::named("a"));
        agenda.stop();
        assert!(agenda.begin_reading().is_none() && !agenda.may_claim() && !agenda.may_give_back());
        assert_eq!(agenda.claim_answered(7), Some(7), "nobody reads the destinations any more");
        agenda.settlement_began();
        assert!(!agenda.may_settle() && !agenda.may_give_back());
        agenda.settled();
        assert!(agenda.may_settle() && agenda.may_give_back() && !agenda.may_claim());
    }
}

//! The calls that the model makes, and how often each.

use super::promise::{CONSUMERS, EVERYTHING};
use proptest::prelude::*;

#[derive(Debug, Clone)]
pub enum Call {
    /// One event of each of these aggregates, in one transaction; 0: of none.
    Insert(Vec<u8>),
    /// One event of each of these aggregates, for later.
    Schedule(Vec<u8>),
    /// The application deletes an event that is not delivered yet.
    Delete {
        which: usize,
    },
    /// An event whose transaction stays open.
    InsertLate(u8),
    EndLate {
        commit: bool,
    },
    Claim {
        by: usize,
        most: i32,
    },
    /// A claim whose lease ends before anything is settled.
    ClaimBriefly {
        by: usize,
    },
    AckAll {
        by: usize,
    },
    Ack {
        by: usize,
        which: usize,
    },
    Fail {
        by: usize,
        which: usize,
        at_once: bool,
    },
    Reject {
        by: usize,
        which: usize,
    },
    Release {
        by: usize,
    },
    /// With a claim that is over.
    AckStale,
    /// The moment of every retry has come.
    Due,
    Die {
        by: usize,
    },
    Crash,
}

pub fn call() -> impl Strategy<Value = Call> {
    let by = 0..CONSUMERS;
    let which = 0usize..8;
    prop_oneof![
        12 => prop::collection::vec(0u8..4, 1..6).prop_map(Call::Insert),
        3 => prop::collection::vec(0u8..4, 1..4).prop_map(Call::Schedule),
        2 => (0usize..20).prop_map(|which| Call::Delete { which }),
        3 => (0u8..4).prop_map(Call::InsertLate),
        3 => any::<bool>().prop_map(|commit| Call::EndLate { commit }),
        12 => (by.clone(), prop_oneof![Just(EVERYTHING), 1i32..5]).prop_map(|(by, most)| Call::Claim { by, most }),
        1 => by.clone().prop_map(|by| Call::ClaimBriefly { by }),
        6 => by.clone().prop_map(|by| Call::AckAll { by }),
        8 => (by.clone(), which.clone()).prop_map(|(by, which)| Call::Ack { by, which }),
        8 => (by.clone(), which.clone(), any::<bool>()).prop_map(|(by, which, at_once)| Call::Fail { by, which, at_once }),
        2 => (by.clone(), which).prop_map(|(by, which)| Call::Reject { by, which }),
        3 => by.clone().prop_map(|by| Call::Release { by }),
        2 => Just(Call::AckStale),
        3 => Just(Call::Due),
        2 => by.prop_map(|by| Call::Die { by }),
    ]
}

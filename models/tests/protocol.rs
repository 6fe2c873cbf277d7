//! Claims and settlements keep their promises whatever happens in between, in small worlds in which everything is tried.

use outbox_models::protocol::{Broken, Budget, World};
use stateright::{Checker, HasDiscoveries, Model};

/// One destination; the first two events are of one aggregate.
const ONE: World = World {
    broken: Broken::Nothing,
    keys: [Some(1), Some(1), None],
    events: 2,
    destinations: 0b01,
    serves: [0b01, 0b01],
    most: 2,
    budget: Budget {
        claims: 0,
        rollbacks: 0,
        lease_ends: 0,
        deaths: 0,
        restarts: 0,
        failures: 0,
        rejections: 0,
        outages: 0,
        releases: 0,
        changes: 0,
        pauses: 0,
        removals: 0,
    },
};

/// Claims end in every way.
const ENDS: World = World { budget: Budget { claims: 3, lease_ends: 1, deaths: 1, releases: 1, ..ONE.budget }, ..ONE };

/// Commits come late, claims roll back, the server restarts.
const LATE: World = World { events: 3, budget: Budget { claims: 2, rollbacks: 1, restarts: 1, ..ONE.budget }, ..ONE };

/// Attempts fail, one aggregate.
const FAILURES: World = World {
    keys: [Some(1), Some(1), Some(1)],
    events: 3,
    serves: [0b01, 0],
    budget: Budget { claims: 3, failures: 2, rejections: 1, removals: 1, ..ONE.budget },
    ..ONE
};

/// Two destinations, one consumer for both and one for the second, which is down now and then.
const OUTAGES: World = World {
    destinations: 0b11,
    serves: [0b11, 0b10],
    budget: Budget { claims: 3, outages: 1, rejections: 1, removals: 1, ..ONE.budget },
    ..ONE
};

/// Two consumers, each for a destination of its own.
const SHARED: World = World {
    keys: [None, Some(1), None],
    destinations: 0b11,
    serves: [0b01, 0b10],
    budget: Budget { claims: 3, releases: 1, rejections: 1, ..ONE.budget },
    ..ONE
};

/// The second destination is removed, added and paused, while events are claimed.
const CHANGES: World = World {
    destinations: 0b11,
    serves: [0b11, 0],
    budget: Budget { claims: 2, changes: 2, pauses: 1, releases: 1, ..ONE.budget },
    ..ONE
};

#[allow(clippy::disallowed_macros, reason = "for whoever reads the output of the tests")]
fn holds(name: &str, world: World) {
    let began = std::time::Instant::now();
    let checker = world.checker().threads(2).spawn_bfs().join();
    println!("{name}: {} states, {:?}", checker.unique_state_count(), began.elapsed());
    checker.assert_properties();
}

#[test]
fn claims_that_end_in_every_way() {
    holds("ends", ENDS);
}

#[test]
fn commits_that_come_late() {
    holds("late", LATE);
}

#[test]
fn consumers_that_share_events() {
    holds("shared", SHARED);
}

#[test]
fn attempts_that_fail() {
    holds("failures", FAILURES);
}

#[test]
fn a_destination_that_is_down() {
    holds("outages", OUTAGES);
}

#[test]
fn a_destination_that_comes_and_goes() {
    holds("changes", CHANGES);
}

/// The promise that a broken variant breaks first.
#[allow(clippy::disallowed_macros, reason = "for whoever reads the output of the tests")]
fn breaks(broken: Broken, world: World, promises: &[&str]) {
    let world = World { broken, ..world };
    let any = HasDiscoveries::AnyFailures;
    let checker = world.checker().threads(2).finish_when(any).spawn_bfs().join();
    let mut found = checker.discoveries();
    found.remove("all is settled");
    let (promise, path) = found.into_iter().next().unwrap_or_else(|| panic!("{broken:?} was not found"));
    println!("{broken:?} breaks {promise:?} after {:?}", path.into_actions());
    assert!(promises.contains(&promise), "{broken:?} broke {promise:?}");
}

macro_rules! found {
    ($($name:ident: $broken:ident in $world:ident breaks $($promise:literal)|+;)*) => {
        $(#[test] fn $name() { breaks(Broken::$broken, $world, &[$($promise),+]); })*
    };
}

found! {
    a_settlement_without_a_token: NoFencing in ENDS breaks "a stale token changes nothing";
    a_lease_that_never_ends: LeaseEndIgnored in ENDS breaks "nothing is lost";
    a_lease_that_ends_early: LeaseEndsEarly in ENDS breaks "handed out to one claim at a time" | "a stale token changes nothing";
    a_session_that_nobody_misses: SessionEndForgotten in ENDS breaks "nothing is lost";
    a_parked_delivery_that_is_overtaken: ParkedIgnored in FAILURES breaks "in order" | "nothing is lost";
    an_event_in_flight_that_is_overtaken: InFlightIgnored in ENDS breaks "in order";
    a_claim_that_looks_before_it_locks: ReadBeforeLock in ENDS breaks "handed out to one claim at a time" | "the books are right" | "nothing is lost";
    a_release_that_forgets_deliveries: ReleaseForgetsDeliveries in OUTAGES breaks "nothing is lost" | "the books are right";
    a_removal_that_keeps_what_was_held: RemovalKeepsHeld in CHANGES breaks "the books are right";
    a_new_destination_in_an_old_claim: AddedIsClaimed in CHANGES breaks "whoever holds an event knows it";
    a_late_commit_that_is_skipped: LateSkipped in LATE breaks "nothing is lost";
    a_claim_that_rolls_back_with_the_mark: RollbackLosesMark in LATE breaks "nothing is lost";
    a_restart_that_skips_all: RestartSkipsAll in LATE breaks "nothing is lost";
    an_outage_that_uses_attempts: OutageUsesAttempts in OUTAGES breaks "an outage uses no attempt";
    a_rest_that_is_handed_out_again: RestNotListed in SHARED breaks "handed out to one claim at a time" | "whoever holds an event knows it";
    a_failure_that_takes_nothing_back: NothingTakenBack in FAILURES breaks "in order" | "handed out to one claim at a time";
    a_delivery_that_nobody_promotes: NobodyPromoted in FAILURES breaks "nothing is lost";
    a_parked_delivery_that_is_forgotten: ParkedForgotten in OUTAGES breaks "leaves when nothing is owed" | "nothing is lost";
    an_event_that_is_removed_while_owed: RemovedWhileOwed in OUTAGES breaks "leaves when nothing is owed" | "the books are right";
}

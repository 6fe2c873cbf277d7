//! The low-water mark and its lowering at commit.

macro_rules! with {
    ($($name:ident: $marks:path;)*) => { $(#[allow(dead_code, reason = "a variant runs one case")] mod $name { use $marks as marks; use marks::Marks; include!("cases/marks.rs"); })* };
}

with! {
    genuine: outbox_models::marks;
    marks_not_swapped: outbox_models::broken::marks_not_swapped;
    marks_lost_with_claim: outbox_models::broken::marks_lost_with_claim;
    marks_raised: outbox_models::broken::marks_raised;
}

outbox_models::cases! {
    hold:
        late_commits_are_found
        a_claim_that_rolls_back_loses_nothing
        claims_in_turn_find_a_late_commit
        two_commits_of_a_session_are_handed_out_in_order;
    found:
        marks_not_swapped => late_commits_are_found "no claim finds it",
        marks_lost_with_claim => a_claim_that_rolls_back_loses_nothing "no claim finds it",
        marks_raised => late_commits_are_found "no claim finds it",
}

#[test]
#[should_panic(expected = "no claim finds it")]
fn a_mark_that_is_lowered_before_the_commit_is_visible_is_found() {
    genuine::lowered_before_it_is_visible();
}

#[test]
#[should_panic(expected = "no claim finds it")]
fn a_claim_that_walks_with_an_old_snapshot_is_found() {
    genuine::walked_with_an_old_snapshot();
}

#[test]
#[should_panic(expected = "event 3 was handed out before event 0")]
fn a_claim_that_walks_from_an_old_mark_is_found() {
    genuine::walked_from_an_old_mark();
}

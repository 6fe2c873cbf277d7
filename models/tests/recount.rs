//! Counting the events of a table while transactions commit.

macro_rules! with {
    ($($name:ident: $recount:path;)*) => {
        $(#[allow(dead_code, reason = "a variant runs one case")] mod $name { use $recount as recount; use recount::{Recount, Seen}; include!("cases/recount.rs"); })*
    };
}

with! {
    genuine: outbox_models::recount;
    recount_never_spoiled: outbox_models::broken::recount_never_spoiled;
    recount_without_fence: outbox_models::broken::recount_without_fence;
}

outbox_models::cases! {
    hold:
        commits_are_counted_once_or_the_count_is_spoiled
        a_second_count_takes_nothing_twice;
    found:
        recount_never_spoiled => commits_are_counted_once_or_the_count_is_spoiled "nobody knows",
        recount_without_fence => commits_are_counted_once_or_the_count_is_spoiled "nobody knows",
}

#[test]
#[should_panic(expected = "nobody knows")]
fn a_commit_that_is_counted_before_it_is_visible_is_found() {
    genuine::counted_before_it_is_visible();
}

#[test]
#[should_panic(expected = "while the worker sleeps")]
fn a_count_that_is_spoiled_quietly_is_found() {
    genuine::spoiled_quietly();
}

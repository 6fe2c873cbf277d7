//! No wake-up is lost, however commits and the worker interleave and whatever weak memory shows them.

macro_rules! with {
    ($($name:ident: $timers:path, $news:path;)*) => {
        $(#[allow(dead_code, reason = "a variant runs one case")] mod $name {
            use $news as news;
            use $timers as timers;
            use news::News;
            use timers::{AT_ONCE, Moments, NEVER, Timers};
            include!("cases/timers.rs");
        })*
    };
}

with! {
    genuine: outbox_models::timers, outbox_models::news;
    alarm_without_fence: outbox_models::broken::alarm_without_fence, outbox_models::news;
    ring_without_fence: outbox_models::broken::ring_without_fence, outbox_models::news;
    alarm_set_last: outbox_models::broken::alarm_set_last, outbox_models::news;
    lease_end_dropped: outbox_models::broken::lease_end_dropped, outbox_models::news;
    news_overflow_unsaid: outbox_models::timers, outbox_models::broken::news_overflow_unsaid;
}

outbox_models::cases! {
    hold:
        an_event_is_not_left_in_the_ring_while_the_worker_sleeps
        two_commits_wake_the_worker_and_both_are_found
        what_is_due_earlier_than_the_worker_thought_wakes_it
        a_lease_ends_though_the_worker_looks_just_when_claims_change
        a_lease_that_is_set_while_the_worker_takes_an_earlier_one_is_not_lost
        what_does_not_fit_is_said
        an_ended_session_and_a_retry_wake_the_worker
        a_spoiled_count_wakes_the_worker;
    found:
        alarm_without_fence => an_event_is_not_left_in_the_ring_while_the_worker_sleeps "the worker sleeps on",
        ring_without_fence => an_event_is_not_left_in_the_ring_while_the_worker_sleeps "the worker sleeps on",
        alarm_set_last => an_event_is_not_left_in_the_ring_while_the_worker_sleeps "the worker sleeps on",
        lease_end_dropped => a_lease_ends_though_the_worker_looks_just_when_claims_change "a lease has no end",
        news_overflow_unsaid => what_does_not_fit_is_said "an event is not announced",
}

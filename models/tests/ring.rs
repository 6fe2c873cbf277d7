//! The ring of ids: pushed by backends that commit, popped by the worker.

macro_rules! with {
    ($($name:ident: $ring:path;)*) => { $(#[allow(dead_code, reason = "a variant runs one case")] mod $name { use $ring as ring; use ring::Ring; include!("cases/ring.rs"); })* };
}

with! {
    genuine: outbox_models::ring;
    ring_published_early: outbox_models::broken::ring_published_early;
    ring_not_reserved: outbox_models::broken::ring_not_reserved;
    ring_never_full: outbox_models::broken::ring_never_full;
}

outbox_models::cases! {
    hold:
        ids_come_out_once_and_in_order
        an_id_is_there_before_its_turn
        a_full_ring_refuses
        a_pusher_that_is_stopped_midway_loses_nothing;
    found:
        ring_published_early => an_id_is_there_before_its_turn "read before it was written",
        ring_not_reserved => a_pusher_that_is_stopped_midway_loses_nothing "nobody counts it",
        ring_never_full => a_full_ring_refuses "written over",
}

//! The slots of attached sessions: taken by backends, ended by them, freed by the worker.

macro_rules! with {
    ($($name:ident: $attachments:path;)*) => {
        $(#[allow(dead_code, reason = "a variant runs one case")] mod $name {
            use $attachments as attachments;
            use attachments::Attachment;
            include!("cases/attachments.rs");
        })*
    };
}

with! {
    genuine: outbox_models::attachments;
    attachment_not_reserved: outbox_models::broken::attachment_not_reserved;
    attachment_free_too_early: outbox_models::broken::attachment_free_too_early;
}

outbox_models::cases! {
    hold:
        nothing_stays_claimed_by_sessions_that_ended
        a_slot_has_one_session
        a_slot_that_changes_hands_is_whole;
    found:
        attachment_not_reserved => a_slot_has_one_session "two sessions in one slot",
        attachment_free_too_early => a_slot_that_changes_hands_is_whole "nobody, or somebody else",
}

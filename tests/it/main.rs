//! Tests against real servers: one file a subject.

mod smoke;

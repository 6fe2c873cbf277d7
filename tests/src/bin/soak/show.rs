//! What the soak prints.

use std::sync::OnceLock;

use outbox_tests::trace::{Micros, now_us};

use crate::record::Fault;

static BEGIN: OnceLock<Micros> = OnceLock::new();

/// Moments are shown in seconds since then.
pub fn begin() {
    BEGIN.get_or_init(now_us);
}

pub fn moment(at: Micros) -> String {
    let begin = *BEGIN.get_or_init(now_us);
    format!("{:.3} s", (at - begin) as f64 / 1e6)
}

pub fn say(text: &str) {
    println!("{:>12}  {text}", moment(now_us()));
}

pub fn timeline(faults: &[Fault]) {
    println!("faults, in the order of their beginning:");
    for fault in faults {
        let end = fault.end.map_or_else(|| "...".to_owned(), moment);
        println!("{:>12} - {end:>12}  {}", moment(fault.begin), fault.what);
    }
}

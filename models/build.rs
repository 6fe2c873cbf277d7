//! Broken variants of the extension's files, each with one step changed, so that the models are shown to be able to fail.
//! A file that no longer has the step fails the build.

#![allow(clippy::disallowed_macros, reason = "cargo reads what a build script prints")]

use std::path::Path;
use std::{env, fs};

/// Name, file, what is replaced, by what.
const VARIANTS: &[(&str, &str, &str, &str)] = &[
    // The worker may see the turn before the id.
    ("ring_published_early", "ring", "cell.turn.store(at + 1, Release);", "cell.turn.store(at + 1, Relaxed);"),
    // Two pushers may take one cell.
    (
        "ring_not_reserved",
        "ring",
        "match self.tail.compare_exchange_weak(at, at + 1, Relaxed, Relaxed) {",
        "self.tail.store(at + 1, Relaxed); match Ok::<u64, u64>(at) {",
    ),
    // A full ring is not noticed, and a note is written over another.
    ("ring_never_full", "ring", "if turn == at {", "if turn <= at {"),
    // What was pushed behind the alarm's back is not counted until it is written.
    (
        "alarm_without_fence",
        "timers",
        "self.0.store(until.max(AWAKE + 1), Relaxed);\n        fence(SeqCst);",
        "self.0.store(until.max(AWAKE + 1), Relaxed);",
    ),
    ("ring_without_fence", "timers", "fence(SeqCst);\n        self.0.fetch_update", "self.0.fetch_update"),
    // The worker looks before it sets the alarm.
    (
        "alarm_set_last",
        "timers",
        "self.alarm.set(until);\n        if asked() || self.moment() < until {",
        "let stay = asked() || self.moment() < until;\n        self.alarm.set(until);\n        if stay {",
    ),
    // The ends of leases are dropped with the claims that are settled, whatever was claimed meanwhile.
    ("lease_end_dropped", "timers", "if self.open.load(Acquire) != 0 {", "if false {"),
    // An event that does not fit is named by nothing.
    (
        "news_overflow_unsaid",
        "news",
        "let overflow = overflow || !ids.iter().all(|id| self.ring.push(*id));",
        "ids.iter().for_each(|id| { let _full = self.ring.push(*id); });",
    ),
    // A commit lowers the mark between the claim's look and its reset.
    (
        "marks_not_swapped",
        "marks",
        "self.lowered.swap(NEVER, SeqCst)",
        "{ let found = self.lowered.load(SeqCst); self.lowered.store(NEVER, SeqCst); found }",
    ),
    // A claim that rolls back takes the lowered mark with it.
    (
        "marks_lost_with_claim",
        "marks",
        "self.low_water.fetch_min(lowered, SeqCst).min(lowered)",
        "self.low_water.load(SeqCst).min(lowered)",
    ),
    // Of two commits, the later one sets the mark.
    ("marks_raised", "marks", "self.lowered.fetch_min(id, SeqCst);", "self.lowered.store(id, SeqCst);"),
    // A commit during the choice of the snapshot is not noticed.
    ("recount_never_spoiled", "recount", "choosing || self.generation.load(SeqCst) != generation;", "false;"),
    // A commit adds to the counters what they forget, and sees no count that began.
    ("recount_without_fence", "recount", "fence(SeqCst);\n        let spoiled", "let spoiled"),
    // Two sessions may take one slot.
    (
        "attachment_not_reserved",
        "attachments",
        "a.pid.compare_exchange(0, pid, SeqCst, SeqCst).is_ok()",
        "a.pid.load(SeqCst) == 0 && { a.pid.store(pid, SeqCst); true }",
    ),
    // A slot is free before what its last session left in it is gone.
    (
        "attachment_free_too_early",
        "attachments",
        "self.id.store(0, SeqCst);\n            self.pid.store(0, SeqCst);",
        "self.pid.store(0, SeqCst);\n            self.id.store(0, SeqCst);",
    ),
];

fn main() {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../pg_outbox_ext/src");
    let target = env::var("OUT_DIR").expect("cargo names a directory");
    println!("cargo::rerun-if-changed=build.rs");
    for (name, file, step, broken) in VARIANTS {
        let path = sources.join(file).with_extension("rs");
        println!("cargo::rerun-if-changed={}", path.display());
        let text = fs::read_to_string(&path).expect("a file of the extension");
        assert_eq!(text.matches(step).count(), 1, "{name}: {} has this step once: {step}", path.display());
        // An included file has no comment of its own as a whole, and no tests.
        let (code, _tests) = text.split_once("#[cfg(test)]\n").unwrap_or((&text, ""));
        let code: Vec<&str> = code.lines().filter(|line| !line.starts_with("//!")).collect();
        let variant = code.join("\n").replace(step, broken);
        fs::write(Path::new(&target).join(name).with_extension("rs"), variant).expect("a file in cargo's directory");
    }
}

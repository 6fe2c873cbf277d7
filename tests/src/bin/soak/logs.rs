//! The server's log: no error that is not the direct consequence of a fault.

use std::collections::BTreeMap;
use std::ops::Range;

use anyhow::{Result, ensure};

use crate::stage::Stage;

/// What faults make PostgreSQL say, by parts of its messages.
const EXPECTED: [&str; 24] = [
    "terminating connection due to administrator command",
    "terminating connection due to unexpected postmaster exit",
    "terminating connection because of crash of another server process",
    "terminating connection due to immediate shutdown",
    "terminating background worker",
    "terminating autovacuum process",
    "terminating walreceiver",
    "terminating logical replication worker",
    "the database system is",
    "canceling statement due to user request",
    "canceling statement due to lock timeout",
    "canceling statement due to statement timeout",
    "canceling autovacuum task",
    "connection to client lost",
    // What the soak's own sessions do on purpose.
    "division by zero",
    "prepared transaction with identifier \"soak ",
    "could not send data to client",
    "still being prepared",
    "there is no transaction in progress",
    "could not receive data from client",
    "there is already a transaction in progress",
    "is busy",
    "skipping vacuum of",
    "out-of-date",
];

/// Faults that make PostgreSQL say what it says at no other time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    DiskFull,
    Standby,
}

impl Cause {
    fn says(self) -> &'static [&'static str] {
        match self {
            Cause::DiskFull => &["No space left on device"],
            Cause::Standby => &[
                "neither primary_conninfo nor restore_command",
                "on a standby",
                "in a read-only transaction",
                "during recovery",
                "is in recovery",
            ],
        }
    }
}

/// The part of the log that was written during such a fault.
#[derive(Debug, Clone)]
pub struct Span {
    pub cause: Cause,
    pub part: Range<usize>,
}

/// Signals that faults send; a process that ends by another one crashed.
const SIGNALS: [&str; 3] = ["signal 9", "signal 3", "signal 15"];

/// Looks at what was logged since an offset, and returns the next one.
pub fn look(stage: &Stage, from: usize) -> Result<usize> {
    let log = stage.cluster.log();
    let mut strange: BTreeMap<String, usize> = BTreeMap::new();
    let lines: Vec<&str> = log.get(from..).unwrap_or_default().split_inclusive('\n').collect();
    let mut at = from;
    for (n, line) in lines.iter().enumerate() {
        let causes = stage.causes_at(at);
        at += line.len();
        if is_strange(line, &causes) {
            // What follows explains it: detail, context, statement.
            let more: Vec<&str> = lines[n..].iter().take(5).map(|line| line.trim_end()).collect();
            *strange.entry(more.join("\n        ")).or_default() += 1;
        }
    }
    let shown: Vec<&String> = strange.keys().take(10).collect();
    ensure!(strange.is_empty(), "the server's log has {} strange lines: {shown:#?}", strange.len());
    Ok(log.len())
}

/// `causes`: the faults during which the line was written.
pub fn is_strange(line: &str, causes: &[Cause]) -> bool {
    let severe = ["ERROR:  ", "FATAL:  ", "PANIC:  ", "WARNING:  ", "TRAP: "].iter().any(|level| line.contains(level));
    let ended = line.contains("was terminated by signal") && !SIGNALS.iter().any(|signal| line.contains(signal));
    let panicked = line.contains("panicked at");
    let mut expected = EXPECTED.iter().chain(causes.iter().flat_map(|cause| cause.says()));
    ended || panicked || severe && !expected.any(|expected| line.contains(expected))
}

#[cfg(test)]
mod tests {
    use super::{Cause, is_strange};

    #[test]
    fn what_faults_cause_is_expected_and_nothing_else() {
        for line in [
            "2026-11-30 23:00:00 UTC [7] client backend db FATAL:  terminating connection due to administrator command",
            "2026-11-30 23:00:00 UTC [7] postmaster  LOG:  server process (PID 8) was terminated by signal 9: Killed",
            "2026-11-30 23:00:00 UTC [7] checkpointer  LOG:  checkpoint starting: time",
        ] {
            assert!(!is_strange(line, &[]), "{line}");
        }
        for line in [
            "2026-11-30 23:00:00 UTC [7] client backend db ERROR:  deadlock detected",
            "2026-11-30 23:00:00 UTC [7] postmaster  LOG:  server process (PID 8) was terminated by signal 11: Segmentation fault",
            "thread '<unnamed>' panicked at src/worker.rs:1:1:",
        ] {
            assert!(is_strange(line, &[]), "{line}");
        }
    }

    #[test]
    fn what_one_fault_causes_is_expected_during_that_fault_alone() {
        let attach = "2026-11-30 23:00:00.000 UTC [7] client backend db ERROR:  cannot attach on a standby";
        assert!(!is_strange(attach, &[Cause::Standby]));
        assert!(is_strange(attach, &[]));
        assert!(is_strange(attach, &[Cause::DiskFull]));
    }
}

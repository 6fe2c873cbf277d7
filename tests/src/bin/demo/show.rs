//! Plain text of at most 80 columns.

use std::time::Duration;

use crate::journal::{Step, Timeline};

pub fn heading(text: &str) {
    println!("\n{text}\n{}", "-".repeat(text.chars().count()));
}

pub fn say(text: &str) {
    println!("   {text}");
}

pub fn duration(duration: Duration) -> String {
    match duration.as_secs_f64() {
        seconds if seconds < 1.0 => format!("{:.1} ms", seconds * 1000.0),
        seconds => format!("{seconds:.2} s"),
    }
}

/// A line an event, a column a step.
pub fn singles_table(timelines: &[Timeline]) {
    println!(
        "   {:<16}{:>7}{:>7}{:>8}{:>8}{:>7}{:>8}{:>6}{:>8}",
        "", "commit-", "noti-", "", "con-", "in the", "at the", "", "pro-"
    );
    println!(
        "   {:<16}{:>7}{:>7}{:>8}{:>8}{:>7}{:>8}{:>6}{:>8}",
        "event", "ted", "fied", "claimed", "firmed", "queue", "webhook", "2xx", "cessed"
    );
    let widths = [7, 7, 8, 8, 7, 8, 6, 8];
    let line = |name: &str, value: &dyn Fn(Step) -> Option<f64>| {
        let cells = Step::ALL.into_iter().zip(widths).map(|(step, width)| match value(step) {
            Some(ms) => format!("{ms:>width$.1}"),
            None => format!("{:>width$}", "-"),
        });
        println!("   {name:<16}{}", cells.collect::<String>());
    };
    for timeline in timelines {
        line(&timeline.kind, &|step| timeline.steps.get(&step).copied());
    }
    line("median", &|step| percentile(&of(timelines, step), 50));
}

/// A line a step: how many events it is known of, and how long after COMMIT it was.
pub fn steps_table(timelines: &[Timeline]) {
    println!("   {:<34}{:>7}{:>9}{:>9}{:>9}", "ms since COMMIT was sent", "events", "p50", "p95", "max");
    for step in Step::ALL {
        let times = of(timelines, step);
        let at = |percent| percentile(&times, percent).map_or("-".into(), |ms| format!("{ms:.1}"));
        println!("   {:<34}{:>7}{:>9}{:>9}{:>9}", name(step), times.len(), at(50), at(95), at(100));
    }
}

/// Each event's time to the queue, in the order of commit.
pub fn per_event(timelines: &[Timeline]) {
    println!("\n   each event, from COMMIT to the queue, in ms:");
    let times: Vec<f64> = timelines.iter().filter_map(|timeline| timeline.steps.get(&Step::InQueue).copied()).collect();
    for row in times.chunks(12) {
        println!("   {}", row.iter().map(|ms| format!("{ms:>6.1}")).collect::<String>());
    }
}

fn name(step: Step) -> &'static str {
    match step {
        Step::Committed => "committed",
        Step::Notified => "notified (NOTIFY heard)",
        Step::Claimed => "claimed by a relay",
        Step::Confirmed => "confirmed by RabbitMQ",
        Step::InQueue => "received from the queue",
        Step::AtWebhook => "received by the webhook",
        Step::Answered => "answered by the webhook (2xx)",
        Step::Processed => "processed (settled)",
    }
}

fn of(timelines: &[Timeline], step: Step) -> Vec<f64> {
    let mut times: Vec<f64> = timelines.iter().filter_map(|timeline| timeline.steps.get(&step).copied()).collect();
    times.sort_by(f64::total_cmp);
    times
}

/// Of sorted values, the nearest rank.
pub fn percentile(sorted: &[f64], percent: usize) -> Option<f64> {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied()
}

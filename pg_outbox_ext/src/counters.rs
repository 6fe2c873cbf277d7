//! Counters in shared memory, so that statistics never scan a table.

use crate::status::{ByStatus, Counts};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::*};

#[repr(C)]
pub struct Counters {
    pub by_status: Counts,
    pub published: AtomicI64,
    pub processed: AtomicI64,
    pub failed: AtomicI64,
    pub unrouted: AtomicI64,
    pub notifications: AtomicI64,
    latency: [AtomicU64; BUCKETS],
}

/// Four buckets for each power of two of microseconds: a percentile is right to within 19 %.
const BUCKETS: usize = 160;

/// The bucket of a latency in microseconds.
pub fn bucket(micros: i64) -> u8 {
    let v = micros.max(4) as u64;
    let power = 63 - v.leading_zeros() as usize;
    let quarter = (v >> (power - 2)) as usize & 3;
    ((power - 2) * 4 + quarter).min(BUCKETS - 1) as u8
}

/// The middle of a bucket, in seconds.
pub fn middle(bucket: usize) -> f64 {
    let power = bucket / 4 + 2;
    let low = (1u64 << power) as f64 * (1.0 + (bucket % 4) as f64 / 4.0);
    (low + (1u64 << power) as f64 / 8.0) / 1e6
}

impl Counters {
    pub fn reset(&self) {
        self.by_status.set(ByStatus::NONE);
        for total in [&self.published, &self.processed, &self.failed, &self.unrouted, &self.notifications] {
            total.store(0, Relaxed);
        }
        self.latency.iter().for_each(|b| b.store(0, Relaxed));
    }

    pub fn add_latency(&self, bucket: u8) {
        if let Some(b) = self.latency.get(bucket as usize) {
            b.fetch_add(1, Relaxed);
        }
    }

    /// Seconds below which so large a part of the events were processed; none before the first.
    pub fn latency_percentile(&self, part: f64) -> Option<f64> {
        let counts: Vec<u64> = self.latency.iter().map(|b| b.load(Relaxed)).collect();
        percentile(&counts, part).map(middle)
    }
}

fn percentile(counts: &[u64], part: f64) -> Option<usize> {
    let total: u64 = counts.iter().sum();
    let wanted = ((total as f64 * part).ceil() as u64).max(1);
    let mut seen = 0;
    counts.iter().position(|c| {
        seen += c;
        seen >= wanted
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_holds_its_latency_within_a_fifth() {
        for micros in [5, 17, 999, 1_000, 45_678, 3_000_000, 86_400_000_000] {
            let seconds = middle(bucket(micros) as usize);
            assert!((seconds * 1e6 / micros as f64 - 1.0).abs() < 0.19, "{micros} µs came out as {seconds} s");
        }
    }

    #[test]
    fn percentiles_need_an_event() {
        assert_eq!(percentile(&[0, 0], 0.5), None);
        assert_eq!(percentile(&[1, 0, 1], 0.5), Some(0));
        assert_eq!(percentile(&[1, 0, 1], 0.99), Some(2));
    }
}

//! The few statistics that the rows need.

use serde::Serialize;

/// A median with the least and the greatest value beside it.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Spread {
    pub median: f64,
    pub least: f64,
    pub greatest: f64,
}

impl Spread {
    /// None of nothing.
    pub fn of(values: &[f64]) -> Option<Self> {
        let sorted = sorted(values);
        Some(Spread { median: percentile(&sorted, 50.0)?, least: *sorted.first()?, greatest: *sorted.last()? })
    }

    /// Of each pair `a / b`.
    pub fn of_ratios(a: &[f64], b: &[f64]) -> Option<Self> {
        let ratios: Vec<f64> = a.iter().zip(b).map(|(a, b)| a / b).collect();
        Self::of(&ratios)
    }
}

pub fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// Of sorted values, the nearest rank; of an even number's middle, the mean of both.
pub fn percentile(sorted: &[f64], percent: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    if percent == 50.0 {
        return Some((sorted[last / 2] + sorted[sorted.len() / 2]) / 2.0);
    }
    let rank = (sorted.len() as f64 * percent / 100.0).ceil() as usize;
    Some(sorted[rank.clamp(1, sorted.len()) - 1])
}

/// p50, p95, p99 and the greatest, for the raw figures.
pub fn percentiles(values: &[f64]) -> serde_json::Value {
    let sorted = sorted(values);
    let at = |percent| percentile(&sorted, percent);
    serde_json::json!({ "count": sorted.len(), "p50": at(50.0), "p95": at(95.0), "p99": at(99.0), "max": at(100.0) })
}

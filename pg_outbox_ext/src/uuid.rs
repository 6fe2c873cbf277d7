//! UUIDs, version 7.
//!
//! Source: RFC 9562, section 5.7, with method 3 of section 6.2: the twelve bits after the milliseconds hold a fraction of
//! the millisecond, and a backend never makes one that sorts before its last.

use crate::backend::Local;
use pgrx::prelude::*;
use std::time::{SystemTime, UNIX_EPOCH};

/// Nanoseconds of the last one made by this backend.
static LAST: Local<u64> = Local::new(0);

/// 2^12 steps a millisecond: the least difference that shows.
const STEP_NS: u64 = 1_000_000 / 4096 + 1;

fn build(now_ns: u64, random: [u8; 8]) -> [u8; 16] {
    let millis = now_ns / 1_000_000;
    let fraction = (now_ns % 1_000_000 * 4096 / 1_000_000) as u16;
    let mut bytes = [0u8; 16];
    bytes[..6].copy_from_slice(&millis.to_be_bytes()[2..]);
    bytes[6..8].copy_from_slice(&(0x7000 | fraction).to_be_bytes());
    bytes[8..].copy_from_slice(&random);
    bytes[8] = bytes[8] & 0x3f | 0x80;
    bytes
}

/// A new one, later in order than any this backend made before.
#[pg_extern(volatile, parallel_safe)]
fn uuid_v7() -> pgrx::Uuid {
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
    let now = LAST.with(|last| {
        *last = clock.max(*last + STEP_NS);
        *last
    });
    let mut random = [0u8; 8];
    // SAFETY: the buffer is eight bytes long.
    if !unsafe { pg_sys::pg_strong_random(random.as_mut_ptr().cast(), random.len()) } {
        error!("could not generate random values");
    }
    pgrx::Uuid::from_bytes(build(now, random))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_and_variant_are_where_the_standard_wants_them() {
        let uuid = build(1_700_000_000_123_456_789, [0xff; 8]);
        assert_eq!(uuid[6] >> 4, 7);
        assert_eq!(uuid[8] >> 6, 0b10);
        assert_eq!(u64::from_be_bytes([0, 0, uuid[0], uuid[1], uuid[2], uuid[3], uuid[4], uuid[5]]), 1_700_000_000_123);
    }

    #[test]
    fn one_step_later_sorts_later() {
        let at = 1_700_000_000_999_999_999;
        assert!(build(at + STEP_NS, [0; 8]) > build(at, [0xff; 8]));
    }
}

//! What came of a check.

use serde::{Deserialize, Serialize};

/// What came of it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Report {
    /// Everything was read as it was written.
    pub ok: bool,
    /// Requests done, the final reading not counted.
    pub requests: u64,
    /// Of these, reads.
    pub reads: u64,
    /// Of these, writes.
    pub writes: u64,
    /// Of these, flushes.
    pub flushes: u64,
    /// Bytes read by them.
    pub bytes_read: u64,
    /// Bytes written by them.
    pub bytes_written: u64,
    /// How long they took.
    pub seconds: f64,
    /// Requests per second.
    pub iops: f64,
    /// Million bytes per second, both ways together.
    pub mb_per_s: f64,
    /// Median latency in microseconds.
    pub p50_us: f64,
    /// 99 of 100 were below, in microseconds.
    pub p99_us: f64,
    /// The longest, in microseconds.
    pub max_us: f64,
    /// Bytes that were read once more at the end.
    pub final_bytes: u64,
    /// SHA-256 of those bytes, in the disk's order.
    pub sha256: String,
    /// What it must be.
    pub sha256_expected: String,
    /// Cells that did not hold what they must.
    pub mismatches: u64,
    /// The first of them.
    pub first_mismatches: Vec<String>,
    /// How often the disk was attached: more than once if its driver domain was restarted.
    pub sessions: u32,
    /// It was ended before its time.
    pub stopped: bool,
}

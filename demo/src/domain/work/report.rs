//! The result of a check.

use serde::{Deserialize, Serialize};

/// The result of a check.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Report {
    /// All data was read as it was written.
    pub ok: bool,
    /// Number of completed requests, without the final pass.
    pub requests: u64,
    /// Number of reads among them.
    pub reads: u64,
    /// Number of writes among them.
    pub writes: u64,
    /// Number of flushes among them.
    pub flushes: u64,
    /// Number of bytes read by them.
    pub bytes_read: u64,
    /// Number of bytes written by them.
    pub bytes_written: u64,
    /// Their duration in seconds.
    pub seconds: f64,
    /// Requests per second.
    pub iops: f64,
    /// Megabytes (10^6 bytes) per second, reads and writes together.
    pub mb_per_s: f64,
    /// Median latency in microseconds.
    pub p50_us: f64,
    /// 99th percentile of the latency in microseconds.
    pub p99_us: f64,
    /// Maximum latency in microseconds.
    pub max_us: f64,
    /// Number of bytes read in the final pass.
    pub final_bytes: u64,
    /// SHA-256 of those bytes, ordered by cell.
    pub sha256: String,
    /// The expected SHA-256.
    pub sha256_expected: String,
    /// Number of cells with unexpected contents.
    pub mismatches: u64,
    /// Descriptions of the first of them.
    pub first_mismatches: Vec<String>,
    /// Number of sessions: more than one if the driver domain was restarted.
    pub sessions: u32,
    /// The check was stopped before it was complete.
    pub stopped: bool,
}

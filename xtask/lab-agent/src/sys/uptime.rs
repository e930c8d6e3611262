//! Seconds since this domain's kernel started.

use std::fs;

/// Returns the uptime to a hundredth of a second; 0 if `/proc` is not mounted.
pub fn seconds() -> f64 {
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    text.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or_default()
}

//! Timeouts and polling under emulation.

use std::time::{Duration, Instant};

use anyhow::Result;

/// Timeout of a short operation under emulation.
pub const SHORT: Duration = Duration::from_secs(40);
/// Timeout of any single step under emulation.
pub const LONG: Duration = Duration::from_secs(120);

/// Polls a condition; returns false on a timeout.
///
/// # Errors
/// The first error of `there`.
pub fn wait_until(patience: Duration, mut there: impl FnMut() -> Result<bool>) -> Result<bool> {
    let start = Instant::now();
    loop {
        if there()? {
            return Ok(true);
        }
        if start.elapsed() > patience {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

//! Waiting under emulation.

use std::time::{Duration, Instant};

use anyhow::Result;

/// Longer than anything quick takes under emulation.
pub const SHORT: Duration = Duration::from_secs(40);
/// Longer than any single step takes under emulation.
pub const LONG: Duration = Duration::from_secs(120);

/// Tries until something is so; false if it is not so in time.
///
/// # Errors
/// The first of `there`.
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

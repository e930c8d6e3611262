//! A guest beside one of two neighbours.

use crate::row::{Row, paired};
use anyhow::Result;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Duration of a run beside one neighbour.
pub const SLICE: Duration = Duration::from_millis(500);
/// How long a neighbour runs before the measurement begins.
const LEAD: Duration = Duration::from_millis(100);

/// Runs `measured` while `neighbour` runs on another thread, until its argument is set.
///
/// # Errors
/// Of either.
pub fn beside<T>(
    measured: impl FnOnce() -> Result<T>,
    neighbour: impl FnOnce(&AtomicBool) -> Result<()> + Send,
) -> Result<T> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| neighbour(&stop));
        std::thread::sleep(LEAD);
        let result = measured();
        stop.store(true, Ordering::Relaxed);
        let ended =
            thread.join().unwrap_or_else(|_| Err(anyhow::anyhow!("the neighbour panicked")));
        ended.and(result)
    })
}

/// Measures a guest beside two neighbours alternately.
///
/// # Errors
/// Of a run.
pub fn compare(
    case: &str,
    unit: &str,
    runs: usize,
    mut rate: impl FnMut(Side) -> Result<f64>,
) -> Result<Row> {
    let pairs: Result<Vec<_>> =
        (0..runs).map(|_| Ok((rate(Side::Hostile)?, rate(Side::Honest)?))).collect();
    Ok(paired("neighbours", case, "honest neighbour", unit, &pairs?))
}

/// Which neighbour runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    Hostile,
    Honest,
}

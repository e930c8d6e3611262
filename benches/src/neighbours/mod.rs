//! Neighbours: the throughput of a guest beside a hostile guest, compared with its throughput beside
//! an honest one that is as busy.
//!
//! All guests' frontends run on one core, all backends on the other. Disks are served by a driver
//! domain with a process for each of them, as `pvio run` starts it. NICs are served by threads of
//! this process. The two neighbours run alternately.
//!
//! Must run in its own network namespace, with the permission to create interfaces.

mod disk;
mod machine;

use crate::net;
use crate::row::{Row, paired};
use anyhow::Result;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Duration of a run beside one neighbour.
pub(crate) const SLICE: Duration = Duration::from_millis(500);
/// How long a neighbour runs before the measurement begins.
const LEAD: Duration = Duration::from_millis(100);

/// Measures every case whose name contains `only`, with `runs` pairs each.
///
/// # Errors
/// `pvio` is not beside this program, or a device cannot be set up.
pub fn run(dir: &Path, runs: usize, only: &str) -> Result<Vec<Row>> {
    let mut rows = disk::run(dir, runs, only)?;
    rows.extend(net::beside::run(dir, runs, only)?);
    Ok(rows)
}

/// Runs `measured` while `neighbour` runs on another thread, which is told to stop by its argument.
///
/// # Errors
/// Of either.
pub(crate) fn beside<T>(
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
pub(crate) fn compare(
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
pub(crate) enum Side {
    Hostile,
    Honest,
}

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
pub(crate) mod pairs;

use crate::net;
use crate::row::Row;
use anyhow::Result;
use std::path::Path;

/// Measures every case whose name contains `only`, with `runs` pairs each.
///
/// # Errors
/// `pvio` is not beside this program, or a device cannot be set up.
pub fn run(dir: &Path, runs: usize, only: &str) -> Result<Vec<Row>> {
    let mut rows = disk::run(dir, runs, only)?;
    rows.extend(net::beside::run(dir, runs, only)?);
    Ok(rows)
}

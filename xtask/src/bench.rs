//! `cargo xtask bench`: pvio beside its references, as a table and as JSON.

use std::path::Path;

use anyhow::{Result, bail};
use clap::ValueEnum;

/// A suite of `pvio-bench`.
#[derive(Clone, Copy, ValueEnum)]
pub enum Suite {
    /// Virtual disks beside raw io_uring.
    Disk,
    /// Virtual NICs beside a raw tap.
    Net,
    /// Rings beside a ring written in C.
    Ring,
}

/// todo
pub fn run(_suite: Suite, _json: Option<&Path>) -> Result<bool> {
    bail!("todo")
}

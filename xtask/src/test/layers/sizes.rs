//! Source files have a maximum length.

use std::fs;

use anyhow::{Context, Result};

use super::Package;
use super::homes::relative;
use super::source;

/// Maximum number of lines of a source file.
const MOST: usize = 500;

/// Returns all source files that are longer.
pub fn check(packages: &[Package]) -> Result<Vec<String>> {
    let mut faults = Vec::new();
    for package in packages {
        for file in source::files(&package.dir)? {
            let text = fs::read_to_string(&file).with_context(|| relative(&file))?;
            let lines = text.lines().count();
            if lines > MOST {
                faults.push(format!("{}: {lines} lines, {MOST} at most", relative(&file)));
            }
        }
    }
    faults.dedup();
    Ok(faults)
}

//! xenstore, by Xen's own tools.

use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::lab::wait_until;
use crate::sys;

const QUICK: Duration = Duration::from_secs(20);

/// A node's value.
///
/// # Errors
/// xenstored does not answer.
pub fn read(path: &str) -> Result<Option<String>> {
    let ran = sys::run(&["xenstore-read", path], QUICK)?;
    Ok(ran.status.success().then(|| ran.output.trim_end_matches('\n').to_owned()))
}

/// Sets a node.
///
/// # Errors
/// xenstored refuses.
pub fn write(path: &str, value: &str) -> Result<()> {
    sys::succeed(&["xenstore-write", "--", path, value], QUICK).map(drop)
}

/// Says whose a node is and who may read it, as `xenstore-chmod` has it.
///
/// # Errors
/// xenstored refuses.
pub fn allow(path: &str, who: &[String]) -> Result<()> {
    let words: Vec<&str> = who.iter().map(String::as_str).collect();
    sys::succeed(&[&["xenstore-chmod", path], words.as_slice()].concat(), QUICK).map(drop)
}

/// Removes a node and all below it.
///
/// # Errors
/// xenstored refuses.
pub fn remove(path: &str) -> Result<()> {
    sys::succeed(&["xenstore-rm", path], QUICK).map(drop)
}

/// The names below a node, none if there is no such node.
///
/// # Errors
/// xenstored does not answer.
pub fn list(path: &str) -> Result<Vec<String>> {
    let ran = sys::run(&["xenstore-list", path], QUICK)?;
    if !ran.status.success() {
        return Ok(Vec::new());
    }
    Ok(ran.output.lines().map(str::to_owned).collect())
}

/// Removes the node above one that was removed, if nothing else is below it.
///
/// # Errors
/// xenstored does not answer.
pub fn remove_empty(path: &str) -> Result<()> {
    match path.rsplit_once('/') {
        Some((above, _)) if list(above)?.is_empty() => remove(above),
        _ => Ok(()),
    }
}

/// Waits until a node has one of these values.
///
/// # Errors
/// It does not get there; the text says what it had.
pub fn wait_for(path: &str, values: &[&str], patience: Duration) -> Result<()> {
    let mut last = None;
    let there = wait_until(patience, || {
        last = read(path)?;
        Ok(last.as_deref().is_some_and(|value| values.contains(&value)))
    })?;
    if !there {
        bail!("{path} is {last:?} instead of {values:?} after {} s", patience.as_secs());
    }
    Ok(())
}

/// A node's value, which must be there.
///
/// # Errors
/// It is not.
pub fn must_read(path: &str) -> Result<String> {
    read(path)?.with_context(|| format!("there is no {path}"))
}

//! xenstore, through pvio's client and Xen's own xenstored. Starting one of Xen's tools takes 200
//! ms under emulation, and a scenario has a hundred requests.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use pvio_xenbus::Xenstore;
use pvio_xenbus::client::{Client, default_path};
use pvio_xenbus::wire::Perm;

use super::wait::wait_until;

/// Connects for a single use. That is fast, and no connection can become stale.
fn store() -> Result<Client> {
    let path = default_path();
    Client::connect(&path).with_context(|| path.display().to_string())
}

/// Returns a node's value.
///
/// # Errors
/// The request fails.
pub fn read(path: &str) -> Result<Option<String>> {
    let value = store()?.read_opt(path)?;
    Ok(value.map(|value| String::from_utf8_lossy(&value).into_owned()))
}

/// Writes a node.
///
/// # Errors
/// The request fails.
pub fn write(path: &str, value: &str) -> Result<()> {
    Ok(store()?.write(path, value.as_bytes())?)
}

/// Sets the permissions of a node, in the format `n0`, `r3`.
///
/// # Errors
/// The request fails.
pub fn allow(path: &str, who: &[String]) -> Result<()> {
    let perms: Result<Vec<_>, _> = who.iter().map(|word| Perm::parse(word.as_bytes())).collect();
    Ok(store()?.set_perms(path, &perms?)?)
}

/// Removes a node and everything below it.
///
/// # Errors
/// The request fails.
pub fn remove(path: &str) -> Result<()> {
    Ok(store()?.rm(path)?)
}

/// Returns the names below a node; empty if the node does not exist.
///
/// # Errors
/// The request fails.
pub fn list(path: &str) -> Result<Vec<String>> {
    match store()?.directory(path) {
        Err(error) if error.is_not_found() => Ok(Vec::new()),
        names => Ok(names?),
    }
}

/// Returns the domain of that name in `xl`.
///
/// # Errors
/// The request fails.
pub fn domain(name: &str) -> Result<Option<u32>> {
    for domain in list("/local/domain")? {
        if read(&format!("/local/domain/{domain}/name"))?.as_deref() == Some(name) {
            return Ok(Some(domain.parse()?));
        }
    }
    Ok(None)
}

/// Removes the parent of a removed node if it is empty.
///
/// # Errors
/// The request fails.
pub fn remove_empty(path: &str) -> Result<()> {
    match path.rsplit_once('/') {
        Some((above, _)) if list(above)?.is_empty() => remove(above),
        _ => Ok(()),
    }
}

/// Waits until a node has one of these values.
///
/// # Errors
/// It has another value after the timeout; the text says which.
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

/// Returns the value of a node that must exist.
///
/// # Errors
/// It does not exist.
pub fn must_read(path: &str) -> Result<String> {
    read(path)?.with_context(|| format!("there is no {path}"))
}

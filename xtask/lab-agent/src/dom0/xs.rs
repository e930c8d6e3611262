//! xenstore, as pvio's client asks Xen's own xenstored: to start one of Xen's tools takes a fifth of a
//! second here, and a scenario asks a hundred times.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use pvio_xenbus::Xenstore;
use pvio_xenbus::client::{Client, default_path};
use pvio_xenbus::wire::Perm;

use super::wait::wait_until;

/// A connection for as long as it is used: none is there to break, and xenstored makes one in no time.
fn store() -> Result<Client> {
    let path = default_path();
    Client::connect(&path).with_context(|| path.display().to_string())
}

/// A node's value.
///
/// # Errors
/// xenstored does not answer.
pub fn read(path: &str) -> Result<Option<String>> {
    let value = store()?.read_opt(path)?;
    Ok(value.map(|value| String::from_utf8_lossy(&value).into_owned()))
}

/// Sets a node.
///
/// # Errors
/// xenstored refuses.
pub fn write(path: &str, value: &str) -> Result<()> {
    Ok(store()?.write(path, value.as_bytes())?)
}

/// Says whose a node is and who may read it, in words like `n0` and `r3`.
///
/// # Errors
/// xenstored refuses.
pub fn allow(path: &str, who: &[String]) -> Result<()> {
    let perms: Result<Vec<_>, _> = who.iter().map(|word| Perm::parse(word.as_bytes())).collect();
    Ok(store()?.set_perms(path, &perms?)?)
}

/// Removes a node and all below it.
///
/// # Errors
/// xenstored refuses.
pub fn remove(path: &str) -> Result<()> {
    Ok(store()?.rm(path)?)
}

/// The names below a node, none if there is no such node.
///
/// # Errors
/// xenstored does not answer.
pub fn list(path: &str) -> Result<Vec<String>> {
    match store()?.directory(path) {
        Err(error) if error.is_not_found() => Ok(Vec::new()),
        names => Ok(names?),
    }
}

/// The domain of a name, as `xl` gave it.
///
/// # Errors
/// xenstored does not answer.
pub fn domain(name: &str) -> Result<Option<u32>> {
    for domain in list("/local/domain")? {
        if read(&format!("/local/domain/{domain}/name"))?.as_deref() == Some(name) {
            return Ok(Some(domain.parse()?));
        }
    }
    Ok(None)
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

//! Restores the configuration of dom0 after a scenario, whatever its result.

use std::fs;

use anyhow::{Context, Result};

use crate::dom0::lab::SHORT;
use crate::sys;

/// Actions that are executed on drop, in reverse order.
#[derive(Default)]
pub struct Undo(Vec<Box<dyn FnOnce()>>);

impl Undo {
    /// Runs `ip` with `words`, and on drop with `later`.
    ///
    /// # Errors
    /// `ip` fails.
    pub fn ip(&mut self, words: &str, later: &str) -> Result<()> {
        ip(words)?;
        let later = later.to_owned();
        self.later(move || {
            if let Err(error) = ip(&later) {
                println!("PVIO-LAB undo: {error:#}");
            }
        });
        Ok(())
    }

    /// Writes a value to a file of `/proc/sys`, and restores the old one on drop.
    ///
    /// # Errors
    /// The file does not exist, or the write fails.
    pub fn sysctl(&mut self, path: &str, value: &str) -> Result<()> {
        let path = format!("/proc/sys/{path}");
        let before = fs::read_to_string(&path).with_context(|| path.clone())?;
        fs::write(&path, value).with_context(|| path.clone())?;
        self.later(move || {
            let _ = fs::write(path, before);
        });
        Ok(())
    }

    /// Registers an action for the drop.
    pub fn later(&mut self, what: impl FnOnce() + 'static) {
        self.0.push(Box::new(what));
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        while let Some(what) = self.0.pop() {
            what();
        }
    }
}

/// Runs `ip` with these arguments.
///
/// # Errors
/// It fails.
pub fn ip(words: &str) -> Result<String> {
    let words: Vec<_> = std::iter::once("ip").chain(words.split(' ')).collect();
    sys::succeed(&words, SHORT)
}

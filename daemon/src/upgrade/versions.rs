//! The versions that two binaries must have in common.

use crate::failure::{Failure, say};
use crate::process::messages::{OLDEST_VERSION, VERSION};
use pvio_ring::inflight::{CURRENT_RECORD, OLDEST_RECORD};
use serde::{Deserialize, Serialize};
use std::io::{self, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The hidden command that prints the versions, after `process`.
pub const COMMAND: &str = "probe";
/// How long a binary may take to print them.
const TIMEOUT: Duration = Duration::from_secs(3);
const POLL_INTERVAL: Duration = Duration::from_millis(5);
/// Maximum length of what it prints.
const MAX_LEN: u64 = 4096;

/// A version, and the oldest one that is understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Understood {
    /// The version that is written.
    pub current: u64,
    /// The oldest one that is read.
    pub oldest: u64,
}

impl Understood {
    const fn includes(self, other: u64) -> bool {
        self.oldest <= other && other <= self.current
    }
}

/// The versions of a binary.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Versions {
    /// That of pvio.
    pub pvio: String,
    /// Messages between supervisor and device processes.
    pub messages: Understood,
    /// In-flight records.
    pub records: Understood,
}

impl Versions {
    /// Returns those of this binary.
    #[must_use]
    pub fn own() -> Self {
        Self {
            pvio: env!("CARGO_PKG_VERSION").into(),
            messages: Understood { current: VERSION.into(), oldest: OLDEST_VERSION.into() },
            records: Understood { current: CURRENT_RECORD, oldest: OLDEST_RECORD },
        }
    }

    /// Checks whether a binary of these versions can continue the work of one of `old`.
    ///
    /// # Errors
    /// The reason.
    pub fn follow(&self, old: &Self) -> Result<(), String> {
        let checks = [
            ("messages to device processes", self.messages, old.messages),
            ("in-flight records", self.records, old.records),
        ];
        for (what, new, old) in checks {
            if !new.includes(old.current) {
                return Err(format!(
                    "it is not compatible: {what} have version {} here, and it supports {} to {}",
                    old.current, new.oldest, new.current
                ));
            }
        }
        Ok(())
    }
}

/// Prints the versions of this binary.
pub fn print() {
    say!("{}", serde_json::json!(Versions::own()));
}

/// Runs a binary and checks whether it can take the place of this one.
///
/// # Errors
/// It cannot be run, prints no versions, or is not compatible.
pub fn probe(binary: &Path) -> Result<Versions, Failure> {
    let failed = |why: String| {
        let what = format!("{} cannot replace the running pvio: {why}", binary.display());
        Failure::input(what, "name a pvio of this version or the next one; nothing was changed")
    };
    let mut command = Command::new(binary);
    command.args(["process", COMMAND]).env_clear().current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(|e| failed(format!("it cannot be run: {e}")))?;
    let ended = wait(&mut child);
    let _ = child.kill();
    let _ = child.wait();
    ended.map_err(|e| failed(format!("it does not print its versions: {e}")))?;
    let mut text = String::new();
    // Only this process and the ended one had the pipe, unless that left a child.
    let out = child.stdout.take();
    let read = out.map(|out| out.take(MAX_LEN).read_to_string(&mut text));
    read.transpose().map_err(|e| failed(format!("it does not print its versions: {e}")))?;
    let versions: Versions = serde_json::from_str(text.trim())
        .map_err(|e| failed(format!("it does not print its versions: {e}")))?;
    versions.follow(&Versions::own()).map_err(failed)?;
    Ok(versions)
}

fn wait(child: &mut Child) -> io::Result<()> {
    let until = Instant::now() + TIMEOUT;
    loop {
        match child.try_wait()? {
            Some(status) if status.success() => return Ok(()),
            Some(status) => return Err(io::Error::other(status.to_string())),
            None if Instant::now() >= until => return Err(io::ErrorKind::TimedOut.into()),
            None => std::thread::sleep(POLL_INTERVAL),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_messages(current: u64, oldest: u64) -> Versions {
        Versions { messages: Understood { current, oldest }, ..Versions::own() }
    }

    #[test]
    fn binary_follows_its_own_version_and_the_previous_one() {
        let old = with_messages(4, 3);
        old.follow(&old).unwrap();
        with_messages(5, 4).follow(&old).unwrap();
        let refused = with_messages(6, 5).follow(&old).unwrap_err();
        assert!(refused.contains("version 4") && refused.contains("5 to 6"), "{refused}");
        with_messages(3, 2).follow(&old).unwrap_err();
    }

    #[test]
    fn binary_without_versions_is_refused() {
        let refused = probe(Path::new("/bin/true")).unwrap_err();
        assert!(refused.what.contains("does not print its versions"), "{refused}");
        let refused = probe(Path::new("/bin/false")).unwrap_err();
        assert!(refused.what.contains("exit status: 1"), "{refused}");
        let refused = probe(Path::new("/nonexistent")).unwrap_err();
        assert!(refused.what.contains("cannot be run"), "{refused}");
    }
}

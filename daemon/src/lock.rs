//! One daemon for each kind of backend of a domain: a file lock, which the kernel releases however
//! its holder ends.

use crate::failure::Failure;
use pvio_recordfile::PrivateDir;
use pvio_xenbus::handshake::common::BackendKind;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::time::{Duration, Instant};

/// How long to wait for the locks of a daemon that was stopped or killed and is still ending.
const HANDOVER_TIMEOUT: Duration = Duration::from_secs(3);
/// Interval between two attempts to take a lock.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

/// The guests whose devices a daemon serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// All guests: no other daemon may serve the same kinds.
    AllGuests,
    /// One guest: other daemons may serve the same kinds for other guests.
    OneGuest,
}

/// The locks of a daemon, released when this is dropped.
#[derive(Debug)]
pub struct ServiceLock {
    _files: Vec<File>,
}

impl ServiceLock {
    /// Takes the lock of each kind, in a directory that all daemons of the domain share.
    ///
    /// # Errors
    /// Another process holds one of them (the text has its process id), or the file cannot be
    /// created.
    pub fn take(folder: &Path, kinds: &[BackendKind], scope: Scope) -> Result<Self, Failure> {
        Self::take_with_timeout(folder, kinds, scope, HANDOVER_TIMEOUT)
    }

    fn take_with_timeout(
        folder: &Path,
        kinds: &[BackendKind],
        scope: Scope,
        timeout: Duration,
    ) -> Result<Self, Failure> {
        let dir = PrivateDir::create(folder).map_err(|e| Failure::of(e).as_input())?;
        let deadline = Instant::now() + timeout;
        let lock = |kind: &BackendKind| lock_kind(&dir, *kind, scope, deadline);
        Ok(Self { _files: kinds.iter().map(lock).collect::<Result<_, _>>()? })
    }
}

fn lock_kind(
    dir: &PrivateDir,
    kind: BackendKind,
    scope: Scope,
    deadline: Instant,
) -> Result<File, Failure> {
    let name = format!("{}.lock", kind.as_str());
    let failed = |e: std::io::Error| {
        let path = dir.path().join(&name);
        Failure::new(format!("the lock {} cannot be taken: {e}", path.display()), "")
    };
    let mut file = dir.read_write(&name).map_err(failed)?;
    let operation = match scope {
        Scope::AllGuests => FlockOperation::NonBlockingLockExclusive,
        Scope::OneGuest => FlockOperation::NonBlockingLockShared,
    };
    loop {
        match flock(&file, operation) {
            Ok(()) => break,
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => {
                std::thread::sleep(RETRY_INTERVAL)
            }
            Err(Errno::WOULDBLOCK) => return Err(already_locked(&mut file, kind)),
            Err(why) => return Err(failed(why.into())),
        }
    }
    // For the error message of later daemons. Only the lock counts, not the content.
    file.set_len(0).map_err(failed)?;
    writeln!(file, "{}", std::process::id()).map_err(failed)?;
    Ok(file)
}

fn already_locked(file: &mut File, kind: BackendKind) -> Failure {
    let mut holder = String::new();
    let _ = file.take(16).read_to_string(&mut holder);
    let (kind, holder) = (kind.as_str(), holder.trim());
    let who =
        if holder.is_empty() { "another process".into() } else { format!("process {holder}") };
    Failure::input(
        format!("{kind} devices of this domain cannot be served: {who} serves them already"),
        "stop that process first (with --on-stop leave, its guests keep their devices), or serve other kinds with --kinds",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use BackendKind::{Qdisk, Vbd, Vif};
    use std::process::{Command, Stdio};

    const NO_WAIT: Duration = Duration::ZERO;

    #[test]
    fn second_daemon_of_same_kind_is_rejected_naming_process_of_first() {
        let dir = tempfile::tempdir().unwrap();
        let take = |kinds: &[_]| {
            ServiceLock::take_with_timeout(dir.path(), kinds, Scope::AllGuests, NO_WAIT)
        };
        let first = take(&[Vbd, Qdisk]).unwrap();
        let refused = take(&[Vif, Vbd]).unwrap_err();
        let number = format!("process {}", std::process::id());
        assert!(refused.what.contains(&number) && refused.what.contains("vbd"), "{refused}");
        // The refused daemon released the lock it had taken, and one that serves other kinds may
        // start.
        let second = take(&[Vif]).unwrap();
        drop(first);
        take(&[Vbd]).unwrap();
        drop(second);
    }

    #[test]
    fn device_models_share_lock_of_kind_but_exclude_daemon_of_all_guests() {
        let dir = tempfile::tempdir().unwrap();
        let take = |scope| ServiceLock::take_with_timeout(dir.path(), &[Qdisk], scope, NO_WAIT);
        let models = [take(Scope::OneGuest).unwrap(), take(Scope::OneGuest).unwrap()];
        take(Scope::AllGuests).unwrap_err();
        drop(models);
        let _daemon = take(Scope::AllGuests).unwrap();
        take(Scope::OneGuest).unwrap_err();
    }

    #[test]
    fn lock_of_killed_daemon_is_free_regardless_of_file_content() {
        let dir = tempfile::tempdir().unwrap();
        let take =
            |timeout| ServiceLock::take_with_timeout(dir.path(), &[Vbd], Scope::AllGuests, timeout);
        drop(take(NO_WAIT).unwrap());
        let file = dir.path().join("vbd.lock");
        // Takes the lock as a daemon does, and then writes a line.
        let mut other = Command::new("flock");
        other.arg(&file).args(["sh", "-c", "echo; exec cat"]);
        let child = other.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let Ok(mut child) = child else { return eprintln!("SKIPPED: install util-linux (flock)") };
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        take(NO_WAIT).unwrap_err();
        child.kill().unwrap();
        child.wait().unwrap();
        // The child process that `flock` ran holds the lock until its input ends.
        drop(child);
        take(Duration::from_secs(60)).unwrap();
    }
}

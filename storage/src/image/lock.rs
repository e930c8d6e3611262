//! Locks on image files, to prevent two programs from writing one.
//!
//! Two kinds are used together: `flock`, against other processes of this program; and the
//! byte-range locks of QEMU and its tools (`block/file-posix.c`), against `qemu-img`, `qemu-nbd`
//! and QEMU itself. The latter are open-file-description locks, all of them shared: one byte from
//! 100 on for each permission that a user needs, and one byte from 200 on for each permission that
//! it does not share. A user releases its locks and fails if a permission that it needs is unshared
//! by others, or the other way round.

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc::{F_RDLCK, F_UNLCK, F_WRLCK, SEEK_SET, flock as Range};
use rustix::fs::{FlockOperation, flock};
use std::fs::File;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

/// The purpose for which an image is opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Use {
    /// For reading, without concurrent writers.
    Read,
    /// For writing, without other writers.
    Write,
}

/// `RAW_LOCK_PERM_BASE`: permissions in use.
const DOES: i64 = 100;
/// `RAW_LOCK_SHARED_BASE`: permissions that others must not use.
const FORBIDS: i64 = 200;
/// Bit numbers of `BLK_PERM_CONSISTENT_READ`, `BLK_PERM_WRITE` and `BLK_PERM_RESIZE`.
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// Time for which a closed file may still appear locked. A program that any thread of this process
/// starts inherits all descriptors, and with them the locks, from fork until exec; descriptors
/// closed in the meantime release their locks only then.
const AFTERLIFE: Duration = Duration::from_millis(200);
const AGAIN: Duration = Duration::from_millis(5);

/// Locks a file that was just opened, until it is closed.
///
/// # Errors
/// [`io::ErrorKind::WouldBlock`] if the file is in conflicting use for longer than a moment.
pub(super) fn lock(file: &File, how: Use) -> io::Result<()> {
    let start = Instant::now();
    loop {
        match try_lock(file, how) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                // Released, so that another process that tries at the same time does not fail
                // because of this attempt.
                let_go(file)?;
                if start.elapsed() > AFTERLIFE {
                    return Err(error);
                }
                thread::sleep(AGAIN);
            }
            outcome => return outcome,
        }
    }
}

fn try_lock(file: &File, how: Use) -> io::Result<()> {
    let operation = match how {
        Use::Read => FlockOperation::NonBlockingLockShared,
        Use::Write => FlockOperation::NonBlockingLockExclusive,
    };
    flock(file, operation)?;
    let does: &[i64] = match how {
        Use::Read => &[CONSISTENT_READ],
        Use::Write => &[CONSISTENT_READ, WRITE, RESIZE],
    };
    let forbids = [WRITE, RESIZE];
    // Locks first and checks afterwards: of two concurrent users at least one sees the other.
    for byte in does.iter().map(|b| DOES + b).chain(forbids.iter().map(|b| FORBIDS + b)) {
        set(file, byte)?;
    }
    for byte in does.iter().map(|b| FORBIDS + b).chain(forbids.iter().map(|b| DOES + b)) {
        if is_locked(file, byte)? {
            return Err(io::ErrorKind::WouldBlock.into());
        }
    }
    Ok(())
}

/// The use of a file, as far as locks show it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LockState {
    /// Not in use.
    Free,
    /// In use by a reader.
    Read,
    /// In use by a writer.
    Written,
}

/// Returns the use of a file by QEMU, its tools, and this crate, without taking a lock.
///
/// # Errors
/// The system's error.
pub(super) fn query(file: &File) -> io::Result<LockState> {
    if is_locked(file, DOES + WRITE)? {
        return Ok(LockState::Written);
    }
    let read = is_locked(file, DOES + CONSISTENT_READ)? || is_locked(file, FORBIDS + WRITE)?;
    Ok(if read { LockState::Read } else { LockState::Free })
}

fn range(kind: i32, byte: i64) -> Range {
    Range { l_type: kind as i16, l_whence: SEEK_SET as i16, l_start: byte, l_len: 1, l_pid: 0 }
}

/// Returns whether the file system has no such locks; QEMU does without them in that case as well.
fn has_none(error: Errno) -> bool {
    matches!(error, Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::EINVAL | Errno::ENOSYS)
}

fn set(file: &File, byte: i64) -> io::Result<()> {
    match fcntl(file, FcntlArg::F_OFD_SETLK(&range(F_RDLCK, byte))) {
        Ok(_) => Ok(()),
        Err(Errno::EAGAIN | Errno::EACCES) => Err(io::ErrorKind::WouldBlock.into()),
        Err(e) if has_none(e) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// Releases both kinds of locks.
fn let_go(file: &File) -> io::Result<()> {
    flock(file, FlockOperation::Unlock)?;
    // Length 0 means all bytes.
    let all = Range { l_len: 0, ..range(F_UNLCK, 0) };
    match fcntl(file, FcntlArg::F_OFD_SETLK(&all)) {
        Err(e) if !has_none(e) => Err(e.into()),
        _ => Ok(()),
    }
}

fn is_locked(file: &File, byte: i64) -> io::Result<bool> {
    let mut found = range(F_WRLCK, byte);
    match fcntl(file, FcntlArg::F_OFD_GETLK(&mut found)) {
        Ok(_) => Ok(i32::from(found.l_type) != F_UNLCK),
        Err(e) if has_none(e) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lock_of_exiting_holder_is_waited_for() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(file.path()).unwrap();
        for (theirs, ours) in [(Use::Write, Use::Write), (Use::Read, Use::Write)] {
            let (them, us) = (open(), open());
            lock(&them, theirs).unwrap();
            let error = lock(&us, ours).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
            // The failed attempt leaves no lock.
            let_go(&them).unwrap();
            assert_eq!(query(&open()).unwrap(), LockState::Free);
            lock(&them, theirs).unwrap();
            let leaver = thread::spawn(move || {
                thread::sleep(AFTERLIFE / 4);
                drop(them);
            });
            lock(&us, ours).unwrap();
            leaver.join().unwrap();
        }
    }
}

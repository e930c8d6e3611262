//! Locks on image files, so that no two programs write one.
//!
//! Two kinds at a time: `flock`, which holds off other servers of this kind; and the byte locks that
//! QEMU and its tools take (`block/file-posix.c`), which hold off, and are held off by, `qemu-img`,
//! `qemu-nbd` and QEMU itself. Those are open-file-description locks, all of them shared: one
//! byte from 100 on for each thing a user does, one from 200 on for each thing it does not want
//! others to do. A user who finds its deeds locked by others' wishes, or the other way round, lets go.

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc::{F_RDLCK, F_UNLCK, F_WRLCK, SEEK_SET, flock as Range};
use rustix::fs::{FlockOperation, flock};
use std::fs::File;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

/// What an image is opened for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Use {
    /// To be read while nobody writes.
    Read,
    /// To be written while nobody else does.
    Write,
}

/// `RAW_LOCK_PERM_BASE`: what is done.
const DOES: i64 = 100;
/// `RAW_LOCK_SHARED_BASE`: what others may not do.
const FORBIDS: i64 = 200;
/// `BLK_PERM_CONSISTENT_READ`, `BLK_PERM_WRITE`, `BLK_PERM_RESIZE` by number of bit.
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// For how long a file's last user may still seem to be there. A program that any thread of ours starts
/// has all our descriptors, and with them the locks, from its birth until it is executed: what
/// was closed meanwhile is let go only then.
const AFTERLIFE: Duration = Duration::from_millis(200);
const AGAIN: Duration = Duration::from_millis(5);

/// Locks a file that was just opened until it is closed.
///
/// # Errors
/// [`io::ErrorKind::WouldBlock`] when somebody uses it otherwise, and not just for a moment.
pub(super) fn lock(file: &File, how: Use) -> io::Result<()> {
    let start = Instant::now();
    loop {
        match try_lock(file, how) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                // Another that tries at the same time must not see us try.
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
    // First told, then looked: of two at the same moment at least one sees the other.
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

/// Who uses a file, as far as locks tell.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LockState {
    /// Nobody.
    Free,
    /// Somebody reads it.
    Read,
    /// Somebody writes it.
    Written,
}

/// Who uses a file, looked up without taking a lock oneself: QEMU and its tools, and this crate.
///
/// # Errors
/// What the system says.
pub(super) fn look(file: &File) -> io::Result<LockState> {
    if is_locked(file, DOES + WRITE)? {
        return Ok(LockState::Written);
    }
    let read = is_locked(file, DOES + CONSISTENT_READ)? || is_locked(file, FORBIDS + WRITE)?;
    Ok(if read { LockState::Read } else { LockState::Free })
}

fn range(kind: i32, byte: i64) -> Range {
    Range { l_type: kind as i16, l_whence: SEEK_SET as i16, l_start: byte, l_len: 1, l_pid: 0 }
}

/// Not every file system has these locks; on one that has not, QEMU goes without them too.
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

/// Both kinds, whatever of them there is.
fn let_go(file: &File) -> io::Result<()> {
    flock(file, FlockOperation::Unlock)?;
    // Length 0: all there are.
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
    fn a_lock_that_is_about_to_go_is_waited_for() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(file.path()).unwrap();
        for (theirs, ours) in [(Use::Write, Use::Write), (Use::Read, Use::Write)] {
            let (them, us) = (open(), open());
            lock(&them, theirs).unwrap();
            let error = lock(&us, ours).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
            // Nothing is left of the attempt.
            let_go(&them).unwrap();
            assert_eq!(look(&open()).unwrap(), LockState::Free);
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

//! Waiting until the kernel has finished the I/O of a dead process.

use crate::dir::{RecordDir, checked};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Dir, FileType, FlockOperation, Mode, OFlags, fstat, mkfifoat, openat};
use rustix::io::{Errno, read, retry_on_intr};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

impl RecordDir {
    /// Opens the fence of that name, which is created if it does not exist.
    ///
    /// # Errors
    /// A system error; [`io::ErrorKind::InvalidData`] if the name is in use for another kind of
    /// file.
    pub fn fence(&self, name: &str) -> io::Result<Fence> {
        Fence::open(self, name)
    }

    /// Removes every fence whose write ends are all closed, which are those of removed devices.
    /// Safe while another daemon opens fences in the same directory.
    ///
    /// # Errors
    /// A system error.
    pub fn sweep(&self) -> io::Result<()> {
        for entry in Dir::read_from(self)? {
            let entry = entry?;
            if entry.file_type() == FileType::Fifo
                && let Ok(name) = entry.file_name().to_str()
            {
                self.fence(name)?.remove()?;
            }
        }
        Ok(())
    }
}

/// FIFO that is never written. Every process and ring that may do I/O for a device holds its write
/// end open. A process with threads has it as a descriptor. An io_uring has it in its table of
/// registered files, which the kernel releases only after the last operation of the ring. So a read
/// that returns the end of the file proves that all I/O has ended. Neither the end of a process nor
/// a lock on its files proves that.
#[derive(Debug)]
pub struct Fence {
    dir: RecordDir,
    name: String,
    reader: OwnedFd,
}

impl Fence {
    pub(crate) fn open(dir: &RecordDir, name: &str) -> io::Result<Self> {
        let _lock = dir.lock(FlockOperation::LockExclusive)?;
        Self::open_locked(dir, name)
    }

    /// As `open`, while the directory is locked: another process could remove the FIFO before it is
    /// opened.
    fn open_locked(dir: &RecordDir, name: &str) -> io::Result<Self> {
        match mkfifoat(dir, checked(name)?, Mode::RUSR | Mode::WUSR) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let reader = openat(dir, name, flags, Mode::empty())?;
        if FileType::from_raw_mode(fstat(&reader)?.st_mode) != FileType::Fifo {
            let text = format!("{name} is no FIFO");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        Ok(Self { dir: dir.clone(), name: name.to_owned(), reader })
    }

    /// Whether all write ends are closed.
    ///
    /// # Errors
    /// A system error.
    pub fn is_passed(&self) -> io::Result<bool> {
        match retry_on_intr(|| read(&self.reader, &mut [0; 64])) {
            Ok(0) => Ok(true),
            Ok(_) | Err(Errno::AGAIN) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until all write ends are closed. Returns whether that happened within `time`. Blocks
    /// the thread.
    ///
    /// # Errors
    /// A system error.
    pub fn wait(&self, time: Duration) -> io::Result<bool> {
        let by = Instant::now() + time;
        loop {
            if self.is_passed()? {
                return Ok(true);
            }
            let left = by.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            // The hang-up of the last writer ends the poll.
            let left = Timespec::try_from(left).map_err(io::Error::other)?;
            let mut fds = [PollFd::new(&self.reader, PollFlags::IN)];
            match poll(&mut fds, Some(&left)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Opens a write end, which is the fence for the successor. Called before any I/O for the
    /// device starts.
    ///
    /// # Errors
    /// A system error.
    pub fn hold(self) -> io::Result<OwnedFd> {
        let Self { dir, name, .. } = self;
        let _lock = dir.lock(FlockOperation::LockExclusive)?;
        // Another process may have removed the FIFO while it had no write end.
        let _reads = Self::open_locked(&dir, &name)?;
        // A non-blocking open of the write end succeeds only while the FIFO has a reader.
        let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(openat(&dir, name.as_str(), flags, Mode::empty())?)
    }

    /// Removes the FIFO if all write ends are closed: the device was removed. Otherwise it stays
    /// for the successor.
    ///
    /// # Errors
    /// A system error.
    pub fn remove(self) -> io::Result<()> {
        let Self { dir, name, .. } = self;
        let _lock = match dir.lock(FlockOperation::NonBlockingLockExclusive) {
            Ok(lock) => lock,
            // Another thread or process is opening a write end, possibly of this FIFO.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        };
        // The name may refer to a new FIFO.
        if Self::open_locked(&dir, &name)?.is_passed()? { dir.remove(&name) } else { Ok(()) }
    }
}

impl AsFd for Fence {
    /// Reports a hang-up when the last write end is closed, if there was one when the fence was
    /// opened.
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.reader.as_fd()
    }
}

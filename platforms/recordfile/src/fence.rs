//! Waiting until the kernel has finished what a dead process began.

use crate::dir::{RecordDir, checked};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Dir, FileType, FlockOperation, Mode, OFlags, fstat, mkfifoat, openat};
use rustix::io::{Errno, read, retry_on_intr};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

impl RecordDir {
    /// The fence of that name, which is made if it is missing.
    ///
    /// # Errors
    /// What the system reports; [`io::ErrorKind::InvalidData`] if the name is something else's.
    pub fn fence(&self, name: &str) -> io::Result<Fence> {
        Fence::open(self, name)
    }

    /// Removes every fence that is passed: of devices that are gone. Safe while another daemon opens fences in
    /// the same directory.
    ///
    /// # Errors
    /// What the system reports.
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

/// A FIFO that nobody writes to. Whoever may still do I/O for a device holds its write end open: a process
/// with threads has it as a descriptor, and an io_uring has it in its table of registered files, which the
/// kernel releases only after the last operation of the ring. A read that reports the end of the file
/// therefore tells that all of it is over. Neither the end of a process nor a lock on its files does.
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

    /// The same while the directory is locked: another process could remove the FIFO before it is opened.
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

    /// Whether nobody holds a write end any more.
    ///
    /// # Errors
    /// What the system reports.
    pub fn is_passed(&self) -> io::Result<bool> {
        match retry_on_intr(|| read(&self.reader, &mut [0; 64])) {
            Ok(0) => Ok(true),
            Ok(_) | Err(Errno::AGAIN) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until nobody holds a write end any more; whether that came within `time`. For a thread that
    /// may wait.
    ///
    /// # Errors
    /// What the system reports.
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
            // The hang-up of the last writer ends it.
            let left = Timespec::try_from(left).map_err(io::Error::other)?;
            let mut fds = [PollFd::new(&self.reader, PollFlags::IN)];
            match poll(&mut fds, Some(&left)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// A write end: the fence of whoever comes next. Call it before any I/O for the device begins.
    ///
    /// # Errors
    /// What the system reports.
    pub fn hold(self) -> io::Result<OwnedFd> {
        let Self { dir, name, .. } = self;
        let _lock = dir.lock(FlockOperation::LockExclusive)?;
        // Another process may have removed the FIFO while it had no write end.
        let _reads = Self::open_locked(&dir, &name)?;
        // While one end reads, the other can be opened without waiting.
        let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(openat(&dir, name.as_str(), flags, Mode::empty())?)
    }

    /// Removes the FIFO if nobody holds a write end: the device is gone. Otherwise it stays for whoever
    /// comes next.
    ///
    /// # Errors
    /// What the system reports.
    pub fn remove(self) -> io::Result<()> {
        let Self { dir, name, .. } = self;
        let _lock = match dir.lock(FlockOperation::NonBlockingLockExclusive) {
            Ok(lock) => lock,
            // Another thread or process opens a write end, perhaps of this FIFO.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        };
        // The name may belong to a new FIFO.
        if Self::open_locked(&dir, &name)?.is_passed()? { dir.remove(&name) } else { Ok(()) }
    }
}

impl AsFd for Fence {
    /// Hangs up when the last write end is closed, if there was one when the fence was opened.
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.reader.as_fd()
    }
}

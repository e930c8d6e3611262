//! A disk as plain blocking calls: what an image format's library offers. A
//! [`ThreadPool`](super::thread_pool::ThreadPool) of threads makes an engine of it.

use super::{EngineError, FlushState};
use alloc::sync::Arc;
use pvio_blockdev::Forget;
use rustix::fs::{FallocateFlags, fallocate};
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};

/// A disk whose operations block. Positions and lengths are in bytes, multiples of 512, and in
/// range. Several threads call at a time.
pub trait Store: Send + Sync {
    /// Fills the buffer.
    ///
    /// # Errors
    /// Whatever the image says.
    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()>;

    /// Writes the buffer.
    ///
    /// # Errors
    /// Whatever the image says.
    fn write(&self, at: u64, from: &[u8]) -> io::Result<()>;

    /// Brings every write that returned before to the medium.
    ///
    /// # Errors
    /// Whatever the image says.
    fn flush(&self) -> io::Result<()>;

    /// What knows whether a flush has failed, for a store that flushes by itself too, so that one thing is on
    /// its medium before another.
    fn flush_state(&self) -> Option<Arc<FlushState>> {
        None
    }

    /// This range is not needed any more.
    ///
    /// # Errors
    /// Whatever the image says; [`io::ErrorKind::Unsupported`] if it cannot.
    fn discard(&self, at: u64, len: u64) -> io::Result<()>;

    /// This range must not be found by anybody any more.
    ///
    /// # Errors
    /// Whatever the image says; [`io::ErrorKind::Unsupported`] if it cannot promise that.
    fn discard_securely(&self, _at: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// This range reads as zeroes from now on.
    ///
    /// # Errors
    /// Whatever the image says.
    fn write_zeroes(&self, at: u64, len: u64) -> io::Result<()> {
        const STEP: usize = 1 << 18;
        let zeroes = std::vec![0; STEP.min(usize::try_from(len).unwrap_or(STEP))];
        let mut done = 0;
        while done < len {
            let n = (len - done).min(zeroes.len() as u64);
            self.write(at + done, &zeroes[..n as usize])?;
            done += n;
        }
        Ok(())
    }
}

/// A file or block device.
#[derive(Debug)]
pub struct FileStore {
    file: File,
    block_device: bool,
}

impl FileStore {
    /// # Errors
    /// The system cannot tell what it is.
    pub fn new(file: File) -> io::Result<Self> {
        let block_device = file.metadata()?.file_type().is_block_device();
        Ok(Self { file, block_device })
    }
}

impl Store for FileStore {
    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(into, at)
    }

    fn write(&self, at: u64, from: &[u8]) -> io::Result<()> {
        self.file.write_all_at(from, at)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn discard(&self, at: u64, len: u64) -> io::Result<()> {
        if self.block_device {
            return Forget::Discard.range(&self.file, at, len);
        }
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(fallocate(&self.file, hole, at, len)?)
    }

    /// A file's sectors may lie elsewhere on its medium too.
    fn discard_securely(&self, at: u64, len: u64) -> io::Result<()> {
        if !self.block_device {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Forget::Securely.range(&self.file, at, len)
    }
}

/// An error of the operating system or of an image's library, as an operation fails by it.
pub(crate) fn engine_error(error: &io::Error) -> EngineError {
    const EIO: i32 = 5;
    let own = error.get_ref().and_then(|inner| inner.downcast_ref::<EngineError>());
    if let Some(error) = own {
        return *error;
    }
    match (error.kind(), error.raw_os_error()) {
        (io::ErrorKind::Unsupported, _) => EngineError::Unsupported,
        (io::ErrorKind::UnexpectedEof, _) => EngineError::Short,
        (_, Some(errno)) => EngineError::Os(errno),
        (_, None) => EngineError::Os(EIO),
    }
}

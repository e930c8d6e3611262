//! The interface to storage with blocking calls, as image format libraries have. A
//! [`ThreadPool`](super::offload::ThreadPool) adapts it to an engine.

use super::{EngineError, FlushState};
use alloc::sync::Arc;
use pvio_blockdev::Forget;
use rustix::fs::{FallocateFlags, fallocate};
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};

/// A disk with blocking operations. Offsets and lengths are in bytes, multiples of 512, and in
/// range. Several threads call it concurrently.
pub trait Store: Send + Sync {
    /// Reads into the buffer.
    ///
    /// # Errors
    /// The image's error.
    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()>;

    /// Writes the buffer.
    ///
    /// # Errors
    /// The image's error.
    fn write(&self, at: u64, from: &[u8]) -> io::Result<()>;

    /// Makes all writes durable that returned before.
    ///
    /// # Errors
    /// The image's error.
    fn flush(&self) -> io::Result<()>;

    /// Returns the flush state of a store that also flushes internally, to order its own writes.
    fn flush_state(&self) -> Option<Arc<FlushState>> {
        None
    }

    /// Discards a range that is no longer needed.
    ///
    /// # Errors
    /// The image's error; [`io::ErrorKind::Unsupported`] if it cannot discard.
    fn discard(&self, at: u64, len: u64) -> io::Result<()>;

    /// Discards a range and makes its data unrecoverable.
    ///
    /// # Errors
    /// The image's error; [`io::ErrorKind::Unsupported`] if it cannot guarantee that.
    fn discard_securely(&self, _at: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Makes a range read as zeroes.
    ///
    /// # Errors
    /// The image's error.
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
    /// The system's error if it cannot determine the file's type.
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

    /// Not supported for files: a file system may have copies of the data elsewhere on its device.
    fn discard_securely(&self, at: u64, len: u64) -> io::Result<()> {
        if !self.block_device {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Forget::Securely.range(&self.file, at, len)
    }
}

/// Converts an error of the operating system or of an image's library to the error of an operation.
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

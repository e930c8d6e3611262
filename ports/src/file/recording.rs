//! A file to which the packets of a guest are written.
#![forbid(unsafe_code)]

use crate::FRAME_MAX;
use crate::pcapng::{CaptureFile, CapturedPacket};
use alloc::sync::Arc;
use std::fs::File;
use std::io::{self, BufWriter};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// Recording of a vif, shared by its queues.
#[derive(Debug)]
pub struct Recording {
    file: Mutex<Option<CaptureFile<BufWriter<File>>>>,
    /// The same file, for another process.
    raw: File,
}

impl Recording {
    /// Creates or truncates the file, for a vif of that name.
    ///
    /// # Errors
    /// A system error.
    pub fn begin(path: &Path, interface: &str) -> io::Result<Arc<Self>> {
        Self::append(File::create(path)?, interface)
    }

    /// Writes to an open file, from its current position: after a recording of another process, a
    /// further section.
    ///
    /// # Errors
    /// A system error.
    pub fn append(raw: File, interface: &str) -> io::Result<Arc<Self>> {
        let mut file = CaptureFile::begin(BufWriter::new(raw.try_clone()?), interface, FRAME_MAX)?;
        file.flush()?;
        Ok(Arc::new(Self { file: Mutex::new(Some(file)), raw }))
    }

    /// Returns a descriptor with which another process can continue the recording. Both must not
    /// record at the same time.
    ///
    /// # Errors
    /// A system error.
    pub fn to_fd(&self) -> io::Result<OwnedFd> {
        Ok(self.raw.try_clone()?.into())
    }

    pub(super) fn add(&self, packet: &CapturedPacket) {
        self.with(|file| file.add(packet));
    }

    pub(super) fn flush(&self) {
        self.with(CaptureFile::flush);
    }

    fn with(&self, work: impl FnOnce(&mut CaptureFile<BufWriter<File>>) -> io::Result<()>) {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = &mut *file
            && let Err(error) = work(open)
        {
            tracing::warn!(%error, "nothing more is recorded");
            *file = None;
        }
    }
}

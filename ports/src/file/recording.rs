//! A file to which the packets of a guest are written.
#![forbid(unsafe_code)]

use crate::FRAME_MAX;
use crate::pcapng::{CaptureFile, CapturedPacket};
use alloc::sync::Arc;
use std::fs::File;
use std::io::{self, BufWriter};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// Recording of a vif, shared by its queues.
#[derive(Debug)]
pub struct Recording(Mutex<Option<CaptureFile<BufWriter<File>>>>);

impl Recording {
    /// Creates or truncates the file, for a vif of that name.
    ///
    /// # Errors
    /// A system error.
    pub fn begin(path: &Path, interface: &str) -> io::Result<Arc<Self>> {
        let file = BufWriter::new(File::create(path)?);
        let file = CaptureFile::begin(file, interface, FRAME_MAX)?;
        Ok(Arc::new(Self(Mutex::new(Some(file)))))
    }

    pub(super) fn add(&self, packet: &CapturedPacket) {
        self.with(|file| file.add(packet));
    }

    pub(super) fn flush(&self) {
        self.with(CaptureFile::flush);
    }

    fn with(&self, work: impl FnOnce(&mut CaptureFile<BufWriter<File>>) -> io::Result<()>) {
        let mut file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = &mut *file
            && let Err(error) = work(open)
        {
            tracing::warn!(%error, "nothing more is recorded");
            *file = None;
        }
    }
}

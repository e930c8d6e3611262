//! In-flight records of a device, in a directory or in private memory.

use crate::dir::RecordDir;
use crate::file::RecordFile;
use pvio_ring::error::Remedy;
use pvio_ring::shm::Region;
use pvio_runtime::LogLimit;
use std::borrow::Cow;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// Provides the memory of a device's in-flight records. With a directory, another process can
/// resume the device's sessions. Without one, the memory is private to this process.
#[derive(Clone, Debug, Default)]
pub struct RecordStore {
    dir: Option<RecordDir>,
    /// Rate limit of the log lines for records that could not be removed.
    left: Arc<LogLimit>,
}

impl RecordStore {
    /// Returns a store in a directory.
    #[must_use]
    pub fn in_dir(dir: RecordDir) -> Self {
        Self { dir: Some(dir), left: Arc::default() }
    }

    /// Returns the directory, if the records are in one.
    #[must_use]
    pub const fn dir(&self) -> Option<&RecordDir> {
        self.dir.as_ref()
    }

    /// Returns `len` bytes for the record of a device's session: new memory, or, with `resumed`, the
    /// memory that the earlier process left.
    ///
    /// # Errors
    /// A [`RecordError`].
    pub fn open(&self, device: &str, len: usize, resumed: bool) -> Result<RecordFile, RecordError> {
        let record = match &self.dir {
            Some(dir) if resumed => dir.existing(device, len),
            Some(dir) => dir.create(device, len),
            None if resumed => return Err(RecordError::NotStored),
            None => RecordFile::private(len),
        };
        record.map_err(|source| failed(device, resumed, source))
    }

    /// As [`open`](Self::open), for the process that serves the session: the file is not mapped here.
    ///
    /// # Errors
    /// A [`RecordError`]; without a directory, no other process can have the record.
    pub fn open_unmapped(
        &self,
        device: &str,
        len: usize,
        resumed: bool,
    ) -> Result<OwnedFd, RecordError> {
        let dir = self.dir.as_ref().ok_or(RecordError::NotStored)?;
        let record = if resumed {
            dir.existing_unmapped(device, len)
        } else {
            dir.create_unmapped(device, len)
        };
        record.map_err(|source| failed(device, resumed, source))
    }

    /// Returns a copy of the record that an earlier process left, in private memory. The file may be
    /// changed or shortened at any time by a process that was taken over, which a reader of the copy
    /// does not notice.
    ///
    /// # Errors
    /// A [`RecordError`].
    pub fn copy(&self, device: &str, len: usize) -> Result<RecordFile, RecordError> {
        let copy = || {
            let mut bytes = vec![0; len];
            let file = self.open_unmapped(device, len, true)?;
            let io = |source| failed(device, true, source);
            File::from(file).read_exact_at(&mut bytes, 0).map_err(io)?;
            let memory = RecordFile::private(len).map_err(io)?;
            memory.write_bytes(0, &bytes).ok_or_else(|| io(io::ErrorKind::InvalidData.into()))?;
            Ok(memory)
        };
        copy()
    }

    /// Removes the record of a device's session, which has ended. A failure is logged and counted.
    pub fn remove(&self, device: &str) {
        if let Some(Err(error)) = self.dir.as_ref().map(|dir| dir.remove(device))
            && let Some(unlogged) = self.left.admit()
        {
            tracing::warn!(device, %error, unlogged, "the in-flight record cannot be removed");
        }
    }

    /// Returns the count of records that could not be removed, with its name.
    #[must_use]
    pub fn event(&self) -> (&'static str, Arc<LogLimit>) {
        ("records-left", Arc::clone(&self.left))
    }
}

fn failed(device: &str, resumed: bool, source: io::Error) -> RecordError {
    let device = device.to_owned();
    if resumed && source.kind() == io::ErrorKind::NotFound {
        RecordError::Missing { device, source }
    } else {
        RecordError::Io { device, source }
    }
}

/// Reason why there is no memory for an in-flight record.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The earlier process left no record.
    #[error("the earlier process left no in-flight record {device}")]
    Missing {
        /// The device.
        device: String,
        /// Cause.
        source: io::Error,
    },
    /// A session is to be resumed, and the records are not in a directory.
    #[error("in-flight records are not enabled")]
    NotStored,
    /// The record could not be created or mapped.
    #[error("the in-flight record {device} cannot be opened")]
    Io {
        /// The device.
        device: String,
        /// Cause.
        source: io::Error,
    },
}

impl Remedy for RecordError {
    fn remedy(&self) -> Option<Cow<'static, str>> {
        match self {
            // The frontend reconnects without a record.
            Self::Missing { .. } | Self::NotStored => None,
            Self::Io { .. } => Some("check the directory of the records and its free space".into()),
        }
    }
}

impl RecordError {
    /// A short stable code for logs, counters and `error` nodes.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Missing { .. } | Self::NotStored => "record-missing",
            Self::Io { .. } => "record-file",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_is_resumed_from_its_directory_only() {
        let parent = tempfile::tempdir().unwrap();
        let store = RecordStore::in_dir(RecordDir::open(&parent.path().join("records")).unwrap());
        let missing = store.open("vif-1-0", 4096, true).unwrap_err();
        assert_eq!(missing.code(), "record-missing");
        store.open("vif-1-0", 4096, false).unwrap();
        store.open("vif-1-0", 4096, true).unwrap();
        assert_eq!(store.open("vif-1-0", 8192, true).unwrap_err().code(), "record-file");
        store.remove("vif-1-0");
        assert_eq!(store.open("vif-1-0", 4096, true).unwrap_err().code(), "record-missing");

        let private = RecordStore::default();
        private.open("vif-1-0", 4096, false).unwrap();
        assert_eq!(private.open("vif-1-0", 4096, true).unwrap_err().code(), "record-missing");
    }

    #[test]
    fn record_that_cannot_be_removed_is_counted() {
        let parent = tempfile::tempdir().unwrap();
        let dir = RecordDir::open(&parent.path().join("records")).unwrap();
        std::fs::create_dir(dir.path().join("vif-1-0")).unwrap();
        let store = RecordStore::in_dir(dir);
        for _ in 0..12 {
            store.remove("vif-1-0");
        }
        let (name, count) = store.event();
        assert_eq!((name, count.seen()), ("records-left", 12));
    }
}

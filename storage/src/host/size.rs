//! The current size of an image, looked up on a separate thread because hanging storage would
//! block.

use alloc::string::String;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use pvio_runtime::LogLimit;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::thread::Builder;

/// The size was not looked up.
const UNKNOWN: u64 = u64::MAX;

/// The size of one open image.
#[derive(Clone)]
pub struct ImageSize(Arc<Shared>);

struct Shared {
    bytes: AtomicU64,
    /// Whether a thread is looking it up.
    pending: AtomicBool,
    failures: Arc<LogLimit>,
}

impl ImageSize {
    /// Creates an unknown size. Failed lookups are logged within `failures`.
    #[must_use]
    pub fn new(failures: Arc<LogLimit>) -> Self {
        let (bytes, pending) = (AtomicU64::new(UNKNOWN), AtomicBool::new(false));
        Self(Arc::new(Shared { bytes, pending, failures }))
    }

    /// Returns the size found by the last lookup, in bytes.
    #[must_use]
    pub fn bytes(&self) -> Option<u64> {
        Some(self.0.bytes.load(Ordering::Relaxed)).filter(|bytes| *bytes != UNKNOWN)
    }

    /// Starts a lookup, unless one is in progress, without blocking. `changed` is called if the
    /// size differs from the previous one.
    pub fn look_up(&self, mut file: File, changed: impl FnOnce() + Send + 'static) {
        if self.0.pending.swap(true, Ordering::AcqRel) {
            return;
        }
        let shared = Arc::clone(&self.0);
        let work = move || {
            // Seeking is safe: all other users of the file read and write at explicit offsets.
            let found = file.seek(SeekFrom::End(0));
            drop(file);
            let is_new = match &found {
                Ok(bytes) => shared.bytes.swap(*bytes, Ordering::Relaxed) != *bytes,
                Err(error) => {
                    shared.complain(error);
                    false
                }
            };
            shared.pending.store(false, Ordering::Release);
            if is_new {
                changed();
            }
        };
        if let Err(error) = Builder::new().name(String::from("image-size")).spawn(work) {
            self.0.complain(&error);
            self.0.pending.store(false, Ordering::Release);
        }
    }
}

impl Shared {
    fn complain(&self, error: &std::io::Error) {
        if let Some(unlogged) = self.failures.admit() {
            tracing::warn!(%error, unlogged, "the size of the image cannot be determined");
        }
    }
}

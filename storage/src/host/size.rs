//! How large an image is now, looked up by a thread of its own: storage that hangs does not answer.

use alloc::string::String;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use pvio_uring::LogLimit;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::thread::Builder;

/// Stands for a size that was not looked up.
const UNKNOWN: u64 = u64::MAX;

/// The size of one open image.
#[derive(Clone)]
pub(super) struct ImageSize(Arc<Shared>);

struct Shared {
    bytes: AtomicU64,
    /// A thread looks it up.
    pending: AtomicBool,
    failures: Arc<LogLimit>,
}

impl ImageSize {
    /// A size that was not looked up. Failures to do so are logged within that limit.
    pub fn new(failures: Arc<LogLimit>) -> Self {
        let (bytes, pending) = (AtomicU64::new(UNKNOWN), AtomicBool::new(false));
        Self(Arc::new(Shared { bytes, pending, failures }))
    }

    /// What was found last, in bytes.
    pub fn bytes(&self) -> Option<u64> {
        Some(self.0.bytes.load(Ordering::Relaxed)).filter(|bytes| *bytes != UNKNOWN)
    }

    /// Begins to look it up, unless that is under way, and does not wait. `changed` is called if it is
    /// another size than before.
    pub fn look_up(&self, mut file: File, changed: impl FnOnce() + Send + 'static) {
        if self.0.pending.swap(true, Ordering::AcqRel) {
            return;
        }
        let shared = Arc::clone(&self.0);
        let work = move || {
            // All else is read and written by position.
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
            tracing::warn!(%error, unlogged, "how large the image is cannot be found out");
        }
    }
}

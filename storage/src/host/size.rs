//! The current size of an image, looked up on a separate thread because hanging storage would
//! block.

use crate::engine::threads;
use alloc::boxed::Box;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crossbeam_channel::{Receiver, Sender, bounded};
use pvio_runtime::LogLimit;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};

/// The size was not looked up.
const UNKNOWN: u64 = u64::MAX;

/// The size of one open image. Its thread ends after the lookup in progress when this is dropped.
pub struct ImageSize {
    shared: Arc<Shared>,
    /// `None` if the size cannot change.
    lookups: Option<Sender<Lookup>>,
}

struct Shared {
    bytes: AtomicU64,
    /// Whether the thread is looking it up.
    pending: AtomicBool,
    failures: Arc<LogLimit>,
}

/// A lookup, and what is called if the size differs from the previous one.
struct Lookup {
    file: File,
    changed: Box<dyn FnOnce() + Send>,
}

impl ImageSize {
    /// Creates the size of an image whose size cannot change.
    #[must_use]
    pub fn fixed() -> Self {
        Self { shared: Arc::new(Shared::new(Arc::default())), lookups: None }
    }

    /// Creates an unknown size, and the thread that looks it up. Failed lookups are logged within
    /// `failures`.
    ///
    /// # Errors
    /// The system's error if it cannot create a thread.
    pub fn start(failures: Arc<LogLimit>) -> io::Result<Self> {
        let shared = Arc::new(Shared::new(failures));
        // No more than one lookup is in progress.
        let (lookups, incoming) = bounded(1);
        let theirs = Arc::clone(&shared);
        // A process that is confined later can start no thread for each lookup.
        threads::start("image-size", move || theirs.serve(&incoming))?;
        Ok(Self { shared, lookups: Some(lookups) })
    }

    /// Returns the size found by the last lookup, in bytes.
    #[must_use]
    pub fn bytes(&self) -> Option<u64> {
        Some(self.shared.bytes.load(Ordering::Relaxed)).filter(|bytes| *bytes != UNKNOWN)
    }

    /// Starts a lookup, unless one is in progress, without blocking. `changed` is called if the
    /// size differs from the previous one.
    pub fn look_up(&self, file: File, changed: impl FnOnce() + Send + 'static) {
        let Some(lookups) = &self.lookups else { return };
        if self.shared.pending.swap(true, Ordering::AcqRel) {
            return;
        }
        let lookup = Lookup { file, changed: Box::new(changed) };
        if lookups.try_send(lookup).is_err() {
            self.shared.pending.store(false, Ordering::Release);
        }
    }
}

impl Shared {
    fn new(failures: Arc<LogLimit>) -> Self {
        let (bytes, pending) = (AtomicU64::new(UNKNOWN), AtomicBool::new(false));
        Self { bytes, pending, failures }
    }

    fn serve(&self, lookups: &Receiver<Lookup>) {
        for Lookup { mut file, changed } in lookups {
            // Seeking is safe: all other users of the file read and write at explicit offsets.
            let found = file.seek(SeekFrom::End(0));
            drop(file);
            let is_new = match &found {
                Ok(bytes) => self.bytes.swap(*bytes, Ordering::Relaxed) != *bytes,
                Err(error) => {
                    self.complain(error);
                    false
                }
            };
            self.pending.store(false, Ordering::Release);
            if is_new {
                changed();
            }
        }
    }

    fn complain(&self, error: &std::io::Error) {
        if let Some(unlogged) = self.failures.admit() {
            tracing::warn!(%error, unlogged, "the size of the image cannot be determined");
        }
    }
}

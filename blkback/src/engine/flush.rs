//! Tracks whether flushes of a disk are still reliable.
//!
//! A failed `fdatasync` is reported once. Linux may mark the pages that it could not write clean, so that
//! the next `fdatasync` succeeds although their data is lost. Of several callers that share an open file
//! only the first sees the error. A [`FlushState`] therefore remembers a failure: from then on every flush
//! of the disk fails, on all queues and in every session, until the image is closed.
//!
//! `O_DIRECT` changes nothing. Its flush still writes the file's metadata and the device's volatile cache,
//! and a device that failed to write its cache may discard what was in it.

use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering, fence};
#[cfg(feature = "std")]
use {
    super::EngineError,
    alloc::boxed::Box,
    pvio_runtime::retry,
    std::io,
    std::sync::{Mutex, OnceLock, PoisonError},
};

/// Whether a flush of a disk has failed since its image was opened. Shared by all queues of the disk.
#[derive(Default)]
pub struct FlushState {
    failed: AtomicBool,
    /// Serializes flushes of `flush_alone`.
    #[cfg(feature = "std")]
    turn: Mutex<()>,
    #[cfg(feature = "std")]
    listener: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl FlushState {
    /// Returns whether a flush has failed.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Records that a flush failed: here, or in an earlier process that served the same open disk.
    pub fn mark_failed(&self) {
        if self.failed.swap(true, Ordering::AcqRel) {
            return;
        }
        // Pairs with the fence of `on_failure`: one of the two sees the other's store.
        fence(Ordering::SeqCst);
        #[cfg(feature = "std")]
        if let Some(listener) = self.listener.get() {
            listener();
        }
    }
}

#[cfg(feature = "std")]
impl FlushState {
    /// Calls `listener` when the first flush fails, from the thread that observes the failure, or
    /// immediately if a flush has failed already. Only the first listener is used.
    pub fn on_failure(&self, listener: impl Fn() + Send + Sync + 'static) {
        if self.listener.set(Box::new(listener)).is_err() {
            // A second listener is an error of the caller and is ignored.
            return;
        }
        fence(Ordering::SeqCst);
        if self.has_failed()
            && let Some(listener) = self.listener.get()
        {
            listener();
        }
    }

    /// Flushes with `sync`, which is retried if it is interrupted. The caller ensures that the same
    /// open file is not flushed twice at a time: only one of the two flushes would see an error.
    ///
    /// # Errors
    /// The error of `sync`, which is recorded unless it is [`EngineError::StorageFull`]; `EIO` if an
    /// earlier flush failed.
    pub fn flush(&self, sync: impl FnMut() -> io::Result<()>) -> io::Result<()> {
        const EIO: i32 = 5;
        if self.has_failed() {
            return Err(io::Error::from_raw_os_error(EIO));
        }
        retry::blocking(sync).inspect_err(|error| {
            let own = error.get_ref().and_then(|inner| inner.downcast_ref());
            if !matches!(own, Some(EngineError::StorageFull(_))) {
                self.mark_failed();
            }
        })
    }

    /// Flushes like [`flush`](Self::flush) for callers that do not coordinate with each other: one
    /// at a time.
    ///
    /// # Errors
    /// As [`flush`](Self::flush).
    pub fn flush_alone(&self, sync: impl FnMut() -> io::Result<()>) -> io::Result<()> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.flush(sync)
    }
}

impl fmt::Debug for FlushState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FlushState").field("failed", &self.has_failed()).finish_non_exhaustive()
    }
}

#[cfg(all(test, feature = "std"))]
mod tests {
    use super::*;
    use alloc::sync::Arc;
    use core::sync::atomic::AtomicUsize;

    #[test]
    fn flush_after_failed_flush_fails_and_listener_is_called_once() {
        let (state, calls) = (FlushState::default(), Arc::new(AtomicUsize::new(0)));
        let called = Arc::clone(&calls);
        state.on_failure(move || {
            called.fetch_add(1, Ordering::Relaxed);
        });
        state.flush(|| Ok(())).unwrap();
        assert!(!state.has_failed());
        let full = state.flush(|| Err(io::Error::from_raw_os_error(28))).unwrap_err();
        assert_eq!(full.raw_os_error(), Some(28));
        let later = state.flush(|| panic!("storage is not asked again")).unwrap_err();
        assert_eq!((later.raw_os_error(), state.has_failed()), (Some(5), true));
        state.mark_failed();
        assert_eq!(calls.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn flush_that_lost_nothing_because_storage_is_full_is_not_a_failure() {
        let state = FlushState::default();
        let full = || Err(io::Error::other(EngineError::StorageFull(28)));
        assert!(state.flush(full).is_err() && !state.has_failed());
        state.flush(|| Ok(())).unwrap();
    }

    #[test]
    fn flush_interrupted_is_retried_and_not_counted_as_failure() {
        let (state, mut errors) = (FlushState::default(), alloc::vec![11, 4]);
        let sync = || errors.pop().map_or(Ok(()), |e| Err(io::Error::from_raw_os_error(e)));
        state.flush(sync).unwrap();
        assert!(!state.has_failed());
    }
}

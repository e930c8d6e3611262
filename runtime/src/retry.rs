//! Repeating system calls that were interrupted (`EINTR`) or temporarily failed (`EAGAIN`).

use crate::Backoff;
use std::io;
use std::thread;

/// Executes a blocking call, and repeats it as long as its error is transient and the [`Backoff`]
/// permits. The call must be idempotent.
///
/// # Errors
/// The last error of the call.
pub fn blocking<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let mut backoff = Backoff::default();
    loop {
        let error = match call() {
            Err(error) if is_transient(&error) => error,
            outcome => return outcome,
        };
        thread::sleep(backoff.pause().ok_or(error)?);
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
}

//! Repeating calls that the system interrupted (`EINTR`) or could not carry out just then (`EAGAIN`).

use crate::Backoff;
use std::io;
use std::thread;

/// Makes a call that blocks, and repeats it for as long as its error is transient and the
/// [`Backoff`] allows. The call must be one that may be made twice.
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

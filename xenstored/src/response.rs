//! A response's payload.

use alloc::string::String;
use alloc::vec::Vec;

use pvio_xenbus::wire::XsErrno;

/// The payload of a response, or the error it reports.
pub type Response = Result<Vec<u8>, XsErrno>;

/// Returns the payload of a response without data.
pub fn ok() -> Vec<u8> {
    text("OK")
}

/// Returns a string with a terminating NUL.
pub fn text(s: &str) -> Vec<u8> {
    let mut bytes = String::from(s).into_bytes();
    bytes.push(0);
    bytes
}

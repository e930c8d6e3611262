//! What carries the bytes of a connection.

use core::time::Duration;

use crate::wire::XsErrno;
use crate::xenstore::XsError;

/// Why bytes could not be sent.
#[derive(Debug)]
pub(super) enum SendError {
    /// The server or the kernel rejected the request that these bytes complete.
    Refused(XsErrno),
    /// The connection is unusable.
    Lost(XsError),
}

impl From<XsError> for SendError {
    fn from(error: XsError) -> Self {
        Self::Lost(error)
    }
}

/// What to wait for.
#[derive(Clone, Copy)]
pub(super) enum Wait {
    /// Something can be received.
    Read,
    /// Something can be received or sent.
    ReadOrWrite,
}

/// A stream of bytes to a server and back. Only [`wait`](Self::wait) blocks.
pub(super) trait Transport {
    /// A point in time.
    type Deadline: Copy;

    /// Returns the point in time after this duration; `None` if it is beyond the range of the clock.
    fn deadline(&self, timeout: Duration) -> Option<Self::Deadline>;

    /// Sends some of `bytes`; `None` if nothing can be sent now.
    fn send(&mut self, bytes: &[u8]) -> Result<Option<usize>, SendError>;

    /// Receives some bytes: `Some(0)` at the end of the stream, `None` if nothing is available.
    fn receive(&mut self, into: &mut [u8]) -> Result<Option<usize>, XsError>;

    /// Waits, possibly shorter than required. Returns `false` if the deadline had passed.
    fn wait(&mut self, what: Wait, until: Option<Self::Deadline>) -> Result<bool, XsError>;

    /// Returns whether other users share the connection, as the kernel does.
    fn is_shared(&self) -> bool {
        false
    }
}

//! Fields of a domain's shared page beside its two rings (`struct xenstore_domain_interface`).

use core::sync::atomic::Ordering;

use pvio_ring::byte_ring::{XENSTORE_CONNECTION, XENSTORE_ERROR, XENSTORE_SERVER_FEATURES};
use pvio_ring::shm::{Region, SharedMemory};

/// The server can drop and reset the connection on request (`XENSTORE_SERVER_FEATURE_RECONNECTION`).
pub const SERVER_FEATURE_RECONNECTION: u32 = 1;
/// The page has the word [`PageWord::Error`] (`XENSTORE_SERVER_FEATURE_ERROR`).
pub const SERVER_FEATURE_ERROR: u32 = 2;

/// Value of [`PageWord::Connection`]: the steady state (`XENSTORE_CONNECTED`).
pub const CONNECTED: u32 = 0;
/// Value of [`PageWord::Connection`]: the domain requests that the server drops all state of the
/// connection and resets the rings (`XENSTORE_RECONNECT`).
pub const RECONNECT: u32 = 1;

/// A word of the page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PageWord {
    /// `server_features`, written by the server.
    ServerFeatures,
    /// `connection`, set to [`RECONNECT`] by the domain and to [`CONNECTED`] by the server.
    Connection,
    /// `error`, a [`PageError`] or 0, written by the server.
    Error,
}

impl PageWord {
    /// Loads the word; 0 if the memory is smaller than the page.
    #[must_use]
    pub fn load<M: SharedMemory>(self, page: &M) -> u32 {
        page.load_u32(self.offset(), Ordering::Acquire).unwrap_or_default()
    }

    /// Stores the word. All earlier stores to the page are visible to a peer that loads it.
    pub fn store<M: SharedMemory>(self, page: &M, value: u32) {
        page.store_u32(self.offset(), value, Ordering::Release);
    }

    const fn offset(self) -> usize {
        match self {
            Self::ServerFeatures => XENSTORE_SERVER_FEATURES,
            Self::Connection => XENSTORE_CONNECTION,
            Self::Error => XENSTORE_ERROR,
        }
    }
}

/// Why the server ignores a domain (`XENSTORE_ERROR_*`), until the domain reconnects.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
#[repr(u32)]
pub enum PageError {
    /// The event channel or the page is not usable.
    #[error("communication problem")]
    Communication = 1,
    /// An index of a ring is not valid.
    #[error("invalid ring index")]
    RingIndex = 2,
    /// The payload of a message is too long.
    #[error("protocol violation")]
    Protocol = 3,
}

impl PageError {
    /// Returns the error with this code; `None` for 0 and for unknown codes.
    #[must_use]
    pub const fn from_code(code: u32) -> Option<Self> {
        match code {
            1 => Some(Self::Communication),
            2 => Some(Self::RingIndex),
            3 => Some(Self::Protocol),
            _ => None,
        }
    }

    /// Returns the code on the wire.
    #[must_use]
    pub const fn code(self) -> u32 {
        self as u32
    }
}

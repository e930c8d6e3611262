//! Event channels: notifications between two domains.
//!
//! | module | contents |
//! |---|---|
//! | [`two_level`] | pending and mask bits in the shared info page, and their rules |
//! | [`SpuriousEvents`] | delays the events of a peer that sends them without work |
//! | this module | the traits that a device uses, see below |
//! | [`BackendPlatform`] | all that a backend requires of its platform, grants included |
//! | `device` | the platform of a process that may open nothing (feature `std`) |
//!
//! [`EventChannels`] creates channels, [`EventChannel`] is one end of a channel. An event carries no
//! data. It may be merged with others, and it may be spurious (binding a channel raises one). The
//! state that it announces is in shared memory.
//! ```
//! use pvio_event_channel::{Port, two_level::EventPage};
//! use pvio_ring::shm::HeapMemory;
//!
//! let page = EventPage::new(HeapMemory::pages(1));
//! let port = Port(7);
//! assert!(page.raise(port), "no event was pending: the domain must be notified");
//! assert!(!page.raise(port), "already pending: no second notification is needed");
//! assert!(page.take(port));
//! assert!(!page.take(port));
//! ```
#![no_std]
#![forbid(unsafe_code)]
#![warn(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

#[cfg(feature = "std")]
extern crate std;

#[cfg(feature = "std")]
mod device;
mod platform;
mod spurious;
pub mod two_level;

#[cfg(feature = "std")]
pub use device::{DeviceDescriptors, DevicePlatform, DeviceScope};
pub use platform::BackendPlatform;
pub use pvio_ring::DomId;
pub use spurious::SpuriousEvents;

use core::fmt;

/// An event channel's number within one domain (`evtchn_port_t`); 0 is never valid.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[repr(transparent)]
pub struct Port(pub u32);

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The reason why an event channel operation failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum EventError {
    /// Every port is in use.
    #[error("no event channel is free")]
    NoPorts,
    /// The domain does not exist.
    #[error("no such domain")]
    NoDomain,
    /// The port does not exist, is already bound, or is reserved for another domain.
    #[error("the remote port cannot be bound by this domain")]
    BadPort,
    /// This end was closed.
    #[error("the event channel is closed")]
    Closed,
    /// The hypervisor cannot be reached, or its response is invalid.
    #[error("the hypervisor cannot be reached")]
    Hypervisor,
}

impl EventError {
    /// Returns what the operator can do next, if anything.
    #[must_use]
    pub const fn remedy(self) -> Option<&'static str> {
        match self {
            Self::NoPorts => Some("raise the domain's max_event_channels"),
            Self::NoDomain | Self::BadPort | Self::Closed | Self::Hypervisor => None,
        }
    }

    /// A short stable code for logs, counters and `error` nodes.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::NoPorts => "event-no-ports",
            Self::NoDomain => "event-no-domain",
            Self::BadPort => "event-bad-port",
            Self::Closed => "event-closed",
            Self::Hypervisor => "event-hypervisor",
        }
    }
}

/// Creates event channels.
pub trait EventChannels {
    /// One end of a channel. Dropping it closes this end.
    type Channel: EventChannel + Send + 'static;

    /// Creates an end that `remote` may bind to (`EVTCHNOP_alloc_unbound`).
    ///
    /// # Errors
    /// [`EventError::NoPorts`], [`EventError::NoDomain`], [`EventError::Hypervisor`].
    fn alloc_unbound(&self, remote: DomId) -> Result<Self::Channel, EventError>;

    /// Binds to an end that `remote` created for this domain (`EVTCHNOP_bind_interdomain`). An event
    /// is pending on the new end immediately, because the peer may have sent one before the channel
    /// was bound.
    ///
    /// # Errors
    /// Any [`EventError`].
    fn bind_interdomain(&self, remote: DomId, port: Port) -> Result<Self::Channel, EventError>;
}

/// One end of an event channel.
pub trait EventChannel {
    /// Returns the port number of this end in this domain.
    fn port(&self) -> Port;

    /// Sends an event to the other end.
    ///
    /// # Errors
    /// [`EventError::Closed`] or [`EventError::Hypervisor`]. If no peer is bound, the
    /// event is lost without an error.
    fn notify(&self) -> Result<(), EventError>;

    /// Clears the pending event and returns whether there was one. Call this before reading shared
    /// memory, so that a later change raises a new event.
    ///
    /// # Errors
    /// [`EventError::Closed`] or [`EventError::Hypervisor`].
    fn take(&self) -> Result<bool, EventError>;
}

//! Event channels: how one domain wakes another.
//!
//! | module | holds |
//! |---|---|
//! | [`two_level`] | pending and mask bits in the shared info page, and the rules for them |
//! | this | the traits a device is written against: [`EventChannels`] makes channels, [`EventChannel`] is one end |
//!
//! An event carries nothing but "look": it may be merged with others, and may come for nothing
//! (binding a channel raises one). What there is to do stands in shared memory.
//!
//! ```
//! use pvio_event_channel::{Port, two_level::EventPage};
//! use pvio_ring::shm::HeapMemory;
//!
//! let page = EventPage::new(HeapMemory::pages(1));
//! let port = Port(7);
//! assert!(page.raise(port), "nothing was pending: the domain must be woken");
//! assert!(!page.raise(port), "already pending: a second wake-up would be wasted");
//! assert!(page.take(port));
//! assert!(!page.take(port));
//! ```
#![no_std]
#![forbid(unsafe_code)]
#![warn(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

pub mod two_level;

pub use pvio_ring::DomId;

use core::fmt;

/// An event channel's number within one domain (`evtchn_port_t`); 0 is never valid.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(transparent)]
pub struct Port(pub u32);

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Why an event channel operation failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum EventError {
    /// Every port is taken.
    #[error("no free event channel; raise the domain's max_event_channels")]
    NoPorts,
    /// There is no such domain.
    #[error("no such domain")]
    NoDomain,
    /// The port does not exist, is bound already, or is not for us.
    #[error("the remote port is not one this domain may bind")]
    BadPort,
    /// This end was closed.
    #[error("the event channel is closed")]
    Closed,
    /// The hypervisor cannot be reached, or answered nonsense.
    #[error("the hypervisor cannot be reached")]
    Hypervisor,
}

impl EventError {
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

/// Makes event channels.
pub trait EventChannels {
    /// One end of a channel. Dropping it closes the end.
    type Channel: EventChannel + Send + 'static;

    /// Makes an end that `remote` may bind to (`EVTCHNOP_alloc_unbound`).
    ///
    /// # Errors
    /// [`EventError::NoPorts`], [`EventError::NoDomain`], [`EventError::Hypervisor`].
    fn alloc_unbound(&self, remote: DomId) -> Result<Self::Channel, EventError>;

    /// Binds to an end that `remote` made for us (`EVTCHNOP_bind_interdomain`). An event is
    /// pending on the new end at once, since one may have been sent before there was anybody to
    /// receive it.
    ///
    /// # Errors
    /// Any [`EventError`].
    fn bind_interdomain(&self, remote: DomId, port: Port) -> Result<Self::Channel, EventError>;
}

/// One end of an event channel.
pub trait EventChannel {
    /// The number of this end, in this domain.
    fn port(&self) -> Port;

    /// Wakes the other end.
    ///
    /// # Errors
    /// [`EventError::Closed`] or [`EventError::Hypervisor`]. An end that nobody is bound to
    /// swallows the event without error.
    fn notify(&self) -> Result<(), EventError>;

    /// Takes the pending event, if there is one. To be called before looking at shared memory, so
    /// that what comes after the look raises a new event.
    ///
    /// # Errors
    /// [`EventError::Closed`] or [`EventError::Hypervisor`].
    fn take(&self) -> Result<bool, EventError>;

    /// Keeps events from waking this end; they stay pending.
    fn mask(&self);

    /// Lets events wake this end again, at once if one is pending.
    fn unmask(&self);
}

//! Clients of a xenstore server.
//!
//! | client | transport | needs |
//! |---|---|---|
//! | [`Client`] | a Unix socket (`/run/xenstored/socket`, or any other), or Linux's `/dev/xen/xenbus` | `std` |
//! | [`RingClient`] | the shared page of a guest, `struct xenstore_domain_interface` | `alloc` |
//!
//! A client sends one request at a time and waits for its response. Events that arrive during the
//! wait are queued; equal ones are merged, and beyond [`EVENT_LIMIT`] they are reduced to one per
//! watch. [`Client`] is `AsFd`, so that a thread can wait on it together with other descriptors
//! and then take all events with [`Xenstore::poll_event`](crate::Xenstore::poll_event). Events may
//! be queued although the descriptor is not readable: poll for events before waiting on the
//! descriptor.
//!
//! Over `/dev/xen/xenbus` the client is a part of the kernel's own connection to the server. This
//! differs in three ways: watching the same path with the same token twice succeeds; so does
//! removing a watch that does not exist; and [`Op::ResetWatches`](crate::wire::Op::ResetWatches) is
//! rejected here, because it would remove all watches of the kernel.

mod connection;
#[cfg(feature = "std")]
mod descriptor;
mod events;
mod ring;
mod transport;

#[cfg(feature = "std")]
pub use descriptor::{Client, default_path};
pub use events::EVENT_LIMIT;
pub use ring::{RingClient, RingEvents};

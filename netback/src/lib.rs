//! The vif backend: virtual NICs for guests (`io/netif.h`).
//!
//! | module | contents |
//! |---|---|
//! | [`queue`] | a transmit and a receive ring, and the state machine between them and a port |
//! | [`port`] | [`NetPort`]: source and destination of packets |
//! | [`fault`] | reasons why a vif ends, and why a packet is dropped |
//! | [`stats`] | counters that any thread may read while the queue runs |
//! | [`session`] | a session of a guest: from mapped rings to running queues, without xenstore |
//! | [`vif`] | the device: from the toolstack's configuration to connected queues |
//! | [`wire`] | the size of a packet on the wire |
//!
//! *Transmit* (tx) is guest to port, *receive* (rx) is port to guest, as in the header. Data is copied,
//! by the hypervisor or as a [`Policy`](queue::Policy) requires. Only the guest's rings and its staged
//! pages (staging grants) stay mapped. Every packet is in private memory, in one piece, before any part
//! of it is parsed (XSA-155, XSA-423).
//!
//! The crate is `no_std` with `alloc`. It does no I/O and has no thread: its caller drives it by
//! [`Queue::poll`].
#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::arithmetic_side_effects, clippy::indexing_slicing))]

extern crate alloc;
#[cfg(feature = "std")]
extern crate std;

pub mod fault;
pub mod port;
pub mod queue;
pub mod session;
pub mod stats;
#[cfg(feature = "test-utils")]
pub mod test_utils;
pub mod vif;
pub mod wire;

pub use fault::{DropReason, Fault};
pub use port::NetPort;
pub use queue::{Features, Queue};
pub use session::{Session, SessionSpec};
pub use stats::Stats;
pub use vif::Vif;

//! The vif frontend: a guest's virtual NIC, for kernels and for user space.
//!
//! | module | holds |
//! |---|---|
//! | [`nic`] | the device: from the toolstack's words to a usable queue |
//! | [`queue`] | the data path: packets out, packets in |
//! | [`packet`] | checksums, segmentation, features, counters |
//! | [`received`] | a packet that came in, with all that is known of it |
//! | [`control`] | the control ring: steering; pages that the backend keeps mapped |
//! | [`steering`] | how packets are to be spread over the queues, and whether they are |
//! | [`groups`] | the multicast groups that are to be heard |
//! | [`fault`] | what a backend may have done that it must not |
//! | `phy` | with feature `smoltcp`: the NIC as a device of that TCP/IP stack |
//!
//! Every page is allocated zeroed and granted once, when the queue is made; packets are copied in
//! and out of them. So a packet costs no grant operation, nothing else of the guest's lies in a
//! page the backend can reach (XSA-403), and what is handed on is a private copy that the backend
//! cannot change any more.
#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::arithmetic_side_effects, clippy::indexing_slicing))]

extern crate alloc;

pub mod control;
pub mod fault;
pub mod groups;
pub mod nic;
pub mod packet;
#[cfg(feature = "smoltcp")]
pub mod phy;
pub mod queue;
pub mod received;
pub mod steering;

mod granted;
mod rx;
#[cfg(feature = "smoltcp")]
mod scratch;
mod session;
mod tx;

pub use control::Control;
pub use fault::{BackendFault, SendError, SetupError};
pub use groups::{GroupError, Groups, Hearing, group_of};
pub use nic::Nic;
pub use packet::{Checksum, Counters, Features, Gso};
pub use queue::Queue;
pub use received::Incoming;
pub use rx::HEADROOM_MAX;
pub use steering::{Hash, Refusal, Steering, SteeringError, SteeringState};

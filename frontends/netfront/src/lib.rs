//! The vif frontend: a guest's virtual NIC, for kernels and for user space.
//!
//! | module | contents |
//! |---|---|
//! | [`nic`] | the device: from the toolstack's configuration to a connected queue |
//! | [`queue`] | the data path: transmitted and received packets |
//! | [`packet`] | checksums, segmentation, features, counters |
//! | [`received`] | a received packet and its metadata |
//! | [`control`] | the control ring: steering, staging grants |
//! | [`steering`] | the distribution of packets over the queues, and its state |
//! | [`groups`] | the multicast groups to receive |
//! | [`fault`] | protocol violations by a backend |
//! | `phy` | with feature `smoltcp`: the NIC as a device of that TCP/IP stack |
//!
//! Every page is allocated zeroed and granted once, when the queue is created; packets are copied in
//! and out of these pages. So a packet needs no grant operation. A page that the backend can access
//! contains no other data of the guest (XSA-403). A received packet is a private copy that the backend
//! can no longer change.
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
mod shared_rings;
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

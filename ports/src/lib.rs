//! Ports for virtual NICs: where packets go to and come from on Linux, and a thread per queue that serves them.
//!
//! | port | where packets go |
//! |---|---|
//! | `tap_port` | to and from the kernel, by a `tap` |
//! | `afxdp` | to and from a queue of a network interface, past the host's stack |
//! | `switch` | to and from other vifs of this process |
//! | `file` | to a capture file, from another |
//!
//! Around any of them, in this order from the guest on:
//!
//! | wrapper | does |
//! |---|---|
//! | `capture` | copies what passes for whoever looks on |
//! | `guard` | drops what a guest sends under addresses that are not its own |
//! | `shape` | holds packets back that come too fast, and shares a rate between vifs |
//! | `faults` | loses, repeats, reorders, breaks and delays packets |
//!
//! `options` is the one grammar for all of that; `knobs` applies it to a vif that is served.
//!
//! [`host`] serves vifs, as a driver domain does, with a [`worker`] thread for each queue.
#![no_std]
#![cfg_attr(not(test), warn(clippy::arithmetic_side_effects, clippy::indexing_slicing))]

extern crate alloc;
extern crate std;

pub mod afxdp;
mod buffers;
pub mod capture;
mod cut;
pub mod faults;
pub mod file;
pub mod guard;
pub mod host;
pub mod knobs;
mod live;
mod netns;
mod open_vswitch;
pub mod options;
mod rate;
mod segment;
pub mod shape;
mod share;
pub mod switch;
pub mod tap;
mod tap_config;
pub mod tap_port;
mod vnet;
pub mod wait;
pub mod worker;

pub use pvio_netback::port::{
    Checksum, FRAME_MAX, Gso, NetPort, Offload, Packet, PacketBuf, PortError, WouldBlock,
};

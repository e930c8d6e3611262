//! Ports for virtual NICs on Linux, and a thread per queue that serves them. A port is the source and
//! destination of a NIC's packets.
//!
//! | port | connects a vif to |
//! |---|---|
//! | `tap_port` | the kernel, by a `tap` |
//! | `afxdp` | a queue of a network interface, bypassing the host's network stack |
//! | `switch` | other vifs of this process |
//! | `file` | a capture file to write, and one to read |
//!
//! Wrappers around a port, in this order from the guest on:
//!
//! | wrapper | effect |
//! |---|---|
//! | `capture` | copies packets for an observer |
//! | `guard` | drops packets that a guest sends under addresses that are not its own |
//! | `shape` | limits the packet and byte rate, and shares a rate between vifs |
//! | `faults` | loses, repeats, reorders, corrupts and delays packets |
//!
//! `options` parses the configuration of ports and wrappers; `settings` changes those of a connected vif.
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
mod netns;
mod open_vswitch;
pub mod options;
mod rate;
mod segment;
mod setting;
pub mod settings;
pub mod shape;
mod shared_rate;
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

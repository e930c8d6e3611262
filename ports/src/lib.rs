//! Ports for virtual NICs on Linux, and a thread per queue that serves them. A port is the source and
//! destination of a NIC's packets.
//!
//! | port | connects a vif to |
//! |---|---|
//! | [`tap`] | the kernel's network stack |
//! | [`afxdp`] | a queue of a network interface, bypassing the host's network stack |
//! | [`switch`] | other vifs of this process |
//! | [`mod@file`] | a capture file to write, and one to read; or back to the guest |
//!
//! [`wrappers`] around a port filter, limit, disturb and capture its packets. [`options`] parses the
//! configuration of ports and wrappers; [`settings`] changes the wrappers of a connected vif.
//!
//! [`host`] serves vifs, as a driver domain does, with a [`worker`] thread for each queue.
#![no_std]
#![cfg_attr(not(test), warn(clippy::arithmetic_side_effects, clippy::indexing_slicing))]

extern crate alloc;
extern crate std;

pub mod afxdp;
mod buffers;
pub mod capture_socket;
pub mod file;
pub mod host;
pub mod options;
pub mod pcapng;
pub mod queue_port;
mod segment;
pub mod settings;
pub mod switch;
pub mod tap;
pub mod wait;
pub mod worker;
pub mod wrappers;

pub use pvio_netback::port::{
    Checksum, FRAME_MAX, Gso, NetPort, Offload, Packet, PacketBuf, PortError, WouldBlock,
};

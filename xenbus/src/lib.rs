//! xenstore and xenbus: device discovery and negotiation between two domains.
//!
//! Xenstore is a small tree of keys on one server. The toolstack adds a device to it, in a directory
//! for the frontend and one for the backend. Both sides then write the features that they support, their
//! grants and event channels, and follow each other's state. This crate implements that protocol,
//! wire-compatible with Xen. Sources: `xen/include/public/io/{xs_wire,xenbus,blkif,netif}.h` and
//! `docs/misc/xenstore.txt`. The server is compared with Debian's `xenstored`.
//!
//! | module | contents | needs |
//! |---|---|---|
//! | [`wire`] | messages, operations, errors, paths, permissions as bytes | nothing |
//! | [`state`] | the nine xenbus states | nothing |
//! | [`device`] | state machines: the reaction to the other side's state | nothing |
//! | [`Xenstore`], [`transaction`] | the interface to any xenstore, as a device uses it | `alloc` |
//! | [`handshake`] | the keys of a disk and a network interface, as typed structs | `alloc` |
//! | [`client`] | a client over the shared page of a guest | `alloc` |
//! | [`client`] | a client over a Unix socket or `/dev/xen/xenbus` | `std` |
//!
//! A peer is hostile: every length, number and path is checked before it is used, every queue is
//! bounded, and no input from a peer can cause a panic. Not implemented here: devices other than disks
//! and network interfaces.
//!
//! # Example: from the creation of a device to its first offer
//! ```
//! # #[cfg(feature = "std")] {
//! use pvio_ring::DomId;
//! use pvio_xenbus::handshake::common::{self, BackendKind, DeviceAddr};
//! use pvio_xenbus::handshake::vbd;
//! use pvio_xenstored::server::Server;
//! use pvio_xenstored::Store;
//! use pvio_xenbus::{XenbusState, Xenstore, transaction};
//!
//! let server = Server::new(Store::default()).spawn()?;
//! let (driver, guest) = (DomId(1), DomId(2));
//!
//! // The toolstack, in dom0, creates the domains and the device.
//! let mut dom0 = server.connect_local(DomId::DOM0)?;
//! common::create_domain(&mut dom0, driver, "driver")?;
//! common::create_domain(&mut dom0, guest, "guest")?;
//! let addr = DeviceAddr::new(BackendKind::Vbd, driver, guest, 51712);
//! vbd::create_device(&mut dom0, addr, &vbd::ToolstackBack::new(addr, "/srv/disk.img"))?;
//!
//! // The driver domain finds the device and advertises its features.
//! let mut xs = server.connect_local(driver)?;
//! for device in common::list_backends(&mut xs, BackendKind::Vbd, driver)? {
//!     let offer = vbd::BackOffer { max_queues: Some(4), flush: true, ..Default::default() };
//!     transaction(&mut xs, |tx| {
//!         offer.write(tx, &device.backend_path())?;
//!         common::write_state(tx, &device.backend_path(), XenbusState::InitWait)
//!     })?;
//! }
//!
//! // The guest sees the state and reads the advertised features.
//! let mut xs = server.connect_local(guest)?;
//! let front = vbd::ToolstackFront::read(&mut xs, &addr.frontend_path())?;
//! xs.watch(&common::state_path(&front.backend), "backend")?;
//! assert!(xs.wait_event(None)?.is_some());
//! assert_eq!(common::read_state(&mut xs, &front.backend)?, XenbusState::InitWait);
//! assert!(vbd::BackOffer::read(&mut xs, &front.backend)?.flush);
//! # }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![cfg_attr(not(feature = "std"), no_std)]
#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::arithmetic_side_effects, clippy::indexing_slicing))]

#[cfg(any(feature = "alloc", test))]
extern crate alloc;

pub mod device;
pub mod state;
pub mod wire;

#[cfg(feature = "alloc")]
pub mod driver;
#[cfg(feature = "alloc")]
pub mod handshake;
#[cfg(feature = "test-utils")]
pub mod test_utils;
#[cfg(feature = "alloc")]
mod xenstore;

#[cfg(feature = "alloc")]
pub mod client;

pub use state::XenbusState;
#[cfg(feature = "alloc")]
pub use xenstore::{
    TRANSACTION_RETRIES, Tx, WatchEvent, Xenstore, XsError, concat_payload, transaction,
};

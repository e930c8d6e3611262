//! xenstore and xenbus: how two domains find each other and agree on a device.
#![cfg_attr(not(feature = "std"), no_std)]
#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    warn(clippy::arithmetic_side_effects, clippy::indexing_slicing)
)]

#[cfg(any(feature = "alloc", test))]
extern crate alloc;

pub mod state;
pub mod wire;

pub mod device;

#[cfg(feature = "alloc")]
pub mod driver;
#[cfg(feature = "alloc")]
pub mod handshake;
#[cfg(feature = "alloc")]
pub mod store;
#[cfg(feature = "alloc")]
mod xenstore;

#[cfg(feature = "std")]
pub mod client;
#[cfg(feature = "std")]
pub mod server;

pub use state::XenbusState;
#[cfg(feature = "alloc")]
pub use xenstore::{TRANSACTION_RETRIES, Tx, WatchEvent, Xenstore, XsError, transaction};

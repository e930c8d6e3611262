//! Shared memory, ring index arithmetic and Xen PV wire formats. This crate is the lowest layer of
//! pvio and can be embedded in any hypervisor, kernel or firmware: `no_std`, and without allocation unless the feature `alloc` is on.
//!
//! | module | contents |
//! |---|---|
//! | [`shm`] | the only code that accesses memory shared with a peer |
//! | [`indices`] | the notification protocol, in three phases, model-checked |
//! | [`front`], [`back`] | [`FrontRing`] and [`BackRing`]: both sides of a ring of 1 to 32 pages |
//! | [`byte_ring`] | [`ByteRing`]: the byte streams of console and xenstore |
//! | `inflight` | the record of requests in flight, which persists when a process dies (feature `alloc`) |
//! | [`error`] | how errors are shown: causes and remedies |
//! | [`proto`] | wire structs for each ABI, parsed into validated values and written from them |
//!
//! A [`FrontRing`] publishes requests and consumes responses; a [`BackRing`] does the opposite:
//! ```
//! use pvio_ring::shm::HeapMemory;
//! use pvio_ring::{BackRing, FrontRing};
//!
//! let page = HeapMemory::pages(1);
//! let mut front = FrontRing::init(page.clone(), 16)?;
//! let mut back = BackRing::attach(page, 16)?;
//!
//! front.push(&[7; 16])?;
//! assert!(front.publish(), "the backend requested a notification");
//!
//! let mut request = [0; 16];
//! back.pop()?.expect("a request").read(&mut request)?;
//! assert_eq!(request, [7; 16]);
//! back.push(&[9; 16])?;
//! back.publish();
//!
//! let mut response = [0; 16];
//! front.pop()?.expect("a response").read(&mut response)?;
//! assert_eq!(response, [9; 16]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![no_std]
#![warn(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

/// Whether a fault is planted here, for the simulator. `false` in every build without
/// `--cfg pvio_planted`.
#[cfg(not(pvio_planted))]
#[doc(hidden)]
#[macro_export]
macro_rules! planted {
    ($fault:ident) => {
        false
    };
}

/// Whether a fault is planted here, for the simulator.
#[cfg(pvio_planted)]
#[doc(hidden)]
#[macro_export]
macro_rules! planted {
    ($fault:ident) => {
        $crate::planted::is_planted($crate::planted::Fault::$fault)
    };
}

#[cfg(feature = "alloc")]
extern crate alloc;

pub mod back;
pub mod byte_ring;
mod directions;
pub mod error;
pub mod front;
pub mod indices;
#[cfg(feature = "alloc")]
pub mod inflight;
#[cfg(pvio_planted)]
pub mod planted;
pub mod proto;
pub mod shm;

mod domid;
mod gref;
mod io_seg;
mod layout;

pub use back::BackRing;
pub use byte_ring::ByteRing;
pub use domid::DomId;
pub use front::FrontRing;
pub use gref::GrantRef;
pub use io_seg::IoSeg;
pub use layout::{Full, RingFault, RingLayout};
pub use shm::slot::{ShortSlot, Slot, SlotMut};

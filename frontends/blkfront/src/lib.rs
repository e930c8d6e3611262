//! The vbd frontend: a guest's virtual disk, for kernels and for user space.
//!
//! | module | contents |
//! |---|---|
//! | [`disk`] | the device: from the toolstack's configuration to a connected queue |
//! | [`queue`] | the data path: slots with granted buffers, requests, responses |
//! | `blocking` | with feature `std`: a disk for user space with blocking calls, which reconnects |
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(feature = "std")]
extern crate std;

#[cfg(feature = "std")]
pub mod blocking;
pub mod disk;
pub mod queue;

pub use disk::{Disk, RequestedFeatures, Trust};
pub use queue::{
    BackendFault, FlushBy, Op, Queue, QueueLimits, SLOT_BYTES, SetupError, Shape, SlotId,
    StartError,
};

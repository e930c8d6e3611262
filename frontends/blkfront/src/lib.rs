//! The vbd frontend: a guest's virtual disk, for kernels and for user space.
//!
//! | module | holds |
//! |---|---|
//! | [`queue`] | the data path: slots with granted buffers, requests, answers |
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod queue;

pub use queue::{BackendFault, Op, Queue, SLOT_BYTES, SetupError, SlotId, StartError};

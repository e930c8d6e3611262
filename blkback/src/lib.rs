//! The vbd backend: virtual disks for guests.
//!
//! | module | holds |
//! |---|---|
//! | [`queue`] | one queue: from a ring's requests to an engine's operations and back |
//! | [`path`] | the ways to a guest's pages, and which of them a disk is to take |
//! | [`pages`] | these ways, and what memory they take |
//! | [`vbd`] | the device: from the toolstack's words to served queues |
//! | [`engine`] | storage, as a queue uses it: [`engine::BlockEngine`] |
//!
//! The core (all but feature `std`) is `no_std` with `alloc`: it does no I/O and has no thread, and
//! runs alike under a worker thread (`pvio-storage`), in a kernel, in the simulator and in a fuzzer.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(feature = "std")]
extern crate std;

mod config;
pub mod engine;
mod live;
pub mod pages;
pub mod path;
pub mod queue;
mod stats;
pub mod vbd;

pub use config::Config;
pub use engine::{BlockEngine, EngineError, Geometry};
pub use live::Live;
pub use pages::Buf;
pub use path::{DataPath, Policy};
pub use queue::{Progress, Queue, QueueFault, QueueParts, QueueRecord};
pub use stats::{Counter, Stats};
pub use vbd::{Serve, Vbd};

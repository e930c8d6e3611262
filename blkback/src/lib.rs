//! The vbd backend: virtual disks for guests (`io/blkif.h`).
//!
//! | module | contents |
//! |---|---|
//! | [`queue`] | one queue: converts a ring's requests to engine operations, and results to responses |
//! | [`path`] | the policies for access to a guest's pages, and the choice of one for a disk |
//! | [`pages`] | the implementation of these policies and their memory |
//! | [`vbd`] | the device: from the toolstack's configuration to a session |
//! | [`session`] | a session: from its description to running queues |
//! | [`engine`] | [`engine::BlockEngine`]: the interface of a queue to storage |
//!
//! The core (all but feature `std`) is `no_std` with `alloc`. It does no I/O and has no thread. It runs
//! in a worker thread (`pvio-storage`), in a kernel, in the simulator and in a fuzzer.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(feature = "std")]
extern crate std;

mod config;
mod disk_state;
pub mod engine;
pub mod pages;
pub mod path;
pub mod queue;
pub mod session;
mod stats;
#[cfg(feature = "test-utils")]
pub mod test_utils;
pub mod vbd;

pub use config::Config;
pub use disk_state::DiskState;
pub use engine::{BlockEngine, EngineError, Geometry};
pub use pages::Buf;
pub use path::{DataPath, Policy};
pub use queue::{Progress, Queue, QueueFault, QueueParts, QueueRecord};
pub use session::{Begin, QueueServer, Session, SessionIdentity, SessionParts, SessionSpec};
pub use stats::{Counter, Stats};
pub use vbd::{Vbd, VbdServer};

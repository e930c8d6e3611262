//! Engines for files, devices, memory and servers, and wrappers that apply to any engine.
//!
//! | engine | storage |
//! |---|---|
//! | [`uring::UringEngine`] | a file or block device, through io_uring |
//! | [`device::DeviceEngine`] | the same, with threads that flush, and discard where only blocking calls can |
//! | [`ram::RamEngine`] | memory that queues share; synchronous |
//! | [`offload::Offload`] | the storage of an executor: [`offload::ThreadPool`] (a format's library), [`nbd::NbdLink`] (a server) |
//!
//! A worker waits on its engine: [`wait::WaitEngine`]. These wrappers apply to any such engine, and
//! to each other:
//!
//! | wrapper | function |
//! |---|---|
//! | [`throttle::Throttle`] | limits operations and bytes per second; the limits can be changed at runtime |
//! | [`pause::Pausing`] | holds operations while the storage is full |
//! | [`faults::Faults`] | delays operations and makes some of them fail, by a seed |
//! | [`trace::Traced`] | writes a trace of the operations that fio can replay |
//! | [`record::Recorded`] | records all writes, to determine the state of the disk after a power loss |

pub mod device;
pub mod flusher;
mod lists;
pub mod nbd;
pub mod offload;
pub mod ram;
pub mod store;
pub(crate) mod threads;
pub mod uring;
pub mod wait;
mod wrappers;

pub use pvio_blkback::engine::clock;
pub use pvio_blkback::engine::{
    BlockEngine, Discard, Done, EngineError, FlushState, Full, Geometry, Io, Pauses, Segments,
};
pub use uring::IoMode;
pub use wrappers::{faults, pause, record, throttle, trace, unflushed};

//! Engines over files, devices, memory and servers, and wrappers that can be put around any engine.
//!
//! | engine | keeps data in |
//! |---|---|
//! | [`uring::UringEngine`] | a file or block device, through io_uring |
//! | [`device::DeviceEngine`] | the same, with threads that flush, and discard where only blocking calls can |
//! | [`ram::RamEngine`] | memory that queues share; done at once |
//! | [`offload::Offload`] | wherever an executor keeps it: [`thread_pool::ThreadPool`] (a format's library), [`nbd::NbdLink`] (a server) |
//!
//! A worker waits on its engine: [`wait::WaitEngine`]. These are put around any such engine, and
//! around each other:
//!
//! | wrapper | does |
//! |---|---|
//! | [`throttle::Throttle`] | keeps a disk to operations and bytes a second, which can be changed while it runs |
//! | [`faults::Faults`] | makes operations slow, and some of them fail, by a seed |
//! | [`trace::Traced`] | writes down what is asked for, as fio replays it |
//! | [`record::Recorded`] | keeps all that is written, to find out what a loss of power would leave |

pub mod device;
pub mod faults;
pub mod flusher;
mod io_mode;
mod lists;
pub mod nbd;
pub mod offload;
pub mod ram;
pub mod record;
pub mod store;
pub mod thread_pool;
pub mod throttle;
pub mod trace;
pub mod uring;
pub mod wait;

pub use io_mode::IoMode;
pub use pvio_blkback::engine::clock;
pub use pvio_blkback::engine::{
    BlockEngine, Discard, Done, EngineError, FlushState, Full, Geometry, Io, Segments,
};

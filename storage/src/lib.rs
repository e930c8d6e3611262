//! Storage for virtual disks: engines, image formats, and a thread per queue that serves them.
//!
//! | module | contents |
//! |---|---|
//! | [`engine`] | engines over io_uring, devices, memory, thread pools and NBD servers; wrappers |
//! | [`image`] | disk images: formats (raw, qcow2, VHD, VMDK), overlays, options, inspection |
//! | [`host`] | serves vbds from images, as a driver domain does |
//! | [`calls`] | system calls of an open disk, for a filter that confines its process |
//! | [`worker`] | one thread per queue, which waits on one io_uring |
//!
//! `pvio-blkback` contains the rings, the data path and the device. Its only interface to storage is the
//! trait [`BlockEngine`](engine::BlockEngine).
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
extern crate std;

mod budgets;
pub mod calls;
pub mod engine;
pub mod host;
pub mod image;
pub mod worker;

pub use budgets::MappingBudgets;

//! Disks on every kind of storage, through frontend, ring and backend. One test program, because
//! most of the compile time is for shared code.

#[path = "../support/mod.rs"]
mod support;

mod device;
mod direct;
mod formats;
mod media;
mod nbd;
mod pause;
mod qcow2;
mod ram;
mod recovery;
mod references;
mod wrappers;

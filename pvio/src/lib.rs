//! pvio, the command: a hosted hypervisor, a driver domain and a guest as three processes.
//!
//! | module | holds |
//! |---|---|
//! | [`guest`] | the guest: a read-only file system on its disk, an HTTP server on its NIC |
//! | [`driver`] | the driver domain: serves every device the toolstack makes for it |
//! | [`demo`] | the demo image, made when no `--disk` is given |
#![forbid(unsafe_code)]

pub mod demo;
pub mod driver;
pub mod guest;

//! Disks kept in everything a disk can be kept in, through frontend, ring and backend. One program,
//! since what they have in common takes a compiler longest.
#![cfg(feature = "std")]

#[path = "../support/mod.rs"]
mod support;

mod device;
mod formats;
mod nbd;
mod qcow2;
mod ram;
mod references;
mod wrappers;

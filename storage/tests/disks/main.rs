//! Disks kept in everything a disk can be kept in, through frontend, ring and backend. One program,
//! since what they have in common takes a compiler longest.

#[path = "../support/mod.rs"]
mod support;

mod device;
mod direct;
mod formats;
mod media;
mod nbd;
mod qcow2;
mod ram;
mod recovery;
mod references;
mod wrappers;

//! Shared memory, ring index arithmetic and Xen PV wire formats.
#![no_std]

mod domid;

pub use domid::DomId;

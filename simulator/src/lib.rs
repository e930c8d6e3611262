//! Whole devices in one thread, driven by a seed.
//!
//! | module | contents |
//! |---|---|
//! | [`disk`] | guests with disks, and the driver domain that serves them |
//! | [`net`] | guests with NICs, and the driver domain that connects them |
//! | [`explore`] | many seeds on all cores, the reduction of a failure, and its replay |
//! | `planted` | number of seeds after which each planted fault is found (`--cfg pvio_planted`) |
//!
//! The platform is [`pvio_sim`]; backends, frontends and xenstore are the real ones.

#![forbid(unsafe_code)]
#![allow(missing_docs, reason = "a program, not a library for others")]

pub mod disk;
pub mod explore;
pub mod net;
#[cfg(pvio_planted)]
pub mod planted;

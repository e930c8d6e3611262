//! Machines that exist only inside one process, for tests of everything above the platform.
//!
//! | module | holds |
//! |---|---|
//! | [`local`] | [`LocalMachine`]: domains in one address space, with real grant tables and event bits |

#![forbid(unsafe_code)]

pub mod local;

pub use local::{LocalDomain, LocalMachine};

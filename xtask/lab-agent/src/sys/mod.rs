//! Functions that the standard library lacks.

pub mod modules;
pub mod mount;
pub mod run;
pub mod took;
pub mod uptime;

pub use run::{run, succeed};

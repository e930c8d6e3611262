//! A device process: serves one session, with nothing but the descriptors that it was handed.
//!
//! Order of start: privileges are dropped before there are threads; then the rings are mapped and
//! the queues' threads started, which wait; then system calls are restricted, for all threads; only
//! then is anything served that a guest wrote.

mod control;
mod handed;
mod serving;

pub use control::{Control, Descriptors, Received};
pub use handed::{Handed, resumed_or_new, unusable};
pub use serving::{Filtered, Serving, serve};

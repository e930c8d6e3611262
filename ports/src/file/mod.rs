//! A vif that is connected to files, or whose packets are looped back to the guest.
//!
//! The packets of a capture file (pcap or pcapng, Ethernet) are sent to the guest once, as fast as
//! it receives them, from the time that it connects. The packets that the guest sends are recorded
//! in a [`pcapng`](crate::pcapng) file.
#![forbid(unsafe_code)]

mod port;
mod recording;
mod replay;

pub use port::{FilePort, FileQueue};
pub use recording::Recording;
pub use replay::{packets_in, packets_of};

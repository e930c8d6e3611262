//! Taps: network interfaces of the kernel whose packets this process reads and writes.
//!
//! | file | contents |
//! |---|---|
//! | `config` | configuration of a tap, and why one cannot be created |
//! | `device` | the `ioctl`s of the driver: create and open a tap, set it up |
//! | `queues` | the queues of one interface |
//! | `open_vswitch`, `netns` | bridges of Open vSwitch; network namespaces |
//! | `port` | moves packets, by io_uring |
//! | `vnet` | the header before each packet |
//! | `vlan` | segmentation of packets with a VLAN tag |

mod config;
mod device;
mod netns;
mod open_vswitch;
mod port;
mod queues;
mod vlan;
mod vnet;

pub use config::{HOST_MAC, TapConfig, TapError};
pub use device::{Tap, VNET_HEADER};
pub use netns::inside;
pub use port::TapPort;
pub(crate) use queues::TapQueues;

//! Virtual network interfaces (`io/netif.h`).

mod mac;
mod negotiated;
mod offer;
mod request;
mod toolstack;

pub use mac::{Mac, MacError};
pub use negotiated::{Negotiated, Offloads};
pub use offer::{BackOffer, FrontLimits};
pub use request::{
    ControlRing, EventChannels, FrontRequest, Queue, multicast_request_path,
    read_multicast_request, read_xdp_headroom, write_multicast_request, write_xdp_headroom,
};
pub use toolstack::{
    ToolstackBack, ToolstackFront, VifRate, create_backend, create_device, is_live, rate_path,
    read_carrier, read_rate, write_carrier,
};

/// Maximum number of queues of an interface, whatever is advertised. Linux advertises at most 8.
pub const MAX_QUEUES: u32 = 256;

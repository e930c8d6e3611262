//! Virtual disks (`io/blkif.h`).

mod negotiated;
mod offer;
mod request;
mod toolstack;

pub use negotiated::Negotiated;
pub use offer::{
    BackDisk, BackOffer, Discard, DiskInfo, FrontLimits, FrontPlan, announce_resize,
    read_sector_size,
};
pub use request::{FrontRequest, Protocol, Queue};
pub use toolstack::{
    Backing, DeviceType, Mode, OWN_KIND, OWN_SCRIPT, ToolstackBack, ToolstackFront, change_media,
    changes_live, create_backend, create_device, create_device_with,
};

/// Maximum order of a ring, as a power of two of pages: 32 pages. Linux's backend advertises 4,
/// FreeBSD's 5.
pub const MAX_RING_PAGE_ORDER: u32 = 5;

/// Maximum number of queues of a device, whatever is advertised.
pub const MAX_QUEUES: u32 = 256;

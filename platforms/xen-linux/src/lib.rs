//! The platform for a Linux domain on Xen: dom0, a driver domain, or any guest.
//!
//! It uses the devices that Linux provides for user space, without a C library of Xen. It never opens
//! `privcmd`, which gives control over every domain.
//!
//! | module | contents |
//! |---|---|
//! | `domain` | [`XenDomain`]: the platform of a device |
//! | `mapping` | access to pages of other domains, mapped or copied (`/dev/xen/gntdev`) |
//! | `pages` | pages that this domain grants (`/dev/xen/gntalloc`) |
//! | `events` | event channels (`/dev/xen/evtchn`) |
//! | `device`, `descriptors` | the platform of a device process, made from descriptors |
//! | `devices`, `error` | opening the devices; remedies when they are missing |
//! | `sys` | `ioctl`s and memory mappings: all `unsafe` code of the crate |
//!
//! # Requirements
//!
//! | | for | kernel module |
//! |---|---|---|
//! | `/dev/xen/gntdev` | mapping and copying | `xen-gntdev` |
//! | `/dev/xen/evtchn` | event channels | `xen-evtchn` |
//! | `/dev/xen/gntalloc` | granting: frontends only | `xen-gntalloc` |
//! | `/dev/xen/xenbus` or xenstored's socket | xenstore | built in |
//!
//! These devices belong to root. A service needs only permission to read and write them. [`OpenError`]
//! reports what is missing, with a remedy.
//!
//! # Device processes
//!
//! A process that serves one device needs no right to open these devices. Its supervisor opens
//! descriptors with [`DevicePlatform::device_descriptors`](pvio_event_channel::DevicePlatform), and
//! the process makes its [`XenDomain`] from them.
//!
//! # Mapping, copying and cached mappings
//!
//! Mapping takes the same small number of system calls for one page as for 256, plus a cost for each
//! page; so does unmapping. Both hold a lock of the whole process. Copying takes one system call for
//! 64 pages and no lock. A cached mapping has no further cost. `examples/grantcost.rs`
//! measures all of them.
//!
//! # Example
//! ```no_run
//! use pvio_event_channel::{EventChannel, EventChannels, Port};
//! use pvio_grant_table::{Access, DomId, GrantMapper, GrantRef};
//! use pvio_ring::shm::Region;
//! use pvio_xen_linux::XenDomain;
//! use pvio_xenbus::Xenstore;
//!
//! let domain = XenDomain::open()?;
//! println!("this is domain {}", domain.id());
//!
//! // Domain 3 has granted a page to this domain and published its number in xenstore.
//! let mut xenstore = domain.xenstore()?;
//! let node = xenstore.read("/local/domain/3/data/greeting")?;
//! let gref = GrantRef(String::from_utf8(node)?.parse()?);
//!
//! let page = domain.map(DomId(3), &[gref], Access::ReadWrite)?;
//! let channel = domain.bind_interdomain(DomId(3), Port(17))?;
//! page.write_bytes(0, b"hello");
//! channel.notify()?;
//! while !channel.wait(None)? {}
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod descriptors;
mod device;
mod devices;
mod domain;
mod error;
mod events;
mod granter;
mod mapping;
mod pages;
mod sys;

pub use device::{DEVICE_IOCTLS, DeviceDescription, EventRestriction};
pub use domain::XenDomain;
pub use error::{NotifyError, OpenError};
pub use events::Channel;
pub use mapping::{Mapping, UnmapNotify};
pub use pages::{Lease, Pages};
pub use sys::gntdev::Grants;
pub use sys::memory::Held;

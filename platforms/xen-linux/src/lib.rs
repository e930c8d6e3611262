//! A Linux domain on real Xen: dom0, a driver domain, or any guest.
//!
//! Everything goes through the devices Linux has for it, from user space and without a C library
//! of Xen's. `privcmd`, which could do anything to anybody, is never opened.
//!
//! | module | holds |
//! |---|---|
//! | `domain` | [`XenDomain`]: what a device is given as its platform |
//! | `mapping` | using pages of others, mapped or copied (`/dev/xen/gntdev`) |
//! | `pages` | granting pages of our own (`/dev/xen/gntalloc`) |
//! | `events` | event channels (`/dev/xen/evtchn`) |
//! | `devices`, `error` | opening the devices; what to do when they are not there |
//! | `sys` | the `ioctl`s and mappings below: all the `unsafe` there is |
//!
//! # What it takes
//!
//! | | for | kernel module |
//! |---|---|---|
//! | `/dev/xen/gntdev` | mapping and copying | `xen-gntdev` |
//! | `/dev/xen/evtchn` | event channels | `xen-evtchn` |
//! | `/dev/xen/gntalloc` | granting, so for frontends only | `xen-gntalloc` |
//! | `/dev/xen/xenbus` or xenstored's socket | xenstore | built in |
//!
//! They belong to root; a service needs no more than to read and write these. What is missing is
//! told by [`OpenError`], in words that say what to do.
//!
//! # Map, copy, or keep mapped
//!
//! Mapping costs the same few system calls for one page as for 256, and then something for each
//! page; unmapping again; both under a lock of the whole process. Copying needs one system call for
//! 64 pages and takes no lock. What is kept mapped costs nothing more. `examples/grantcost.rs`
//! measures all of them.
//!
//! # Example
//!
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
//! // What domain 3 granted us and told us through xenstore.
//! let mut xenstore = domain.xenstore()?;
//! let node = xenstore.read("/local/domain/3/data/greeting")?;
//! let gref = GrantRef(String::from_utf8(node)?.parse()?);
//!
//! let page = domain.map(DomId(3), &[gref], Access::ReadWrite)?;
//! let bell = domain.bind_interdomain(DomId(3), Port(17))?;
//! page.write_bytes(0, b"hello");
//! bell.notify()?;
//! while !bell.wait(None)? {}
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod devices;
mod domain;
mod error;
mod events;
mod granter;
mod mapping;
mod pages;
mod sys;

pub use domain::XenDomain;
pub use error::{NotifyError, OpenError};
pub use events::Channel;
pub use mapping::{Mapping, UnmapNotify};
pub use pages::{Lease, Pages};
pub use sys::gntdev::Grants;
pub use sys::memory::Held;

//! The hosted hypervisor: domains are processes of one Linux machine.
//!
//! This is pvio's default platform. It needs neither Xen nor privileges. Devices see the same interfaces
//! as on Xen: a version 1 grant table, two-level event channels, xenstore in its wire format.
//!
//! | on Xen | here |
//! |---|---|
//! | a domain | a process that has [joined](Domain::join) with a domain id of the [`Hypervisor`], and the processes of its devices |
//! | its memory | a memfd of fixed length: grant table first, then pages to share |
//! | mapping a grant | a compare-and-exchange in the granting domain's table, without a system call |
//! | an event channel | a page with pending and mask bits, and an eventfd to wake each end |
//! | hypercalls for ports | 16-byte packets on a Unix socket |
//!
//! A domain maps the whole memory of another domain when it first maps one of its grants. A grant mapping
//! is a pointer into that.
//!
//! | module | contents |
//! |---|---|
//! | `hypervisor`, `server` | the interface for the embedding program; the hypervisor's thread |
//! | `machine`, `ports`, `ends`, `names` | the hypervisor's state; xenstore |
//! | `device` | the platform of a device process |
//! | `domain`, `pages`, `peers`, `mapping`, `events` | a domain: join, grant, map, notify |
//! | `layout`, `protocol` | the memory layout, the socket protocol |
//! | `mem`, `socket`, `statedir`, `connection` | operating system: mappings, packets, the directory |
//!
//! # Several processes of one domain
//!
//! The process that joined as a domain, the supervisor, can create *device connections*
//! ([`DevicePlatform`](pvio_event_channel::DevicePlatform)). Each is a socket for a process that
//! serves one device of one other domain and may open nothing. A process that has only that socket
//! gets the memory of this one domain, binds only its ports, and shares no event with other
//! processes.
//!
//! - When a process ends in any way, the ports that it opened are closed, and its uses of grants end.
//!   Those of other processes of the domain stay. A successor can map the same grants and bind the
//!   same ports.
//! - A domain exists until its last connection ends. So device processes keep serving without a
//!   supervisor, and another process can join as the domain.
//! - A [`rejoinable`](DomainConfig::rejoinable) domain exists until it is
//!   [destroyed](Hypervisor::destroy_domain), even without any process.
//!
//! # Protection
//!
//! - **Crashes.** When the last process of a domain ends in any way, the domain is removed: its ports
//!   close, the grants that it had mapped are free for their owners, and the embedding process gets a
//!   [`HypervisorEvent`]. Pages of the domain that others have mapped stay readable until they are
//!   unmapped.
//! - **Invalid values.** Values in another domain's grant table or event bits are bounded before use. No
//!   frame outside the sharable ones is accessed. No file can be truncated under a mapping. Invalid
//!   messages on the socket close that one connection.
//! - **Errors in a program.** A page that is granted is not allocated again before the grant has ended,
//!   even if its owner dropped it. A grant in use cannot be ended. A read-only grant cannot be
//!   written through its mapping.
//!
//! # Limits of the protection
//!
//! Grants, ports and memory files are checked when a process asks for them. What a process does with
//! the memory that it has is not checked, since no hardware does it. Unlike on Xen, a process that
//! *deliberately* bypasses this library can
//!
//! - read and write **all** sharable memory of every domain that has granted its domain any page,
//!   because it has that domain's whole memfd; a device process has that of its frontend only;
//! - overwrite that domain's grant table, also for other devices of that domain;
//! - raise and clear the events of both ends of the event channels that it has bound, also after it
//!   has closed them. Therefore the supervisor must end a process before it starts a successor.
//!
//! Processes of one user can besides join as any domain without a process, and trace, kill or stop
//! each other. A device process that runs as another user, or is confined by seccomp, cannot.
//!
//! Other users are excluded by the socket's mode, by a check of the peer's credentials, and by checks of
//! the directory. A directory is rejected if another user owns it, can write in it, or could
//! have placed a symbolic link to it. Untrusted guests belong on Xen. Hosted mode is for embedding,
//! development and tests.
//!
//! # Example
//!
//! Two domains share a page and notify each other. Here they are two threads of one process; two
//! processes work the same way.
//! ```
//! use pvio_event_channel::{EventChannel, EventChannels};
//! use pvio_grant_table::{Access, GrantMapper, Granter};
//! use pvio_hosted::{Domain, DomainConfig, Hypervisor};
//! use pvio_ring::shm::Region;
//!
//! let dir = tempfile::tempdir()?;
//! let hypervisor = Hypervisor::start(dir.path())?;
//! let front = hypervisor.create_domain(DomainConfig::new("guest"))?;
//! let back = hypervisor.create_domain(DomainConfig::new("driver-domain"))?;
//!
//! // The guest grants a page and allocates a port. It would publish both numbers in xenstore.
//! let guest = Domain::join(dir.path(), front)?;
//! let page = guest.alloc_pages(1)?;
//! let gref = guest.grant(back, &page, 0, Access::ReadWrite)?;
//! let channel = guest.alloc_unbound(back)?;
//! let port = channel.port();
//!
//! let state_dir = dir.path().to_owned();
//! let driver = std::thread::spawn(move || {
//!     let driver = Domain::join(state_dir, back).unwrap();
//!     let page = driver.map(front, &[gref], Access::ReadWrite).unwrap();
//!     let channel = driver.bind_interdomain(front, port).unwrap();
//!     page.write_bytes(0, b"hello").unwrap();
//!     channel.notify().unwrap();
//! });
//!
//! channel.wait(None)?;
//! let mut greeting = [0; 5];
//! page.read_bytes(0, &mut greeting);
//! assert_eq!(&greeting, b"hello");
//! # driver.join().unwrap();
//! guest.end_access(gref)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod config;
mod connection;
mod device;
mod domain;
mod ends;
mod error;
mod events;
mod granter;
mod hypervisor;
mod layout;
mod machine;
mod mapping;
mod mem;
mod names;
mod pages;
mod peers;
mod ports;
mod protocol;
mod server;
mod shared;
mod socket;
mod statedir;

pub use config::{DomainConfig, DomainInfo};
pub use device::DeviceDescription;
pub use domain::Domain;
pub use error::{DeviceError, DomainError, JoinError, StartError, XenstoreError};
pub use events::Channel;
pub use hypervisor::Hypervisor;
pub use mapping::{Mapping, Pin};
pub use mem::Held;
pub use pages::{Lease, Pages};
pub use shared::HypervisorEvent;

/// The examples of the book's page about embedding.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/embedding.md")]
struct Book;

//! The hosted hypervisor: domains are processes of one Linux machine.
//!
//! The embedded default of pvio: no Xen, no privileges. What devices see is what they see on
//! Xen: a version 1 grant table, two-level event channels, xenstore in its wire format.
//!
//! | on Xen | here |
//! |---|---|
//! | a domain | a process that [joined](Domain::join) under a number the [`Hypervisor`] gave out |
//! | its memory | a memfd of fixed length: grant table first, then pages to share |
//! | mapping a grant | a compare-and-exchange in the granting domain's table and a pointer into its memory, mapped whole at the first use: no system call |
//! | an event channel | pending and mask bits in shared memory, and an eventfd when somebody is to be woken |
//! | hypercalls for ports | 16-byte packets on a Unix socket |
//!
//! | module | holds |
//! |---|---|
//! | `hypervisor`, `server`, `machine`, `names` | the hypervisor: what embeds it calls, its thread, what it knows, xenstore |
//! | `domain`, `pages`, `peers`, `mapping`, `events` | a domain: joining, giving, using, waking |
//! | `layout`, `protocol` | what lies where in memory, what is said on the socket |
//! | `mem`, `socket`, `statedir`, `connection` | the machine below: mappings, packets, the directory |
//!
//! # What it protects against
//!
//! - **Crashes.** A process that ends, however it does, takes its domain with it: its ports close,
//!   what it had mapped is its owner's again, the embedding process is [told](HypervisorEvent).
//!   What others had mapped of it stays readable until they let go of it.
//! - **Bad values.** Whatever stands in another domain's grant table or event bits is bounded
//!   before it is used: no frame outside the sharable ones is ever reached, no file gets shorter
//!   under a mapping, and nonsense on the socket closes that one connection.
//! - **Mistakes.** A page that is granted is not handed out again before the grant was taken back,
//!   even if its owner dropped it; a page in use cannot be taken back; a read-only grant cannot be
//!   written through its mapping.
//!
//! # What it does not protect against
//!
//! Processes of one user are not walls. Unlike on Xen, a process that *deliberately* steps outside
//! this library can
//!
//! - read and write **all** sharable memory of every domain that granted it anything, for it holds
//!   that domain's whole memfd;
//! - scribble over that domain's grant table, and over the event bits of every domain it shares an
//!   event channel with (whoever is scribbled on loses wake-ups or pages; nothing crashes);
//! - join as any domain that no process is yet, and trace, kill or stop other processes of the user.
//!
//! Other users are kept out by the socket's mode, by a check of who is at its other end, and by the
//! directory: one that another user owns, may write in, or could have put a symbolic link to is refused. Guests
//! that are not trusted belong on Xen; hosted mode is for embedding, development and tests.
//!
//! # Example
//!
//! Two domains share a page and wake each other; here two threads of one process, and processes
//! do the same.
//!
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
//! // The guest grants a page, allocates a port, and (through xenstore) says which they are.
//! let guest = Domain::join(dir.path(), front)?;
//! let page = guest.alloc_pages(1)?;
//! let gref = guest.grant(back, &page, 0, Access::ReadWrite)?;
//! let bell = guest.alloc_unbound(back)?;
//! let port = bell.port();
//!
//! let state_dir = dir.path().to_owned();
//! let driver = std::thread::spawn(move || {
//!     let driver = Domain::join(state_dir, back).unwrap();
//!     let page = driver.map(front, &[gref], Access::ReadWrite).unwrap();
//!     let bell = driver.bind_interdomain(front, port).unwrap();
//!     page.write_bytes(0, b"hello").unwrap();
//!     bell.notify().unwrap();
//! });
//!
//! bell.wait(None)?;
//! let mut greeting = [0; 5];
//! page.read_bytes(0, &mut greeting);
//! assert_eq!(&greeting, b"hello");
//! # driver.join().unwrap();
//! guest.end_access(gref)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod config;
mod connection;
mod domain;
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
mod protocol;
mod server;
mod shared;
mod socket;
mod statedir;

pub use config::{DomainConfig, DomainInfo};
pub use domain::Domain;
pub use error::{DomainError, JoinError, StartError, XenstoreError};
pub use events::Channel;
pub use hypervisor::Hypervisor;
pub use mapping::{Mapping, Pin};
pub use mem::Held;
pub use pages::{Lease, Pages};
pub use shared::HypervisorEvent;

/// The examples of the book's page on embedding.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/embedding.md")]
struct Book;

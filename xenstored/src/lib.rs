//! An embedded xenstored, for use inside another process.
//!
//! [`Store`] holds the tree, its permissions, transactions and watches, and enforces the
//! [`Quota`]s. It takes requests as bytes and returns responses and events as bytes. It opens no
//! descriptor and reads no clock, so it runs equally behind sockets ([`server`], feature `std`),
//! behind the shared pages of domains ([`RingConnection`]), and in a simulator ([`LocalClient`]).
//! Without `std` it needs `alloc`.
//!
//! It follows the reference `xenstored` (`docs/misc/xenstore.txt` and the behaviour of Xen 4.17):
//!
//! - a node that an unprivileged domain creates belongs to that domain; a node that dom0 creates belongs
//!   to the owner of its parent;
//! - when a domain is removed, the nodes that it owns are removed;
//! - a transaction conflicts only if another client has changed a node that it accessed;
//! - `EACCES` hides what a caller may not see.
//!
//! Intended differences:
//!
//! - children are listed in byte order, not in order of creation;
//! - equal events that wait are merged, and beyond [`Quota::events`] reduced to one per watch;
//! - the removal of a domain fires watches on the nodes that it owned;
//! - `INTRODUCE` records the domain, but ignores its page and port: the embedding program passes
//!   connections to the server;
//! - the reference's write-rate limiter is absent;
//! - `GET_FEATURE`, `SET_FEATURE`, `GET_QUOTA` and `SET_QUOTA`, newer than 4.17, are `ENOSYS`.
#![cfg_attr(not(feature = "std"), no_std)]
#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::arithmetic_side_effects, clippy::indexing_slicing))]

extern crate alloc;

mod admin;
mod buffers;
mod domain;
mod id;
mod local;
mod nodes;
mod quota;
mod release;
mod request;
mod response;
mod ring;
mod session;
mod store;
mod tree;
mod watch;

#[cfg(feature = "std")]
pub mod server;

pub use id::ConnId;
pub use local::LocalClient;
pub use quota::Quota;
pub use ring::{RingConnection, Served};
pub use store::{Store, StoreError};

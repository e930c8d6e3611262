//! An embedded xenstored: the tree through which domains find each other, in one's own process.
//!
//! [`Store`] holds the tree, its permissions, transactions and watches, and enforces the
//! [`Quota`]s. It takes requests as bytes and returns responses and events as bytes. It opens no
//! descriptor and reads no clock, so it runs alike behind sockets ([`server`], feature `std`),
//! behind shared rings, and in a simulator ([`LocalClient`]). Without `std` it needs `alloc`.
//!
//! It follows the reference `xenstored` (`docs/misc/xenstore.txt` and the behaviour of Xen 4.17):
//! nodes that an unprivileged domain creates belong to it, while dom0's belong to their parent's
//! owner; a domain that goes takes the nodes it owned with it; transactions conflict only over
//! nodes they looked at; `EACCES` hides what a caller may not see.
//!
//! What differs, by choice:
//! - children are listed in byte order, not in order of creation;
//! - equal events that wait are merged, and beyond [`Quota::events`] collapse into one a watch;
//! - a domain's removal fires watches on the nodes it takes along;
//! - `INTRODUCE` records the domain, but its page and port are ignored: connections are handed
//!   in by the embedder;
//! - the reference's write-rate limiter is absent;
//! - `GET_FEATURE`, `SET_FEATURE`, `GET_QUOTA` and `SET_QUOTA`, newer than 4.17, are `ENOSYS`.
#![cfg_attr(not(feature = "std"), no_std)]
#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::arithmetic_side_effects, clippy::indexing_slicing))]

extern crate alloc;

mod admin;
mod domain;
mod id;
mod local;
mod nodes;
mod quota;
mod release;
mod request;
mod response;
mod session;
mod store;
mod tree;
mod watch;

#[cfg(feature = "std")]
pub mod server;

pub use id::ConnId;
pub use local::LocalClient;
pub use quota::Quota;
pub use store::{Store, StoreError};

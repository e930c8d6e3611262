//! The kernel below: `ioctl` and `mmap`. The only folder of this package with `unsafe`.
//!
//! | module | contents |
//! |---|---|
//! | `ioctl` | one `ioctl` call |
//! | `memory` | address ranges: mapping, ownership, division into pages, replacement in place |
//! | `gntdev` | `/dev/xen/gntdev`: mapping pages of other domains |
//! | `copy` | `/dev/xen/gntdev`: copying to and from them |
//! | `gntalloc` | `/dev/xen/gntalloc`: granting pages of this domain |
//! | `evtchn` | `/dev/xen/evtchn`: event channels |
//!
//! Layouts and numbers are those of `xen/gntdev.h`, `xen/gntalloc.h` and `xen/evtchn.h`; a test
//! compares each with what a C compiler makes of these headers.
#![allow(unsafe_code)]

mod copy;
pub(crate) mod evtchn;
pub(crate) mod gntalloc;
pub(crate) mod gntdev;
#[cfg(test)]
mod headers_tests;
mod ioctl;
pub(crate) mod memory;

pub(crate) const GNTDEV: &str = "gntdev";
pub(crate) const GNTALLOC: &str = "gntalloc";
pub(crate) const EVTCHN: &str = "evtchn";

/// Requests of a process that maps and copies pages of another domain and binds to its ports.
pub(crate) const OF_DEVICE: [u32; 7] = [
    gntdev::MAP_GRANT_REF,
    gntdev::UNMAP_GRANT_REF,
    copy::GRANT_COPY,
    evtchn::BIND_INTERDOMAIN,
    evtchn::UNBIND,
    evtchn::NOTIFY,
    evtchn::RESET,
];

//! The demo: a hosted hypervisor, a driver domain and a guest that serves a disk over HTTP, as three
//! processes on any Linux machine.
//!
//! | module | contents |
//! |---|---|
//! | [`run`], [`check`] | `pvio run` and `pvio check` |
//! | [`machine`] | hypervisor and toolstack: domains, devices, child processes, shutdown |
//! | [`domain`] | the child processes: driver domain, guest, checking guest |
//! | [`guest`] | the guest's software: a read-only file system, an HTTP server |
//! | [`image`] | the demo image, written when no `--disk` is given |
//! | [`contents`] | what a disk contains, by signatures |
//! | [`scratch`] | a check that an image is empty and may be overwritten |
//! | [`args`] | arguments of both commands |
#![forbid(unsafe_code)]

pub mod args;
pub mod check;
pub mod contents;
pub mod domain;
pub mod guest;
pub mod image;
pub mod machine;
pub mod run;
pub mod scratch;

/// The platform of the hosted machine's domains.
pub use pvio_hosted::Domain;

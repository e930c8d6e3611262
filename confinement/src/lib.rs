//! Confinement of a process that needs few rights: its layers, and a report of them.
//!
//! A process that serves a guest or reads an untrusted image is handed its descriptors and then gives
//! up everything else. It does so in two steps, because some layers apply to one thread only, and a
//! system call filter would forbid what the start needs:
//!
//! 1. [`Layers::apply`], before the process has a second thread: control group, resource limits,
//!    namespaces, an empty root directory, user and groups, capabilities, `no_new_privs`, core
//!    dumps, Landlock.
//! 2. [`SystemCalls::install`], when all threads exist: a seccomp filter on all of them.
//!
//! Both record in [`Applied`] what the kernel did: a layer that is missing has a typed
//! [reason](Missing), and the caller decides whether it continues.
//!
//! | module | contents |
//! |---|---|
//! | [`layers`] | [`Layers`]: configuration of the first step |
//! | [`applied`] | [`Applied`], [`Layer`], [`Outcome`]: the result |
//! | [`calls`] | [`SystemCalls`]: the system calls of each kind of process, with the reason of each |
//! | [`spawn`](mod@spawn) | start of a process in its own PID namespace |
//! | [`report`] | [`Report`]: the layers of a running process, from `/proc` |
//!
//! # Example
//! ```no_run
//! use pvio_confinement::{Enforcement, Layer, Layers, ProcessKind, SystemCalls, User};
//!
//! let mut layers = Layers::of(ProcessKind::Disk);
//! layers.user = Some(User { uid: 990, gid: 990 });
//! let mut applied = layers.apply()?;
//! // Starts its threads, maps its rings.
//! SystemCalls::of(ProcessKind::Disk).install(Enforcement::Kill, &mut applied);
//! let missing = applied.missing(&[Layer::User, Layer::Capabilities, Layer::SystemCalls]);
//! assert!(missing.is_empty(), "{applied}");
//! # Ok::<(), pvio_confinement::LayersError>(())
//! ```
#![forbid(unsafe_code)]

pub mod applied;
mod apply;
pub mod calls;
pub mod layers;
pub mod report;
pub mod spawn;

pub use applied::{Applied, Layer, Missing, Outcome, Reason};
pub use apply::LayersError;
pub use calls::{Arguments, Call, Enforcement, SystemCalls};
pub use layers::{FileAccess, Layers, Limits, Namespaces, ProcessKind, Root, User};
pub use report::Report;
pub use spawn::spawn;

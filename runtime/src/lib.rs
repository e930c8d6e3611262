//! Worker threads on io_uring: what both backends share below their devices.
//!
//! A worker serves one queue on one thread. It sleeps only at its wait point, an io_uring whose
//! buffers cannot be freed while the kernel uses them.
//!
//! | module | contents |
//! |---|---|
//! | [`wait`] | [`WaitPoint`]: where a worker sleeps; [`Wrapper`], [`Watches`], [`WatchRing`] |
//! | [`worker`] | [`Worker`]: a thread that serves until it is stopped; its start, fault and panic |
//! | [`gate`] | [`Gate`]: workers that have started wait until they may serve |
//! | [`task`] | [`Task`]: blocking work on a thread, with an outcome and a deadline |
//! | [`ring`](mod@ring), [`buf`] | [`Uring`]: submit, wait, reap; [`IoBuf`], [`PrivateBuf`]: memory |
//! | [`ring`](mod@ring) | [`DisabledUring`], [`Operations`]: what a ring may execute |
//! | [`spin`], [`gather`] | [`Spin`], [`Gather`]: polling before a sleep; waking up once for several events |
//! | [`bucket`] | [`TokenBucket`], [`BucketRate`]: rate limits (also without `std`) |
//! | [`setting`] | [`Setting`]: a value that changes while a worker runs |
//! | [`event`] | [`EventFd`], [`Wakeup`]: a wake-up of another thread |
//! | [`backoff`], [`retry`](mod@retry) | [`Backoff`]: delays before a retry; interrupted system calls |
//! | [`log`] | [`LogLimit`]: rate limit for log lines that a peer can cause |
//! | [`clock`] | the monotonic clock of the process |
//!
//! # Example: a worker
//! The worker's thread creates its wait point, watches a descriptor, and serves until it is stopped.
//! ```
//! use pvio_runtime::{EventFd, StopFlag, WaitPoint, WatchRing, Worker};
//! use std::sync::{Arc, mpsc::channel};
//!
//! let (event, (served, count)) = (Arc::new(EventFd::new()?), channel());
//! let requests = Arc::clone(&event);
//! let start = move |stopped| {
//!     let mut ring = WatchRing::new()?;
//!     ring.watch(stopped)?;
//!     let watch = ring.watch(requests.to_fd()?)?;
//!     Ok((ring, watch, requests))
//! };
//! let serve = move |(mut ring, watch, requests): (WatchRing, _, Arc<EventFd>), stop: &StopFlag| {
//!     while !stop.is_set() {
//!         ring.wait(None).map_err(|_| "io_uring failed")?;
//!         ring.reap();
//!         if ring.fired(watch) {
//!             requests.clear();
//!             let _ = served.send(());
//!         }
//!     }
//!     Ok(())
//! };
//! let mut worker = Worker::spawn("example", Arc::new(|| ()), "panicked", start, serve)?;
//! worker.wait_ready()?;
//! event.notify();
//! count.recv()?;
//! assert_eq!(worker.fault(), None);
//! drop(worker);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Example: an operation
//! An operation **owns** its buffers from submission to completion, so that safe code cannot free
//! or reuse memory that the kernel still reads or writes. Every operation has a slot that is allocated
//! when the ring is created. Submitting and reaping allocate nothing and take no lock.
//! ```
//! use pvio_runtime::{PrivateBuf, Uring, whole};
//! use std::io::Write;
//!
//! let mut file = tempfile::tempfile()?;
//! file.write_all(b"split drivers")?;
//!
//! let mut uring = Uring::new(8)?;
//! let file = uring.add_file(file.into());
//! uring.read(file, 6, [whole(PrivateBuf::zeroed(7))], 42).map_err(|_| "full")?;
//! uring.wait(None)?;
//! uring.reap(|done| {
//!     assert_eq!((done.token, done.result), (42, Ok(7)));
//!     assert_eq!(done.segments[0].buf.as_slice(), b"drivers");
//! });
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![cfg_attr(not(any(feature = "std", loom)), no_std)]

#[cfg(feature = "std")]
pub mod backoff;
pub mod bucket;
#[cfg(feature = "std")]
pub mod buf;
#[cfg(feature = "std")]
pub mod clock;
#[cfg(feature = "std")]
pub mod event;
#[cfg(feature = "std")]
pub mod gate;
#[cfg(feature = "std")]
pub mod gather;
#[cfg(feature = "std")]
mod lists;
#[cfg(feature = "std")]
pub mod log;
#[cfg(feature = "std")]
pub mod retry;
#[cfg(feature = "std")]
pub mod ring;
#[cfg(feature = "std")]
pub mod setting;
#[cfg(feature = "std")]
pub mod spin;
#[doc(hidden)]
pub mod sync;
#[cfg(feature = "std")]
pub mod task;
#[cfg(feature = "std")]
pub mod wait;
#[cfg(feature = "std")]
pub mod worker;

#[cfg(feature = "std")]
pub use backoff::Backoff;
pub use bucket::{BucketRate, TokenBucket};
#[cfg(feature = "std")]
pub use buf::{IoBuf, PrivateBuf, whole};
#[cfg(feature = "std")]
pub use clock::monotonic;
#[cfg(feature = "std")]
pub use event::{EventFd, Wakeup};
#[cfg(feature = "std")]
pub use gate::Gate;
#[cfg(feature = "std")]
pub use gather::Gather;
#[cfg(feature = "std")]
pub use log::LogLimit;
#[cfg(feature = "std")]
pub use pvio_ring::IoSeg;
#[cfg(feature = "std")]
pub use ring::{DisabledUring, Done, Errno, FileId, Full, Operations, Uring};
#[cfg(feature = "std")]
pub use setting::{Setting, SettingReader};
#[cfg(feature = "std")]
pub use spin::Spin;
#[cfg(feature = "std")]
pub use task::{Task, TaskError};
#[cfg(feature = "std")]
pub use wait::{MAX_WATCHES, WaitPoint, Watch, WatchRing, Watches, Wrapper};
#[cfg(feature = "std")]
pub use worker::{Notify, StopFlag, Worker};

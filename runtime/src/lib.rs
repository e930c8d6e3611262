//! The wait point of a worker: an io_uring whose buffers cannot be freed while the kernel uses them.
//!
//! | module | contents |
//! |---|---|
//! | [`backoff`] | [`Backoff`]: delays before a retry |
//! | [`buf`] | [`IoBuf`]: memory that the kernel may use; [`PrivateBuf`]: memory private to this process |
//! | [`gather`] | [`Gather`]: a short delay after an event, to wake up once for several events |
//! | [`log`] | [`LogLimit`]: rate limit for log lines that a peer can cause |
//! | [`ring`](mod@ring) | [`Uring`]: submit, wait, reap |
//! | [`spin`] | [`Spin`]: polling for a short time before sleeping |
//!
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

pub mod backoff;
pub mod buf;
pub mod gather;
mod lists;
pub mod log;
pub mod retry;
pub mod ring;
pub mod spin;

pub use backoff::Backoff;
pub use buf::{IoBuf, PrivateBuf, whole};
pub use gather::Gather;
pub use log::LogLimit;
pub use pvio_ring::IoSeg;
pub use ring::{Done, Errno, FileId, Full, Uring};
pub use spin::Spin;

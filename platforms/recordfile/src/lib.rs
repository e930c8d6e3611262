//! Memory that outlives its process: preallocated files, mapped shared, in a private directory.
//!
//! A backend stores its in-flight records (`pvio_ring::inflight`) in a [`RecordStore`]. A process that is
//! killed leaves its stores in the page cache, and its successor maps the same file. A [`Fence`] waits
//! until the kernel has finished the I/O of the dead process. [`PrivateDir`] checks a directory; it is
//! used for every private directory of the user.
//! ```
//! use pvio_recordfile::RecordDir;
//! use pvio_ring::shm::Region;
//! use std::sync::atomic::Ordering::Relaxed;
//!
//! let parent = tempfile::tempdir()?;
//! let dir = RecordDir::open(&parent.path().join("inflight"))?;
//! let record = dir.create("vbd-1-51712", 8192)?;
//! record.store_u64(0, 7, Relaxed);
//! drop(record);
//! assert_eq!(dir.existing("vbd-1-51712", 8192)?.load_u64(0, Relaxed), Some(7));
//! dir.remove("vbd-1-51712")?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod counters;
mod dir;
mod error;
mod fence;
mod file;
mod private_dir;
mod store;

pub use counters::CounterFile;
pub use dir::RecordDir;
pub use error::DirError;
pub use fence::Fence;
pub use file::RecordFile;
pub use private_dir::PrivateDir;
pub use store::{RecordError, RecordStore};

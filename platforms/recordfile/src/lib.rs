//! Memory that outlives its process: preallocated files, mapped shared, in a private directory.
//!
//! A backend keeps its in-flight records (`pvio_ring::inflight`) here. A process that is killed leaves
//! its stores in the page cache, and the next process maps the same file.
//!
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
//! # Ok::<(), std::io::Error>(())
//! ```

mod dir;
mod file;

pub use dir::RecordDir;
pub use file::RecordFile;

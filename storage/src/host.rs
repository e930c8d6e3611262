//! Serves vbds from disk images, with one thread per queue, as a driver domain does.
//!
//! | module | contents |
//! |---|---|
//! | `server` | [`ImageServer`]: opens a disk's image, and serves its sessions in this process |
//! | `definition` | the definition of a disk, from the toolstack's keys |
//! | `opening` | opening and closing on separate threads |
//! | `disk` | [`OpenDisk`]: an image, its limits, injected faults, trace and current size |
//! | `queues` | [`ImageQueues`]: serves the queues of a session from an open disk |
//! | `groups`, `fence`, `size`, `trace` | shared limits; I/O of an earlier process; lookup of the size; trace files |
//!
//! A process that serves a disk whose image was opened elsewhere uses [`OpenDisk`] and
//! [`ImageQueues`] with a [`Session`](pvio_blkback::session::Session), and not [`ImageServer`].

mod definition;
mod disk;
mod fence;
mod groups;
mod opening;
mod queues;
mod server;
mod size;
mod trace;

pub use definition::{backed_by, change_live, definition, disk_name};
pub use disk::{DiskParts, OpenDisk};
pub use fence::{UNMAPPING, fence_name, pass_fence, remove_fence};
pub use groups::Groups;
pub use opening::{BUSY, Deadlines, OpenFailure, OpeningTask};
pub use queues::{DISK_BUDGETS, DISK_EVENTS, ImageQueues};
pub use server::ImageServer;
pub use size::ImageSize;
pub use trace::TraceFile;

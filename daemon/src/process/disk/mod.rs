//! A disk in a process of its own.
//!
//! | module | contents |
//! |---|---|
//! | `remote` | [`RemoteDisk`]: the supervisor's side; opens the image and starts the process |
//! | `dial` | connections to the server of a disk |
//! | `plan` | what a process of a session is started with |
//! | `process` | the process |

mod dial;
mod plan;
mod process;
mod remote;

pub use plan::DiskPlan;
pub use process::{connection_to_hypervisor, has_ended, serve};
pub use remote::{DiskConfig, RemoteDisk};

use super::confine::Confined;
use super::messages::Start;
use pvio_blkback::session::{SessionIdentity, SessionSpec};
use pvio_storage::image::{Disk, DiskDescription, DiskOptions};
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::time::Duration;

/// What a session is started with, besides descriptors. `D` describes the platform's descriptors.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DiskServe<D> {
    /// How it begins.
    pub start: Start,
    /// The session.
    pub spec: SessionSpec,
    /// The definition of the disk.
    pub disk: Disk,
    /// The image; its records are beside the descriptors.
    pub image: DiskDescription,
    /// The platform.
    pub platform: D,
    /// Path and target of the trace.
    pub trace: Option<(OsString, String)>,
    /// Maximum number of cached mappings.
    pub cached_mappings: usize,
    /// How long pages of an earlier process may still be mapped.
    pub unmapping: Duration,
    /// Whether a flush of the image has failed before.
    pub flush_failed: bool,
    /// The confinement.
    pub confined: Confined,
}

/// A change of a session's settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum DiskChange {
    /// Other limits and faults.
    Options(Box<DiskOptions>),
    /// Another size, in sectors of 512 bytes.
    Resize(u64),
    /// Requests must not be left to a later process.
    Abandoned,
    /// The answer to a request for a connection to the server: the descriptor beside this message,
    /// or the reason why there is none.
    Connection(Option<String>),
}

/// What identifies a session, and what a supervisor needs that did not start it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DiskIdentity {
    /// The session.
    pub session: SessionIdentity,
    /// The definition of its disk.
    pub disk: Disk,
    /// The image.
    pub image: DiskDescription,
}

/// The hidden command that runs the process of a disk, after the name of the platform.
pub const COMMAND: &str = "disk";

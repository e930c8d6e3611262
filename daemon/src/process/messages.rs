//! What the supervisor and a device process tell each other.

use pvio_confinement::Applied;
use pvio_storage::image::HandedRecord;
use pvio_xenbus::driver::Fault;
use serde::{Deserialize, Serialize};

/// The version of the messages.
pub const VERSION: u32 = 1;
/// The oldest version of a device process that a supervisor adopts: the previous one. One of another
/// version is replaced. A change that a process of that version would not understand increases
/// [`VERSION`] twice, in two releases.
pub const OLDEST_VERSION: u32 = VERSION - 1;

/// Returns whether a supervisor understands a device process of this version.
#[must_use]
pub const fn is_understood(version: u32) -> bool {
    matches!(VERSION.checked_sub(version), Some(behind) if behind <= VERSION - OLDEST_VERSION)
}

/// How a session begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Start {
    /// As a new session.
    New,
    /// As the session of an earlier process.
    Resumed,
    /// As the session of an earlier process if that had begun it, else as a new one.
    ResumedOrNew,
    /// As the session of an earlier process, which left it in order (after a media change).
    Again,
}

/// The purpose of a descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Descriptor {
    /// A part of the platform (gntdev, evtchn); several, in their order.
    Platform,
    /// The in-flight record.
    Record,
    /// The write end of the fence.
    Fence,
    /// The socket at which the process listens for the next supervisor.
    Listen,
    /// The memory of the counters.
    Counters,
    /// A file of the image, or the connection to its server.
    Image(HandedRecord),
    /// The file of the disk's trace.
    Trace,
    /// A queue of the link; several, in their order.
    Link,
}

/// A message of the supervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToDevice<S, C> {
    /// The descriptors beside this message, in order. A session may need several such messages.
    Descriptors(Vec<Descriptor>),
    /// Everything else that the session needs. It is served from now on.
    Serve(Box<S>),
    /// A change of the session's settings.
    Change(C),
    /// Complete the requests in flight, leave the session to a successor, and exit.
    Stop,
}

/// A message of a device process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromDevice<I> {
    /// The first message to each supervisor.
    Hello {
        /// [`VERSION`].
        version: u32,
        /// The session, by which a new supervisor recognises it; `None` before
        /// [`ToDevice::Serve`].
        session: Option<Box<I>>,
    },
    /// The layers of its confinement.
    Confined(Applied),
    /// The session is being served.
    Ready,
    /// The session has ended.
    Fault(Fault),
    /// A flush has failed.
    FlushFailed,
    /// Whether requests are held because the storage of the disk is full; sent when it changes.
    Paused(bool),
    /// A connection to the image's server is needed again.
    Redial,
}

//! What the supervisor and a device process tell each other.

use serde::{Deserialize, Serialize};
use std::borrow::Cow;

/// The version of the messages. A device process of another version is not adopted by a supervisor:
/// it is replaced.
pub const VERSION: u32 = 1;

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
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
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
    /// A file of the image, or the connection to its server; several, in their order.
    Image,
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
    /// The layers of its confinement, applied and missing, in words.
    Confined(String),
    /// The session is being served.
    Ready,
    /// The session has ended.
    Fault(RemoteFault),
    /// A flush has failed.
    FlushFailed,
    /// The image's size in bytes.
    Size(u64),
    /// A connection to the image's server is needed again.
    Redial,
}

/// A fault in another process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoteFault {
    /// A short stable code.
    pub code: Cow<'static, str>,
    /// What failed and why.
    pub text: String,
    /// What the operator can do next.
    pub remedy: Option<String>,
}

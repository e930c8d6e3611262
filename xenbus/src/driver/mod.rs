//! Carrying out what [`crate::device`] decides: the xenbus part of a device end, for every class.
//!
//! A driver owns its end's directory in xenstore: it reads the other end's state whenever
//! something may have changed, asks the machine, and calls its class for what only that knows: a
//! disk, say, or a network interface. Events may be merged, repeated or come without cause; only
//! what stands in xenstore counts.
//!
//! | type | drives |
//! |---|---|
//! | [`BackendDriver`] with a [`BackendClass`] | a backend |
//! | [`FrontendDriver`] with a [`FrontendClass`] | a frontend |
//!
//! [`Surroundings`] says what a toolstack does around a backend: with `xl`, hotplug scripts.
//!
//! Whatever a class cannot do, or its peer breaks, is a [`Fault`]: it is written to the end's
//! `error` node, and closes that one device.

mod back;
mod front;

pub use back::{BackendClass, BackendDriver, Prepared, hotplug};
pub use front::{FrontendClass, FrontendDriver, FrontendEnds};

use crate::handshake::HandshakeError;
use crate::handshake::common::{DeviceAddr, write_error};
use crate::wire::XsErrno;
use crate::xenstore::{Xenstore, XsError};
use alloc::format;
use alloc::string::{String, ToString};

/// Who looks after what lies around a backend: the toolstack, or the backend itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Surroundings {
    /// The backend attaches its devices to what they lead to; the toolstack makes and removes
    /// their directories.
    #[default]
    Plain,
    /// The toolstack (`xl` in dom0, `xl devd` in a driver domain) also runs each device's hotplug
    /// script once the backend has offered it, and nothing is served before that is done.
    Scripts,
    /// A driver domain where nobody acts for the toolstack: the backend's domain attaches its
    /// devices, and removes the directories of those that are gone
    /// ([`remove_backend_end`](crate::handshake::common::remove_backend_end)), a moment after: the
    /// toolstack has to see them Closed first.
    DriverDomain,
}

/// The two ends of a device, as its backend finds them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ends {
    /// Which device it is.
    pub addr: DeviceAddr,
    /// The backend's directory.
    pub back: String,
    /// The frontend's directory.
    pub front: String,
    /// Who looks after the rest.
    pub surroundings: Surroundings,
    /// An earlier process's session is being taken over: what hotplug scripts did for it they will
    /// not do again, and the frontend may have missed the notification of an answer.
    pub resumed: bool,
}

impl Ends {
    /// The ends of a device at their usual places.
    #[must_use]
    pub fn new(addr: DeviceAddr) -> Self {
        Self {
            addr,
            back: addr.backend_path(),
            front: addr.frontend_path(),
            surroundings: Surroundings::default(),
            resumed: false,
        }
    }
}

/// Why a device was closed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{code}: {text}")]
pub struct Fault {
    /// A short stable code for logs and counters.
    pub code: &'static str,
    /// What happened and what to do about it, for the operator.
    pub text: String,
    /// The errno that Linux' drivers would write.
    pub errno: u32,
}

impl Fault {
    /// A fault of the device or of its peer (`EINVAL`).
    #[must_use]
    pub fn new(code: &'static str, text: impl ToString) -> Self {
        Self { code, text: text.to_string(), errno: 22 }
    }

    /// Tells the operator, in the end's `error` node.
    fn report(&self, xs: &mut dyn Xenstore, base: &str) -> Result<(), HandshakeError> {
        write_error(xs, base, self.errno, &format!("{self}"))
    }
}

impl From<HandshakeError> for Fault {
    fn from(error: HandshakeError) -> Self {
        let code = match &error {
            HandshakeError::Xenstore(_) => "xenstore",
            _ => "handshake",
        };
        Self::new(code, error)
    }
}

impl From<XsError> for Fault {
    fn from(error: XsError) -> Self {
        Self::new("xenstore", error)
    }
}

/// Whether a device is still there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Life {
    /// It is; call again on the next event.
    Alive,
    /// It is gone and has let go of everything; drop the driver.
    Gone,
}

/// Watches a path. An earlier driver of the same end may have left its watch behind, on the same
/// connection: it serves as well.
fn watch(xs: &mut dyn Xenstore, path: &str, token: &str) -> Result<(), XsError> {
    match xs.watch(path, token) {
        Err(error) if error.errno() == Some(XsErrno::Exist) => Ok(()),
        other => other,
    }
}

/// Of what can go wrong while closing a device, only a lost xenstore matters: a node may have been
/// taken away by the toolstack at any time.
fn only_if_lost<T>(result: Result<T, HandshakeError>) -> Result<(), XsError> {
    match result {
        Err(HandshakeError::Xenstore(error)) if error.is_connection_lost() => Err(error),
        _ => Ok(()),
    }
}

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
//! [`HotplugMode`] says what a toolstack does around a backend: with `xl`, hotplug scripts.
//!
//! Whatever a class cannot do, or its peer breaks, is a [`Fault`]: it is written to the end's
//! `error` node, and closes that one device.

mod back;
mod class;
mod front;

pub use back::{BackendDriver, MOST_TRANSITIONS};
pub use class::{BackendClass, Prepared, hotplug};
pub use front::{FrontendClass, FrontendDriver, FrontendEnds};

use crate::handshake::HandshakeError;
use crate::handshake::common::{
    DeviceAddr, read_frontend_state, state_path, switch_state, write_error,
};
use crate::state::XenbusState;
use crate::wire::XsErrno;
use crate::xenstore::{Xenstore, XsError, transaction};
use alloc::format;
use alloc::string::{String, ToString};

/// Who attaches a backend's devices to files, bridges and taps: the toolstack, or the backend itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum HotplugMode {
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
    pub surroundings: HotplugMode,
    /// An earlier process's session is being taken over: what hotplug scripts did for it they will
    /// not do again, and the frontend may have missed the notification of an answer.
    pub resumed: bool,
    /// The earlier process had offered the device and not yet written Connected.
    pub interrupted: bool,
    /// A session was lost, and the frontend has not given it up.
    pub lost: bool,
}

impl Ends {
    /// The ends of a device at their usual places.
    #[must_use]
    pub fn new(addr: DeviceAddr) -> Self {
        Self {
            addr,
            back: addr.backend_path(),
            front: addr.frontend_path(),
            surroundings: HotplugMode::default(),
            resumed: false,
            interrupted: false,
            lost: false,
        }
    }

    /// Whether the earlier process had served nothing, seen by the reason why its session cannot be
    /// resumed. A session's record is valid before its first request is taken, and until its device is
    /// Closing; so a device in state InitWait without a valid record of the session was never served.
    #[must_use]
    pub fn was_unserved(&self, not_resumed: &Fault) -> bool {
        let unrecorded = ["record-missing", "record-invalid", "record-other-session", "handshake"];
        self.interrupted && unrecorded.contains(&not_resumed.code)
    }

    /// Whether the frontend has made its request by the offer of an earlier process, which must not
    /// change then. It has no session, or one that goes on.
    ///
    /// # Errors
    /// xenstore's.
    pub fn keeps_offer(&self, xs: &mut dyn Xenstore) -> Result<bool, XsError> {
        let front = read_frontend_state(xs, &self.front)?;
        Ok(!self.lost && matches!(front, XenbusState::Initialised | XenbusState::Connected))
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
    ///
    /// # Errors
    /// As for [`write_error`].
    pub fn report(&self, xs: &mut dyn Xenstore, base: &str) -> Result<(), HandshakeError> {
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
    /// It is, and there is more to do: call again when others have had their turn.
    More,
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

/// Writes what the class has to say, and a state, in one transaction: all of it, or nothing where
/// the directory is gone, lest a device the toolstack has removed come back as a ghost.
fn announce(
    xs: &mut dyn Xenstore,
    base: &str,
    state: XenbusState,
    words: impl Fn(&mut dyn Xenstore) -> Result<(), HandshakeError>,
) -> Result<(), HandshakeError> {
    transaction(xs, |tx| {
        if tx.read_opt(&state_path(base))?.is_some() {
            words(tx)?;
            switch_state(tx, base, state)?;
        }
        Ok(())
    })
}

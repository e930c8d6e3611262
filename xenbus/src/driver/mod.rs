//! Drivers that carry out the decisions of [`crate::device`]: the xenbus part of a device, for
//! every class.
//!
//! A driver owns its side's directory in xenstore. It reads the peer's state whenever something may
//! have changed, gets the next action from the machine, and calls its class for the parts that
//! depend on the device, for example a disk or a network interface. Events may be merged, repeated
//! or spurious; only the contents of xenstore are relevant.
//!
//! | type | drives |
//! |---|---|
//! | [`BackendDriver`] with a [`BackendClass`] | a backend |
//! | [`FrontendDriver`] with a [`FrontendClass`] | a frontend |
//!
//! [`HotplugMode`] defines what a toolstack does besides a backend: with `xl`, hotplug scripts.
//!
//! A failure of a class, or a protocol violation by its peer, is a [`Fault`]: it is written to the
//! `error` node, and closes that one device.

mod back;
mod class;
mod front;

pub use back::{BackendDriver, MOST_TRANSITIONS};
pub use class::{BackendClass, Prepared, hotplug};
pub use front::{FrontendClass, FrontendContext, FrontendDriver};

use crate::handshake::HandshakeError;
use crate::handshake::common::{
    DeviceAddr, read_frontend_state, state_path, switch_state, write_error,
};
use crate::state::XenbusState;
use crate::wire::XsErrno;
use crate::xenstore::{Xenstore, XsError, transaction};
use alloc::borrow::Cow;
use alloc::format;
use alloc::string::{String, ToString};
use pvio_ring::error::{Remedy, Report};

/// Which program attaches a backend's devices to files, bridges and taps: the toolstack, or the
/// backend itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum HotplugMode {
    /// The backend attaches its devices to files, bridges and taps; the toolstack creates and
    /// removes their directories.
    #[default]
    Plain,
    /// The toolstack (`xl` in dom0, `xl devd` in a driver domain) also runs each device's hotplug
    /// script once the backend has offered it, and nothing is served before the script has
    /// finished.
    Scripts,
    /// A driver domain without a toolstack agent: the backend's domain attaches its devices, and
    /// removes the directories of removed ones
    /// ([`remove_backend`](crate::handshake::common::remove_backend)), with a short delay:
    /// the toolstack has to see them Closed first.
    DriverDomain,
}

/// Both sides of a device, from the backend's view.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BackendContext {
    /// The address of the device.
    pub addr: DeviceAddr,
    /// The backend's directory.
    pub back: String,
    /// The frontend's directory.
    pub front: String,
    /// What the toolstack does besides the backend.
    pub hotplug_mode: HotplugMode,
    /// An earlier process's session is being taken over: hotplug scripts that ran for it do not run
    /// again, and the frontend may have missed the notification of a response.
    pub resumed: bool,
    /// The earlier process had offered the device and had not written Connected.
    pub interrupted: bool,
    /// A session was lost, and the frontend has not given it up.
    pub lost: bool,
}

impl BackendContext {
    /// Returns the usual paths of a device.
    #[must_use]
    pub fn new(addr: DeviceAddr) -> Self {
        Self {
            addr,
            back: addr.backend_path(),
            front: addr.frontend_path(),
            hotplug_mode: HotplugMode::default(),
            resumed: false,
            interrupted: false,
            lost: false,
        }
    }

    /// Returns whether the earlier process had served nothing, given the reason why its session
    /// cannot be resumed. A session's record is valid from before its first request is taken until
    /// its device is Closing. So a device in state InitWait without a valid record was never
    /// served.
    #[must_use]
    pub fn was_unserved(&self, not_resumed: &Fault) -> bool {
        let unrecorded = ["record-missing", "record-invalid", "record-other-session", "handshake"];
        self.interrupted && unrecorded.contains(&&*not_resumed.code)
    }

    /// Returns whether the frontend has made its request based on the offer of an earlier process,
    /// which must not change in that case. The frontend has no session, or one that continues.
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
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[error("{code}: {text}")]
pub struct Fault {
    /// A short stable code for logs and counters.
    pub code: Cow<'static, str>,
    /// What failed and why, with all causes.
    pub text: String,
    /// What the operator can do next.
    pub remedy: Option<Cow<'static, str>>,
    /// The errno that Linux's drivers would write.
    pub errno: u32,
}

impl Fault {
    /// Creates a fault of the device or of its peer (`EINVAL`), without a remedy.
    #[must_use]
    pub fn new(code: impl Into<Cow<'static, str>>, text: impl Into<String>) -> Self {
        Self { code: code.into(), text: text.into(), remedy: None, errno: 22 }
    }

    /// Creates a fault from an error: its text, its causes and its remedy.
    #[must_use]
    pub fn of(code: &'static str, error: &impl Remedy) -> Self {
        Self { remedy: error.remedy(), ..Self::new(code, Report(error).to_string()) }
    }

    /// Sets what the operator can do next.
    #[must_use]
    pub fn with_remedy(self, remedy: impl Into<Cow<'static, str>>) -> Self {
        Self { remedy: Some(remedy.into()), ..self }
    }

    /// Returns the text of the `error` node: `code: text; remedy`, without a remedy `code: text`.
    #[must_use]
    pub fn node_text(&self) -> String {
        match &self.remedy {
            Some(remedy) => format!("{self}; {remedy}"),
            None => self.to_string(),
        }
    }

    /// Splits the text of an `error` node, as written by [`node_text`](Self::node_text), into what
    /// failed and the remedy. Texts of faults contain no `"; "`, except in quoted names.
    #[must_use]
    pub fn parse_node(text: &str) -> (&str, Option<&str>) {
        text.split_once("; ").map_or((text, None), |(what, remedy)| (what, Some(remedy)))
    }

    /// Writes the fault to the `error` node.
    ///
    /// # Errors
    /// As for [`write_error`].
    pub fn report(&self, xs: &mut dyn Xenstore, base: &str) -> Result<(), HandshakeError> {
        write_error(xs, base, self.errno, &self.node_text())
    }
}

impl From<HandshakeError> for Fault {
    fn from(error: HandshakeError) -> Self {
        let code = match &error {
            HandshakeError::Xenstore(_) => "xenstore",
            _ => "handshake",
        };
        Self::of(code, &error)
    }
}

impl From<XsError> for Fault {
    fn from(error: XsError) -> Self {
        Self::of("xenstore", &error)
    }
}

/// Whether a device still exists.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Life {
    /// It exists; call again on the next event.
    Alive,
    /// It exists, and work is left: call again after other devices were stepped.
    More,
    /// It is removed and everything is released; drop the driver.
    Gone,
}

/// Watches a path. If an earlier driver of the same device left its watch on the same connection,
/// that one is used.
fn watch(xs: &mut dyn Xenstore, path: &str, token: &str) -> Result<(), XsError> {
    match xs.watch(path, token) {
        Err(error) if error.errno() == Some(XsErrno::Exist) => Ok(()),
        other => other,
    }
}

/// While a device is closed, all errors but a lost connection are ignored: the toolstack may have
/// removed a node at any time.
fn only_if_lost<T>(result: Result<T, HandshakeError>) -> Result<(), XsError> {
    match result {
        Err(HandshakeError::Xenstore(error)) if error.is_connection_lost() => Err(error),
        _ => Ok(()),
    }
}

/// Writes keys of the class and a state in one transaction: all of them, or nothing if the
/// directory is gone, so that a device that the toolstack has removed is not recreated.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_the_error_node_contains_the_remedy_and_is_split_again() {
        let fault = Fault::new("image-missing", "/a does not exist");
        assert_eq!(
            Fault::parse_node(&fault.node_text()),
            ("image-missing: /a does not exist", None)
        );
        let text = fault.with_remedy("check the path").node_text();
        let parts = ("image-missing: /a does not exist", Some("check the path"));
        assert_eq!(Fault::parse_node(&text), parts);
    }

    #[cfg(feature = "serde")]
    #[test]
    fn fault_sent_as_json_arrives_unchanged() {
        let fault = Fault::new("image-busy", "the image is in use");
        for fault in [fault.clone(), Fault { errno: 16, ..fault.with_remedy("detach it") }] {
            let text = serde_json::to_string(&fault).unwrap();
            assert_eq!(serde_json::from_str::<Fault>(&text).unwrap(), fault, "{text}");
        }
    }
}

//! Status that each side of a device publishes: state, hotplug status, errors.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;

use pvio_ring::DomId;

use super::addr::split_home;
use crate::handshake::HandshakeError;
use crate::handshake::encoding::{DOMAIN, PathOf};
use crate::handshake::fields::{Reader, Writer};
use crate::state::XenbusState;
use crate::xenstore::{Xenstore, XsError, transaction};

/// Returns the path of a side's state, which the peer watches. `base` is the path of the directory
/// of either side ([`super::DeviceAddr`]), here and below.
#[must_use]
pub fn state_path(base: &str) -> String {
    format!("{base}/state")
}

/// Returns the path of the key that states whether the device is online.
#[must_use]
pub fn online_path(backend: &str) -> String {
    format!("{backend}/online")
}

/// Returns the path of the key with the hotplug script's status.
#[must_use]
pub fn hotplug_path(backend: &str) -> String {
    format!("{backend}/hotplug-status")
}

/// Reads a side's state. A missing state, one that may not be read (the domain is gone, and its
/// directory with the permissions), or an invalid one, is [`XenbusState::Unknown`].
///
/// # Errors
/// An error of xenstore.
pub fn read_state<X: Xenstore + ?Sized>(xs: &mut X, base: &str) -> Result<XenbusState, XsError> {
    Ok(XenbusState::parse(xs.read_peer(&state_path(base))?.as_deref()))
}

/// Writes a side's state, even if it is unchanged: the peer's watch fires.
///
/// # Errors
/// An error of xenstore.
pub fn write_state<X: Xenstore + ?Sized>(
    xs: &mut X,
    base: &str,
    state: XenbusState,
) -> Result<(), HandshakeError> {
    Ok(xs.write(&state_path(base), state.text().as_bytes())?)
}

/// Changes a side's state if its directory still exists, so that a device that the toolstack has
/// removed is not recreated. Returns whether it existed; an unchanged state is not written again.
///
/// # Errors
/// An error of xenstore.
pub fn switch_state<X: Xenstore + ?Sized>(
    xs: &mut X,
    base: &str,
    state: XenbusState,
) -> Result<bool, HandshakeError> {
    transaction(xs, |tx| match tx.read_opt(&state_path(base))? {
        None => Ok(false),
        Some(old) if old == state.text().as_bytes() => Ok(true),
        Some(_) => write_state(tx, base, state).map(|()| true),
    })
}

/// The backend of a frontend, as named in the frontend's directory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BackendPath {
    /// `backend-id`: the backend's domain.
    pub domain: DomId,
    /// `backend`: the backend's directory, an absolute path below that domain's home.
    pub path: String,
}

/// Reads the path of a frontend's backend. The backend's kind may have any name: QEMU's network
/// backend is of kind `qnic`, tapback's disks are of kind `vbd3`.
///
/// # Errors
/// An error of xenstore; a key is missing; the path is relative, too long for keys below it, or
/// outside the home directory of the backend's domain.
pub fn read_backend_path<X: Xenstore + ?Sized>(
    xs: &mut X,
    frontend: &str,
) -> Result<BackendPath, HandshakeError> {
    transaction(xs, |tx| {
        let mut r = Reader { xs: tx, base: frontend };
        let domain = r.need("backend-id", DOMAIN)?;
        Ok(BackendPath { domain, path: r.need("backend", PathOf::domain(&domain))? })
    })
}

/// A backend's key, 1 while the backend waits for its frontend to give up a lost session. A backend
/// in state InitWait without this key has no session with its frontend, whatever the frontend's
/// state.
const SESSION_LOST: &str = "pvio-session-lost";

/// Returns whether a backend, or its predecessor, waits for its frontend to give up a lost session.
///
/// # Errors
/// An error of xenstore; the key is not a number.
pub fn is_session_lost<X: Xenstore + ?Sized>(
    mut xs: &mut X,
    back: &str,
) -> Result<bool, HandshakeError> {
    (Reader { xs: &mut xs, base: back }).flag(SESSION_LOST, false)
}

/// Writes whether a backend waits for its frontend to give up a lost session.
///
/// # Errors
/// An error of xenstore.
pub fn write_session_lost<X: Xenstore + ?Sized>(
    mut xs: &mut X,
    back: &str,
    lost: bool,
) -> Result<(), HandshakeError> {
    Writer { xs: &mut xs, base: back }.opt(SESSION_LOST, lost.then_some(1))
}

/// A network frontend's key, 1 from its request until the backend has accepted it. Other frontends
/// indicate this by the state Initialised.
const AWAITING: &str = "pvio-awaiting-backend";

/// Reads a frontend's state as its backend has to interpret it. A network frontend is Connected
/// from its request on, which a restarted backend cannot distinguish from an established session. A
/// pvio frontend writes a key for that: while it waits for its backend, its state is reported as
/// [`XenbusState::Initialised`].
///
/// # Errors
/// An error of xenstore.
pub fn read_frontend_state<X: Xenstore + ?Sized>(
    xs: &mut X,
    frontend: &str,
) -> Result<XenbusState, XsError> {
    let state = read_state(xs, frontend)?;
    if state == XenbusState::Connected
        && xs.read_peer(&format!("{frontend}/{AWAITING}"))?.as_deref() == Some(b"1")
    {
        return Ok(XenbusState::Initialised);
    }
    Ok(state)
}

/// Writes whether a network frontend waits for its backend: see [`read_frontend_state`].
///
/// # Errors
/// An error of xenstore.
pub fn write_awaiting<X: Xenstore + ?Sized>(
    mut xs: &mut X,
    frontend: &str,
    awaiting: bool,
) -> Result<(), HandshakeError> {
    Writer { xs: &mut xs, base: frontend }.opt(AWAITING, awaiting.then_some(1))
}

/// Returns whether a backend's device is online; `false` if the key is missing, for example because
/// its domain is gone.
///
/// # Errors
/// An error of xenstore; the key is not a number.
pub fn read_online<X: Xenstore + ?Sized>(
    mut xs: &mut X,
    backend: &str,
) -> Result<bool, HandshakeError> {
    (Reader { xs: &mut xs, base: backend }).flag("online", false)
}

/// Status of the hotplug script, which attaches the backend to a tap or bridge.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Hotplug {
    /// The script has finished.
    Connected,
    /// The script failed; the reason for the operator.
    Failed(Box<str>),
}

/// Writes the hotplug status, for the toolstack.
///
/// # Errors
/// An error of xenstore.
pub fn write_hotplug<X: Xenstore + ?Sized>(
    xs: &mut X,
    backend: &str,
    status: &Hotplug,
) -> Result<(), HandshakeError> {
    transaction(xs, |tx| {
        let mut w = Writer { xs: tx, base: backend };
        match status {
            Hotplug::Connected => {
                w.clear("hotplug-error")?;
                w.put("hotplug-status", "connected")
            }
            Hotplug::Failed(why) => {
                w.put("hotplug-error", shorten(why))?;
                w.put("hotplug-status", "error")
            }
        }
    })
}

/// Reads the hotplug status; `None` if none was written.
///
/// # Errors
/// An error of xenstore; a status that is neither `connected` nor `error`.
pub fn read_hotplug<X: Xenstore + ?Sized>(
    mut xs: &mut X,
    backend: &str,
) -> Result<Option<Hotplug>, HandshakeError> {
    let mut r = Reader { xs: &mut xs, base: backend };
    match r.raw("hotplug-status")?.as_deref() {
        // libxl creates a vif's node with an empty value.
        None | Some(b"") => Ok(None),
        Some(b"connected") => Ok(Some(Hotplug::Connected)),
        Some(b"error") => {
            let why = r.text("hotplug-error")?.unwrap_or_default();
            Ok(Some(Hotplug::Failed(why.into())))
        }
        Some(other) => Err(r.malformed("hotplug-status", other, "connected or error")),
    }
}

/// Returns the path of a side's fatal error: `/local/domain/<N>/error/<rest of base>/error`.
#[must_use]
pub fn error_path(base: &str) -> Option<String> {
    let (domid, rest) = split_home(base, DomId::DOM0)?;
    Some(format!("/local/domain/{domid}/error/{rest}/error"))
}

/// Writes the reason of a failure, for the operator, as `<code> <text>`; `code` is a positive
/// errno, as Linux writes it, or pvio's reason code.
///
/// # Errors
/// An error of xenstore.
pub fn write_error<X: Xenstore + ?Sized>(
    xs: &mut X,
    base: &str,
    code: u32,
    text: &str,
) -> Result<(), HandshakeError> {
    let path =
        error_path(base).ok_or(HandshakeError::Unwritable("an end outside of any domain"))?;
    Ok(xs.write(&path, format!("{code} {}", shorten(text)).as_bytes())?)
}

/// Reads the error that [`write_error`] wrote.
///
/// # Errors
/// An error of xenstore.
pub fn read_error<X: Xenstore + ?Sized>(xs: &mut X, base: &str) -> Result<Option<String>, XsError> {
    let Some(path) = error_path(base) else {
        return Ok(None);
    };
    Ok(xs.read_opt(&path)?.map(|text| String::from_utf8_lossy(&text).into_owned()))
}

/// Removes the error that [`write_error`] wrote.
///
/// # Errors
/// An error of xenstore.
pub fn clear_error<X: Xenstore + ?Sized>(xs: &mut X, base: &str) -> Result<(), XsError> {
    let Some(path) = error_path(base) else {
        return Ok(());
    };
    xs.rm(path.strip_suffix("/error").unwrap_or(&path))
}

/// Truncates a text for the operator to the size that an unprivileged domain may write into one
/// node.
fn shorten(text: &str) -> &str {
    let mut end = text.len().min(1024);
    while !text.is_char_boundary(end) {
        end = end.saturating_sub(1);
    }
    text.get(..end).unwrap_or("")
}

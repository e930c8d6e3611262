//! What an end says of itself: its state, its surroundings, its errors.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;

use pvio_ring::DomId;

use super::addr::split_home;
use crate::handshake::HandshakeError;
use crate::handshake::fields::{Reader, Writer};
use crate::state::XenbusState;
use crate::xenstore::{Xenstore, XsError, transaction};

/// The key that holds an end's state, to be watched by the other end. `base` is
/// the path of either end's directory ([`super::DeviceAddr`]), here and below.
#[must_use]
pub fn state_path(base: &str) -> String {
    format!("{base}/state")
}

/// The key by which the toolstack tells a backend whether the device is to stay.
#[must_use]
pub fn online_path(backend: &str) -> String {
    format!("{backend}/online")
}

/// The key by which a hotplug script tells how far it has come.
#[must_use]
pub fn hotplug_path(backend: &str) -> String {
    format!("{backend}/hotplug-status")
}

/// Reads an end's state. Nothing there, nothing that may be seen (the end's domain is gone, and
/// its directory with the rights to look there), or nothing that can be understood, is
/// [`XenbusState::Unknown`].
///
/// # Errors
/// xenstore's.
pub fn read_state<X: Xenstore + ?Sized>(xs: &mut X, base: &str) -> Result<XenbusState, XsError> {
    Ok(XenbusState::parse(xs.read_peer(&state_path(base))?.as_deref()))
}

/// Writes an end's state, also if it is the same already: the peer's watch fires.
///
/// # Errors
/// xenstore's.
pub fn write_state<X: Xenstore + ?Sized>(
    xs: &mut X,
    base: &str,
    state: XenbusState,
) -> Result<(), HandshakeError> {
    Ok(xs.write(&state_path(base), state.text().as_bytes())?)
}

/// Moves an end to a state if its directory is still there, so that a device the toolstack has
/// removed does not come back as a ghost. Whether it was there; an equal state is not rewritten.
///
/// # Errors
/// xenstore's.
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

/// The backend of a frontend, as the frontend's directory names it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BackendEnd {
    /// `backend-id`: the backend's domain.
    pub domain: DomId,
    /// `backend`: the backend's directory, an absolute path below that domain's home.
    pub path: String,
}

/// Reads where a frontend's backend is. The backend's kind may have any name: QEMU's network
/// backend is of kind `qnic`, tapback's disks are of kind `vbd3`.
///
/// # Errors
/// xenstore's; a key is missing; the path is relative, too long for keys below it, or outside the
/// home of the backend's domain.
pub fn read_backend_end<X: Xenstore + ?Sized>(
    xs: &mut X,
    frontend: &str,
) -> Result<BackendEnd, HandshakeError> {
    transaction(xs, |tx| {
        let mut r = Reader { xs: tx, base: frontend };
        let domain = r.domid("backend-id")?;
        Ok(BackendEnd { domain, path: r.peer_path("backend", domain)? })
    })
}

/// A backend's key, 1 while the backend waits for its frontend to give up a session that is lost. A
/// backend in state InitWait without it has no session with its frontend, whatever state that one has.
const SESSION_LOST: &str = "pvio-session-lost";

/// Whether a backend, or its predecessor, waits for its frontend to give up a lost session.
///
/// # Errors
/// xenstore's; the key holds no number.
pub fn is_session_lost<X: Xenstore + ?Sized>(
    xs: &mut X,
    back: &str,
) -> Result<bool, HandshakeError> {
    (Reader { xs, base: back }).flag(SESSION_LOST, false)
}

/// Writes whether a backend waits for its frontend to give up a lost session.
///
/// # Errors
/// xenstore's.
pub fn write_session_lost<X: Xenstore + ?Sized>(
    xs: &mut X,
    back: &str,
    lost: bool,
) -> Result<(), HandshakeError> {
    Writer { xs, base: back }.opt(SESSION_LOST, lost.then_some(1))
}

/// A network frontend's key, 1 from its request until the backend has accepted it. Other frontends
/// show the same by the state Initialised.
const AWAITING: &str = "pvio-awaiting-backend";

/// Reads a frontend's state as its backend has to take it. A network frontend is Connected from
/// its request on, which looks like an established session to a backend that was restarted in
/// between. One of pvio's says which of the two it is; as long as it waits for its backend, it is
/// reported as [`XenbusState::Initialised`].
///
/// # Errors
/// xenstore's.
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
/// xenstore's.
pub fn write_awaiting<X: Xenstore + ?Sized>(
    xs: &mut X,
    frontend: &str,
    awaiting: bool,
) -> Result<(), HandshakeError> {
    Writer { xs, base: frontend }.opt(AWAITING, awaiting.then_some(1))
}

/// Whether the toolstack wants a backend's device to stay; not if the key is gone, with its domain
/// perhaps.
///
/// # Errors
/// xenstore's; the key holds no number.
pub fn read_online<X: Xenstore + ?Sized>(
    xs: &mut X,
    backend: &str,
) -> Result<bool, HandshakeError> {
    (Reader { xs, base: backend }).flag("online", false)
}

/// How far what lies outside the backend (a tap, a bridge) has come.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Hotplug {
    /// It is in place.
    Connected,
    /// It failed; the reason for the operator.
    Failed(Box<str>),
}

/// Tells the toolstack how the backend's surroundings are.
///
/// # Errors
/// xenstore's.
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

/// Reads what [`write_hotplug`] wrote; `None` if nothing has been said yet.
///
/// # Errors
/// xenstore's; a status that is neither `connected` nor `error`.
pub fn read_hotplug<X: Xenstore + ?Sized>(
    xs: &mut X,
    backend: &str,
) -> Result<Option<Hotplug>, HandshakeError> {
    let mut r = Reader { xs, base: backend };
    match r.raw("hotplug-status")?.as_deref() {
        // libxl makes a vif's node empty.
        None | Some(b"") => Ok(None),
        Some(b"connected") => Ok(Some(Hotplug::Connected)),
        Some(b"error") => {
            let why = r.opt_text("hotplug-error")?.unwrap_or_default();
            Ok(Some(Hotplug::Failed(why.into())))
        }
        Some(other) => Err(r.malformed("hotplug-status", other, "connected or error")),
    }
}

/// Where an end's fatal error is told: `/local/domain/<N>/error/<rest of base>/error`.
#[must_use]
pub fn error_path(base: &str) -> Option<String> {
    let (domid, rest) = split_home(base, DomId::DOM0)?;
    Some(format!("/local/domain/{domid}/error/{rest}/error"))
}

/// Tells the operator why an end failed, as `<code> <text>`; `code` is a positive errno, as Linux
/// writes it, or a reason of one's own.
///
/// # Errors
/// xenstore's.
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

/// Reads what [`write_error`] wrote.
///
/// # Errors
/// xenstore's.
pub fn read_error<X: Xenstore + ?Sized>(xs: &mut X, base: &str) -> Result<Option<String>, XsError> {
    let Some(path) = error_path(base) else {
        return Ok(None);
    };
    Ok(xs.read_opt(&path)?.map(|text| String::from_utf8_lossy(&text).into_owned()))
}

/// Removes what [`write_error`] wrote.
///
/// # Errors
/// xenstore's.
pub fn clear_error<X: Xenstore + ?Sized>(xs: &mut X, base: &str) -> Result<(), XsError> {
    let Some(path) = error_path(base) else {
        return Ok(());
    };
    xs.rm(path.strip_suffix("/error").unwrap_or(&path))
}

/// Bounds a text for the operator to what an unprivileged domain may write into one node.
fn shorten(text: &str) -> &str {
    let mut end = text.len().min(1024);
    while !text.is_char_boundary(end) {
        end = end.saturating_sub(1);
    }
    text.get(..end).unwrap_or("")
}

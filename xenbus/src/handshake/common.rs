//! What all devices share: where they are, their states, their errors, their creation and end.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use pvio_ring::DomId;

use super::HandshakeError;
use super::fields::{Reader, Writer};
use crate::state::XenbusState;
use crate::wire::{Access, Perm, parse_u16, parse_u32};
use crate::xenstore::{Xenstore, XsError, transaction};

/// The kinds of device known here, as they are named in paths.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum DeviceClass {
    /// A virtual disk.
    Vbd,
    /// A virtual network interface.
    Vif,
}

impl DeviceClass {
    /// Every kind.
    pub const ALL: [Self; 2] = [Self::Vbd, Self::Vif];

    /// The word in paths.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Vbd => "vbd",
            Self::Vif => "vif",
        }
    }

    fn from_str(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|c| c.as_str() == word)
    }
}

/// One device: its kind, its two domains, and its number in the frontend (for a disk the
/// `virtual-device`, for a network interface its handle).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct DeviceAddr {
    /// What it is.
    pub class: DeviceClass,
    /// The domain that serves it.
    pub back: DomId,
    /// The domain that uses it.
    pub front: DomId,
    /// Which one it is among those of its kind in the frontend.
    pub index: u32,
}

impl DeviceAddr {
    /// An address.
    #[must_use]
    pub const fn new(class: DeviceClass, back: DomId, front: DomId, index: u32) -> Self {
        Self {
            class,
            back,
            front,
            index,
        }
    }

    /// The backend's directory: `/local/domain/<back>/backend/<class>/<front>/<index>`.
    #[must_use]
    pub fn backend_path(&self) -> String {
        format!(
            "{}/{}/{}",
            backend_root(self.class, self.back),
            self.front,
            self.index
        )
    }

    /// The frontend's directory: `/local/domain/<front>/device/<class>/<index>`.
    #[must_use]
    pub fn frontend_path(&self) -> String {
        format!("{}/{}", frontend_root(self.class, self.front), self.index)
    }

    /// Takes a path at or below a backend's directory apart, as events bring it: the address,
    /// and what follows it (empty for the directory itself). A relative path is one of `home`.
    #[must_use]
    pub fn from_backend_path(path: &str, home: DomId) -> Option<(Self, &str)> {
        let (back, rest) = split_home(path, home)?;
        let rest = rest.strip_prefix("backend/")?;
        let (class, rest) = rest.split_once('/')?;
        let (front, rest) = rest.split_once('/')?;
        let (index, below) = rest.split_once('/').unwrap_or((rest, ""));
        let class = DeviceClass::from_str(class)?;
        let front = parse_u16(front.as_bytes()).map(DomId)?;
        let index = parse_u32(index.as_bytes())?;
        Some((
            Self {
                class,
                back,
                front,
                index,
            },
            below,
        ))
    }
}

/// The directory of all backends of a kind in a domain, to be watched by whoever serves them.
#[must_use]
pub fn backend_root(class: DeviceClass, back: DomId) -> String {
    format!("/local/domain/{back}/backend/{}", class.as_str())
}

/// The directory of all frontends of a kind in a domain.
#[must_use]
pub fn frontend_root(class: DeviceClass, front: DomId) -> String {
    format!("/local/domain/{front}/device/{}", class.as_str())
}

/// Takes a path at or below a frontend's directory apart: its kind, its domain, its index, and
/// what follows. A relative path is one of `home`.
#[must_use]
pub fn parse_frontend_path(path: &str, home: DomId) -> Option<(DeviceClass, DomId, u32, &str)> {
    let (front, rest) = split_home(path, home)?;
    let rest = rest.strip_prefix("device/")?;
    let (class, rest) = rest.split_once('/')?;
    let (index, below) = rest.split_once('/').unwrap_or((rest, ""));
    Some((
        DeviceClass::from_str(class)?,
        front,
        parse_u32(index.as_bytes())?,
        below,
    ))
}

/// Lists the backends of a kind that the toolstack has made in a domain. What is not named like
/// one is passed over.
///
/// # Errors
/// xenstore's; that there are none is no error.
pub fn list_backends<X: Xenstore + ?Sized>(
    xs: &mut X,
    class: DeviceClass,
    back: DomId,
) -> Result<Vec<DeviceAddr>, XsError> {
    let root = backend_root(class, back);
    let mut found = Vec::new();
    for front in directory_opt(xs, &root)? {
        let Some(domid) = parse_u16(front.as_bytes()).map(DomId) else {
            continue;
        };
        let devices = directory_opt(xs, &format!("{root}/{front}"))?;
        let indices = devices.iter().filter_map(|d| parse_u32(d.as_bytes()));
        found.extend(indices.map(|index| DeviceAddr {
            class,
            back,
            front: domid,
            index,
        }));
    }
    Ok(found)
}

/// Lists the indices of a domain's frontends of a kind.
///
/// # Errors
/// xenstore's; that there are none is no error.
pub fn list_frontends<X: Xenstore + ?Sized>(
    xs: &mut X,
    class: DeviceClass,
    front: DomId,
) -> Result<Vec<u32>, XsError> {
    let names = directory_opt(xs, &frontend_root(class, front))?;
    Ok(names
        .iter()
        .filter_map(|d| parse_u32(d.as_bytes()))
        .collect())
}

/// The key that holds an end's state, to be watched by the other end. `base` is
/// [`DeviceAddr::backend_path`] or [`DeviceAddr::frontend_path`], here and below.
#[must_use]
pub fn state_path(base: &str) -> String {
    format!("{base}/state")
}

/// The key by which the toolstack tells a backend whether the device is to stay.
#[must_use]
pub fn online_path(backend: &str) -> String {
    format!("{backend}/online")
}

/// Reads an end's state. Nothing there, nothing that may be seen, or nothing that can be understood, is
/// [`XenbusState::Unknown`].
///
/// # Errors
/// xenstore's.
pub fn read_state<X: Xenstore + ?Sized>(xs: &mut X, base: &str) -> Result<XenbusState, XsError> {
    Ok(XenbusState::parse(
        xs.read_peer(&state_path(base))?.as_deref(),
    ))
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

/// Whether the toolstack wants a backend's device to stay; not if the key is gone.
///
/// # Errors
/// xenstore's; the key holds no number.
pub fn read_online<X: Xenstore + ?Sized>(
    xs: &mut X,
    backend: &str,
) -> Result<bool, HandshakeError> {
    Reader { xs, base: backend }.flag("online", false)
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
        let mut w = Writer {
            xs: tx,
            base: backend,
        };
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
        None => Ok(None),
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
    Ok(xs
        .read_opt(&path)?
        .map(|text| String::from_utf8_lossy(&text).into_owned()))
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

/// Makes a domain's home with the rights libxl gives it: the domain may read all of it, and
/// write below `data` and `error`. To be called by dom0 before the domain's first device.
///
/// # Errors
/// xenstore's.
pub fn create_domain<X: Xenstore + ?Sized>(
    xs: &mut X,
    domid: DomId,
    name: &str,
) -> Result<(), HandshakeError> {
    let readable = [
        Perm::new(DomId::DOM0, Access::None),
        Perm::new(domid, Access::Read),
    ];
    let own = [Perm::new(domid, Access::None)];
    let home = format!("/local/domain/{domid}");
    transaction(xs, |tx| {
        tx.mkdir(&home)?;
        tx.set_perms(&home, &readable)?;
        for dir in ["device", "backend", "control"] {
            tx.mkdir(&format!("{home}/{dir}"))?;
            tx.set_perms(&format!("{home}/{dir}"), &readable)?;
        }
        for dir in ["data", "error"] {
            tx.mkdir(&format!("{home}/{dir}"))?;
            tx.set_perms(&format!("{home}/{dir}"), &own)?;
        }
        let mut w = Writer {
            xs: tx,
            base: &home,
        };
        w.put("name", name)?;
        w.put("domid", domid)
    })
}

/// Removes a domain's home. Its devices' backends, which are in other homes, stay.
///
/// # Errors
/// xenstore's.
pub fn remove_domain<X: Xenstore + ?Sized>(xs: &mut X, domid: DomId) -> Result<(), XsError> {
    xs.rm(&format!("/local/domain/{domid}"))
}

/// Asks a device to end: the backend is told that it is to go and to close. It is gone once both
/// ends are [`XenbusState::Closed`]; then call [`remove_device`].
///
/// # Errors
/// xenstore's.
pub fn request_removal<X: Xenstore + ?Sized>(
    xs: &mut X,
    addr: DeviceAddr,
) -> Result<(), HandshakeError> {
    let base = addr.backend_path();
    transaction(xs, |tx| {
        if tx.read_opt(&state_path(&base))?.is_none() {
            return Ok(());
        }
        Writer {
            xs: tx,
            base: &base,
        }
        .put("online", 0)?;
        write_state(tx, &base, XenbusState::Closing)
    })
}

/// Removes both ends of a device, with the errors told of them, and the frontend domain's
/// directory at the backend if it is empty then. To be called by dom0.
///
/// # Errors
/// xenstore's.
pub fn remove_device<X: Xenstore + ?Sized>(
    xs: &mut X,
    addr: DeviceAddr,
) -> Result<(), HandshakeError> {
    let (back, front) = (addr.backend_path(), addr.frontend_path());
    let siblings = format!("{}/{}", backend_root(addr.class, addr.back), addr.front);
    transaction(xs, |tx| {
        for base in [&back, &front] {
            tx.rm(base)?;
            clear_error(tx, base)?;
        }
        if matches!(tx.directory(&siblings), Ok(left) if left.is_empty()) {
            tx.rm(&siblings)?;
        }
        Ok(())
    })
}

/// Makes both directories with libxl's rights: each end owns its own and may read the other's.
pub(super) fn create_ends<X: Xenstore + ?Sized>(
    xs: &mut X,
    addr: DeviceAddr,
) -> Result<(), HandshakeError> {
    let ends = [
        (addr.backend_path(), addr.back, addr.front),
        (addr.frontend_path(), addr.front, addr.back),
    ];
    for (base, owner, reader) in ends {
        if xs.read_opt(&base)?.is_some() {
            return Err(HandshakeError::Exists { path: base.into() });
        }
        xs.mkdir(&base)?;
        xs.set_perms(&base, &end_perms(owner, reader))?;
    }
    Ok(())
}

/// Makes a backend's directory again after its domain died and took it along, and gives the new
/// domain its rights on the frontend's, which xenstore has struck from every node there.
pub(super) fn recreate_backend_end<X: Xenstore + ?Sized>(
    xs: &mut X,
    addr: DeviceAddr,
) -> Result<(), HandshakeError> {
    let (back, front) = (addr.backend_path(), addr.frontend_path());
    if xs.read_opt(&back)?.is_some() {
        return Err(HandshakeError::Exists { path: back.into() });
    }
    xs.mkdir(&back)?;
    xs.set_perms(&back, &end_perms(addr.back, addr.front))?;
    let perms = end_perms(addr.front, addr.back);
    let mut nodes = Vec::from([front]);
    while let Some(node) = nodes.pop() {
        xs.set_perms(&node, &perms)?;
        nodes.extend(xs.directory(&node)?.iter().map(|child| format!("{node}/{child}")));
    }
    Ok(())
}

fn end_perms(owner: DomId, reader: DomId) -> Vec<Perm> {
    let mut perms = Vec::from([Perm::new(owner, Access::None)]);
    if reader != owner {
        perms.push(Perm::new(reader, Access::Read));
    }
    perms
}

fn directory_opt<X: Xenstore + ?Sized>(xs: &mut X, path: &str) -> Result<Vec<String>, XsError> {
    match xs.directory(path) {
        Err(e) if e.is_not_found() => Ok(Vec::new()),
        other => other,
    }
}

/// Splits `/local/domain/<N>/` off a path; a relative one is `home`'s.
fn split_home(path: &str, home: DomId) -> Option<(DomId, &str)> {
    if !path.starts_with('/') {
        return Some((home, path));
    }
    let (domid, rest) = path.strip_prefix("/local/domain/")?.split_once('/')?;
    Some((parse_u16(domid.as_bytes()).map(DomId)?, rest))
}

/// Bounds a text for the operator to what an unprivileged domain may write into one node.
fn shorten(text: &str) -> &str {
    let mut end = text.len().min(1024);
    while !text.is_char_boundary(end) {
        end = end.saturating_sub(1);
    }
    text.get(..end).unwrap_or("")
}

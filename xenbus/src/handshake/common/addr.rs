//! Where devices are.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use pvio_ring::DomId;

use crate::wire::{parse_u16, parse_u32};
use crate::xenstore::{Xenstore, XsError};

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

/// What kind of backend serves a device, as the directories of backends are named. One class of
/// frontends has several: a toolstack says by the kind which program is to serve.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum BackendKind {
    /// `vbd`: what `xl` makes of a block device or a raw image (`backendtype=phy`). Claimed by
    /// Linux's xen-blkback where that is loaded.
    Vbd,
    /// `qdisk`: what `xl` makes of an image that it leaves to a device model.
    Qdisk,
    /// `pvio-vbd`: a disk that no other backend claims.
    PvioVbd,
    /// `vif`: every network interface `xl` makes. Claimed by Linux's xen-netback where loaded.
    Vif,
    /// `pvio-vif`: a network interface that no other backend claims.
    PvioVif,
}

impl BackendKind {
    /// Every kind.
    pub const ALL: [Self; 5] = [Self::Vbd, Self::Qdisk, Self::PvioVbd, Self::Vif, Self::PvioVif];

    /// The word in paths.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Vbd => "vbd",
            Self::Qdisk => "qdisk",
            Self::PvioVbd => "pvio-vbd",
            Self::Vif => "vif",
            Self::PvioVif => "pvio-vif",
        }
    }

    /// What its frontends are.
    #[must_use]
    pub const fn class(self) -> DeviceClass {
        match self {
            Self::Vbd | Self::Qdisk | Self::PvioVbd => DeviceClass::Vbd,
            Self::Vif | Self::PvioVif => DeviceClass::Vif,
        }
    }

    /// The kind with this word in paths.
    #[must_use]
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|k| k.as_str() == word)
    }
}

/// One device: its kind, its two domains, and its number in the frontend (for a disk the
/// `virtual-device`, for a network interface its handle).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct DeviceAddr {
    /// What serves it.
    pub kind: BackendKind,
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
    pub const fn new(kind: BackendKind, back: DomId, front: DomId, index: u32) -> Self {
        Self { kind, back, front, index }
    }

    /// What it is.
    #[must_use]
    pub const fn class(&self) -> DeviceClass {
        self.kind.class()
    }

    /// The backend's directory: `/local/domain/<back>/backend/<kind>/<front>/<index>`.
    #[must_use]
    pub fn backend_path(&self) -> String {
        format!("{}/{}/{}", backend_root(self.kind, self.back), self.front, self.index)
    }

    /// The frontend's directory: `/local/domain/<front>/device/<class>/<index>`.
    #[must_use]
    pub fn frontend_path(&self) -> String {
        FrontendAddr::from(*self).path()
    }

    /// Takes a path at or below a backend's directory apart, as events bring it: the address,
    /// and what follows it (empty for the directory itself). A relative path is one of `home`.
    #[must_use]
    pub fn from_backend_path(path: &str, home: DomId) -> Option<(Self, &str)> {
        let (back, rest) = split_home(path, home)?;
        let rest = rest.strip_prefix("backend/")?;
        let (kind, rest) = rest.split_once('/')?;
        let (front, rest) = rest.split_once('/')?;
        let (index, below) = rest.split_once('/').unwrap_or((rest, ""));
        let kind = BackendKind::from_word(kind)?;
        let front = parse_u16(front.as_bytes()).map(DomId)?;
        let index = parse_u32(index.as_bytes())?;
        Some((Self { kind, back, front, index }, below))
    }
}

/// A device as its frontend's domain knows it: by its class and number. Which backend serves it, of
/// whatever kind, is in the frontend's directory ([`read_backend_end`](super::read_backend_end)).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FrontendAddr {
    /// What it is.
    pub class: DeviceClass,
    /// The domain that uses it.
    pub front: DomId,
    /// Which one it is among those of its class in the frontend.
    pub index: u32,
}

impl FrontendAddr {
    /// Returns an address.
    #[must_use]
    pub const fn new(class: DeviceClass, front: DomId, index: u32) -> Self {
        Self { class, front, index }
    }

    /// Returns the frontend's directory: `/local/domain/<front>/device/<class>/<index>`.
    #[must_use]
    pub fn path(&self) -> String {
        format!("{}/{}", frontend_root(self.class, self.front), self.index)
    }
}

impl From<DeviceAddr> for FrontendAddr {
    fn from(addr: DeviceAddr) -> Self {
        Self::new(addr.class(), addr.front, addr.index)
    }
}

/// The directory of all backends of a kind in a domain, to be watched by whoever serves them.
#[must_use]
pub fn backend_root(kind: BackendKind, back: DomId) -> String {
    format!("/local/domain/{back}/backend/{}", kind.as_str())
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
    Some((DeviceClass::from_str(class)?, front, parse_u32(index.as_bytes())?, below))
}

/// Lists the backends of a kind that the toolstack has made in a domain. What is not named like
/// one is passed over.
///
/// # Errors
/// xenstore's; that there are none is no error.
pub fn list_backends<X: Xenstore + ?Sized>(
    xs: &mut X,
    kind: BackendKind,
    back: DomId,
) -> Result<Vec<DeviceAddr>, XsError> {
    let root = backend_root(kind, back);
    let mut found = Vec::new();
    for front in directory_opt(xs, &root)? {
        let Some(domid) = parse_u16(front.as_bytes()).map(DomId) else {
            continue;
        };
        let devices = directory_opt(xs, &format!("{root}/{front}"))?;
        let indices = devices.iter().filter_map(|d| parse_u32(d.as_bytes()));
        found.extend(indices.map(|index| DeviceAddr { kind, back, front: domid, index }));
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
    Ok(names.iter().filter_map(|d| parse_u32(d.as_bytes())).collect())
}

pub(super) fn directory_opt<X: Xenstore + ?Sized>(
    xs: &mut X,
    path: &str,
) -> Result<Vec<String>, XsError> {
    match xs.directory(path) {
        Err(e) if e.is_not_found() => Ok(Vec::new()),
        other => other,
    }
}

/// Splits `/local/domain/<N>/` off a path; a relative one is `home`'s.
pub(super) fn split_home(path: &str, home: DomId) -> Option<(DomId, &str)> {
    if !path.starts_with('/') {
        return Some((home, path));
    }
    let (domid, rest) = path.strip_prefix("/local/domain/")?.split_once('/')?;
    Some((parse_u16(domid.as_bytes()).map(DomId)?, rest))
}

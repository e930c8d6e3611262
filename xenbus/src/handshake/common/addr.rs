//! Addresses of devices.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use pvio_ring::DomId;

use crate::wire::{parse_u16, parse_u32};
use crate::xenstore::{Xenstore, XsError};

/// The supported classes of devices, as named in paths.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum DeviceClass {
    /// A virtual disk.
    Vbd,
    /// A virtual network interface.
    Vif,
}

impl DeviceClass {
    /// Every kind.
    pub const ALL: [Self; 2] = [Self::Vbd, Self::Vif];

    /// Returns the name in paths.
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

/// The kind of a backend, as named in the paths of backends. One class of frontends has several
/// kinds: a toolstack selects by the kind which program serves the device.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum BackendKind {
    /// `vbd`: `xl` uses it for a block device or a raw image (`backendtype=phy`). Claimed by
    /// Linux's xen-blkback where that is loaded.
    Vbd,
    /// `qdisk`: `xl` uses it for an image that a device model serves.
    Qdisk,
    /// `pvio-vbd`: a disk that no other backend program claims.
    PvioVbd,
    /// `vif`: `xl` uses it for every network interface. Claimed by Linux's xen-netback where
    /// loaded.
    Vif,
    /// `pvio-vif`: a network interface that no other backend program claims.
    PvioVif,
}

impl BackendKind {
    /// Every kind.
    pub const ALL: [Self; 5] = [Self::Vbd, Self::Qdisk, Self::PvioVbd, Self::Vif, Self::PvioVif];

    /// Returns the name in paths.
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

    /// Returns the class of its frontends.
    #[must_use]
    pub const fn class(self) -> DeviceClass {
        match self {
            Self::Vbd | Self::Qdisk | Self::PvioVbd => DeviceClass::Vbd,
            Self::Vif | Self::PvioVif => DeviceClass::Vif,
        }
    }

    /// Returns the kind with this name in paths.
    #[must_use]
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|k| k.as_str() == word)
    }
}

/// The address of a device: its kind, its two domains, and its number in the frontend (for a disk
/// the `virtual-device`, for a network interface its handle).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct DeviceAddr {
    /// The kind of backend.
    pub kind: BackendKind,
    /// The backend's domain.
    pub back: DomId,
    /// The frontend's domain.
    pub front: DomId,
    /// The number of the device within its class in the frontend's domain.
    pub index: u32,
}

impl DeviceAddr {
    /// Creates an address.
    #[must_use]
    pub const fn new(kind: BackendKind, back: DomId, front: DomId, index: u32) -> Self {
        Self { kind, back, front, index }
    }

    /// Returns the class of the device.
    #[must_use]
    pub const fn class(&self) -> DeviceClass {
        self.kind.class()
    }

    /// Returns the backend's directory: `/local/domain/<back>/backend/<kind>/<front>/<index>`.
    #[must_use]
    pub fn backend_path(&self) -> String {
        format!("{}/{}/{}", backend_root(self.kind, self.back), self.front, self.index)
    }

    /// Returns the frontend's directory: `/local/domain/<front>/device/<class>/<index>`.
    #[must_use]
    pub fn frontend_path(&self) -> String {
        FrontendAddr::from(*self).path()
    }

    /// Parses a path at or below a backend's directory, as in events: returns the address and the
    /// rest of the path (empty for the directory itself). A relative path is relative to `home`.
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

/// A device as addressed in its frontend's domain: by class and number. The frontend's directory
/// names the backend and its kind ([`read_backend_path`](super::read_backend_path)).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FrontendAddr {
    /// The class of the device.
    pub class: DeviceClass,
    /// The frontend's domain.
    pub front: DomId,
    /// The number of the device within its class in the frontend's domain.
    pub index: u32,
}

impl FrontendAddr {
    /// Creates an address.
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

/// Returns the directory of all backends of a kind in a domain, which a backend program watches.
#[must_use]
pub fn backend_root(kind: BackendKind, back: DomId) -> String {
    format!("/local/domain/{back}/backend/{}", kind.as_str())
}

/// Returns the directory of all frontends of a class in a domain.
#[must_use]
pub fn frontend_root(class: DeviceClass, front: DomId) -> String {
    format!("/local/domain/{front}/device/{}", class.as_str())
}

/// Parses a path at or below a frontend's directory: returns its class, domain and index, and the
/// rest of the path. A relative path is relative to `home`.
#[must_use]
pub fn parse_frontend_path(path: &str, home: DomId) -> Option<(DeviceClass, DomId, u32, &str)> {
    let (front, rest) = split_home(path, home)?;
    let rest = rest.strip_prefix("device/")?;
    let (class, rest) = rest.split_once('/')?;
    let (index, below) = rest.split_once('/').unwrap_or((rest, ""));
    Some((DeviceClass::from_str(class)?, front, parse_u32(index.as_bytes())?, below))
}

/// Lists the backends of a kind that the toolstack has created in a domain. Entries with other
/// names are ignored.
///
/// # Errors
/// An error of xenstore; an empty list is not an error.
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

/// Lists the indices of a domain's frontends of a class.
///
/// # Errors
/// An error of xenstore; an empty list is not an error.
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

/// Splits `/local/domain/<N>/` off a path; a relative one is relative to `home`.
pub(super) fn split_home(path: &str, home: DomId) -> Option<(DomId, &str)> {
    if !path.starts_with('/') {
        return Some((home, path));
    }
    let (domid, rest) = path.strip_prefix("/local/domain/")?.split_once('/')?;
    Some((parse_u16(domid.as_bytes()).map(DomId)?, rest))
}

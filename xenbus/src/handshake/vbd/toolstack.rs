//! The keys that the toolstack writes for both sides of a disk when it creates the device.

use alloc::string::String;
use alloc::string::ToString;
use alloc::vec::Vec;

use pvio_ring::DomId;

use crate::handshake::HandshakeError;
use crate::handshake::common::{
    DeviceAddr, DeviceClass, check_frontend, create_backend_dir, create_frontend_dir, state_path,
};
use crate::handshake::encoding::{BYTES, DOMAIN, FLAG, OneOf, PathOf, TEXT};
use crate::handshake::fields::{Reader, Writer};
use crate::handshake::record::{Optional, Or, OrName, Required, read_and_write, record};
use crate::xenstore::{Xenstore, transaction};

/// Whether the frontend may write (`mode`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Mode {
    /// `r`
    ReadOnly,
    /// `w`
    ReadWrite,
}

/// The type of device that the frontend should present (`device-type`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum DeviceType {
    /// A hard disk.
    Disk,
    /// A CD drive.
    Cdrom,
}

const MODE: OneOf<Mode> = OneOf(&[(Mode::ReadOnly, "r"), (Mode::ReadWrite, "w")], "r or w");

const DEVICE_TYPE: OneOf<DeviceType> =
    OneOf(&[(DeviceType::Disk, "disk"), (DeviceType::Cdrom, "cdrom")], "disk or cdrom");

record! {
    /// The toolstack's keys for a disk's backend. `mode`, `params`, `frontend` and `frontend-id`
    /// are required; other missing keys have the header's defaults.
    #[derive(Clone, PartialEq, Eq, Debug)]
    pub struct ToolstackBack {
        /// `frontend-id`: the frontend's domain.
        pub frontend_id: DomId = "frontend-id" => Required(DOMAIN),
        /// `mode`.
        pub mode: Mode = "mode" => Required(MODE),
        /// `frontend`: the frontend's directory, in the home directory of its domain.
        pub frontend: String = "frontend" => Required(PathOf::domain(&frontend_id)),
        /// `online`: whether the device remains when the frontend closes.
        pub online: bool = "online" => Or(FLAG, false),
        /// `removable`: whether the frontend should present a drive with removable media.
        pub removable: bool = "removable" => Or(FLAG, false),
        /// `bootable`: whether the guest may boot from it.
        pub bootable: bool = "bootable" => Or(FLAG, false),
        /// `dev`: the toolstack's name of the device (`xvda`).
        pub dev: String = "dev" => Or(TEXT, String::new()),
        /// `type`: the kind of storage that `params` names (`phy`, `file`, `tap`, …).
        pub kind: String = "type" => Or(TEXT, String::new()),
        /// `device-type`.
        pub device_type: DeviceType = "device-type" => Or(DEVICE_TYPE, DeviceType::Disk),
        /// `params`: the storage of the disk, interpreted by the backend. It contains a path, so it
        /// is bytes.
        pub params: Vec<u8> = "params" => Required(BYTES),
        /// `script`: path of the hotplug script, which the toolstack runs to prepare the storage.
        pub script: Option<Vec<u8>> = "script" => Optional(BYTES),
        /// `physical-device-path`: the block device that the script found or made for `params`.
        pub physical_device_path: Option<Vec<u8>> = "physical-device-path" => Optional(BYTES),
        /// `direct-io-safe`: whether the storage may be accessed with direct I/O, bypassing the
        /// host's cache.
        pub direct_io_safe: bool = "direct-io-safe" => Or(FLAG, false),
        /// `discard-enable`: whether discards may be advertised.
        pub discard_enable: bool = "discard-enable" => Or(FLAG, true),
        /// `pvio-options`: options in pvio's own syntax, interpreted by the backend. Options that
        /// apply to a connected disk can be changed while it is connected.
        pub options: Option<Vec<u8>> = OPTIONS => Optional(BYTES),
    }
}
read_and_write!(ToolstackBack);

/// Value of `type` for disks that pvio's own toolstack created.
pub const OWN_KIND: &str = "pvio";
/// The hotplug script of disks whose `params` are in pvio's own syntax.
pub const OWN_SCRIPT: &str = "block-pvio";
/// Name of the key with a disk's options.
const OPTIONS: &str = "pvio-options";

/// Returns whether a change of this key of a disk's backend takes effect while the disk is
/// connected.
#[must_use]
pub fn changes_live(key: &str) -> bool {
    key == OPTIONS
}

/// The storage of a disk, as named in its backend's directory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Backing<'a> {
    /// A format and a path.
    Format(&'a str, &'a [u8]),
    /// In pvio's own syntax, which includes the format.
    Own(&'a [u8]),
}

impl ToolstackBack {
    /// Creates the keys of a writable, online hard disk on `params`; all fields can be changed
    /// afterwards.
    #[must_use]
    pub fn new(addr: DeviceAddr, params: &(impl AsRef<[u8]> + ?Sized)) -> Self {
        Self {
            frontend: addr.frontend_path(),
            frontend_id: addr.front,
            online: true,
            removable: false,
            bootable: true,
            dev: addr.index.to_string(),
            kind: "file".into(),
            mode: Mode::ReadWrite,
            device_type: DeviceType::Disk,
            params: params.as_ref().into(),
            script: None,
            physical_device_path: None,
            direct_io_safe: false,
            discard_enable: true,
            options: None,
        }
    }

    /// Returns whether the media can be changed while the disk is connected: a CD drive, or one
    /// with removable media.
    #[must_use]
    pub fn is_drive(&self) -> bool {
        self.removable || self.device_type == DeviceType::Cdrom
    }

    /// Returns whether it is a drive without media, in libxl's form: `params` are empty, or end
    /// after the format (`empty:`).
    #[must_use]
    pub fn is_empty_drive(&self) -> bool {
        let (Backing::Own(place) | Backing::Format(_, place)) = self.backing();
        self.is_drive() && place.is_empty()
    }

    /// Returns the storage of the disk. For kinds that a device model serves, the path is preceded
    /// by the format (`aio:/srv/guest.img`, `qcow2:/srv/guest.qcow2`); libxl's `aio` is returned as
    /// `raw`. `params` of [`OWN_KIND`] and [`OWN_SCRIPT`] are in pvio's own syntax; all others are
    /// raw.
    #[must_use]
    pub fn backing(&self) -> Backing<'_> {
        let script = self.script.as_deref();
        let script = script.and_then(|script| script.rsplit(|byte| *byte == b'/').next());
        if self.kind == OWN_KIND || script == Some(OWN_SCRIPT.as_bytes()) {
            return Backing::Own(&self.params);
        }
        let mut parts = self.params.splitn(2, |byte| *byte == b':');
        match (parts.next(), parts.next()) {
            (Some(b"aio"), Some(path)) if self.kind == "qdisk" => Backing::Format("raw", path),
            (Some(format), Some(path)) if self.kind == "qdisk" => {
                // A format that is not valid text is an unknown format.
                Backing::Format(core::str::from_utf8(format).unwrap_or("\u{fffd}"), path)
            }
            _ => Backing::Format("raw", &self.params),
        }
    }

    /// Changes a disk's options.
    ///
    /// # Errors
    /// [`HandshakeError`]; [`HandshakeError::Missing`] if there is no such disk.
    pub fn write_options<X: Xenstore + ?Sized>(
        xs: &mut X,
        addr: DeviceAddr,
        options: &str,
    ) -> Result<(), HandshakeError> {
        let base = addr.backend_path();
        transaction(xs, |tx| {
            if tx.read_opt(&state_path(&base))?.is_none() {
                return Err(Reader { xs: tx, base: &base }.missing("state"));
            }
            Writer { xs: tx, base: &base }.put(OPTIONS, options)
        })
    }
}

record! {
    /// The toolstack's keys for a disk's frontend.
    #[derive(Clone, PartialEq, Eq, Debug)]
    pub struct ToolstackFront {
        /// `backend-id`: the backend's domain.
        pub backend_id: DomId = "backend-id" => Required(DOMAIN),
        /// `backend`: the backend's directory, in the home directory of its domain.
        pub backend: String = "backend" => Required(PathOf::domain(&backend_id)),
        /// `virtual-device`: the number of the disk in the guest, encoded as in
        /// `docs/man/xen-vbd-interface.7`. If the key is missing, it is the name of the frontend's
        /// directory.
        pub virtual_device: u32 = "virtual-device" => OrName,
        /// `device-type`.
        pub device_type: DeviceType = "device-type" => Or(DEVICE_TYPE, DeviceType::Disk),
        /// `trusted`: whether the backend may access the frontend's data pages; if not, the
        /// frontend must copy through pages that hold no other data.
        pub trusted: bool = "trusted" => Or(FLAG, true),
    }
}
read_and_write!(ToolstackFront);

impl ToolstackFront {
    /// Returns the keys of a device with this address.
    #[must_use]
    pub fn new(addr: DeviceAddr, device_type: DeviceType) -> Self {
        Self {
            backend: addr.backend_path(),
            backend_id: addr.back,
            virtual_device: addr.index,
            device_type,
            trusted: true,
        }
    }
}

/// Creates a disk: the directories of both sides with their permissions, keys and state
/// [`XenbusState::Initialising`](crate::XenbusState::Initialising), in one transaction. To be called by dom0.
///
/// # Errors
/// [`HandshakeError::Exists`] if either directory exists; [`HandshakeError::Unwritable`] if `back`
/// names another frontend than `addr`, or `addr` is not a disk.
pub fn create_device<X: Xenstore + ?Sized>(
    xs: &mut X,
    addr: DeviceAddr,
    back: &ToolstackBack,
) -> Result<(), HandshakeError> {
    create_device_with(xs, addr, &ToolstackFront::new(addr, back.device_type), back)
}

/// Creates a disk as [`create_device`] does, with other keys for the frontend than the default
/// ones.
///
/// # Errors
/// As [`create_device`].
pub fn create_device_with<X: Xenstore + ?Sized>(
    xs: &mut X,
    addr: DeviceAddr,
    front: &ToolstackFront,
    back: &ToolstackBack,
) -> Result<(), HandshakeError> {
    transaction(xs, |tx| {
        create_frontend_dir(tx, addr, front)?;
        create_backend(tx, addr, back)
    })
}

/// Inserts media into a drive, or ejects them if `params` are empty. The backend watches the key.
/// To be called by dom0.
///
/// # Errors
/// [`HandshakeError::Unwritable`] if there is no backend, or it is not a drive with removable
/// media.
pub fn change_media<X: Xenstore + ?Sized>(
    xs: &mut X,
    addr: DeviceAddr,
    params: &(impl AsRef<[u8]> + ?Sized),
) -> Result<(), HandshakeError> {
    let base = addr.backend_path();
    transaction(xs, |tx| {
        if !ToolstackBack::read(tx, &base)?.is_drive() {
            return Err(HandshakeError::Unwritable("the disk is no drive of removable media"));
        }
        let mut w = Writer { xs: tx, base: &base };
        // The block device that a script made for the previous media.
        w.clear("physical-device-path")?;
        w.put_bytes("params", params.as_ref())
    })
}

/// Creates only the backend's directory of a disk whose frontend exists: its driver domain died and
/// another one replaces it. The frontend reconnects when the new backend writes its offer.
///
/// # Errors
/// As [`create_device`].
pub fn create_backend<X: Xenstore + ?Sized>(
    xs: &mut X,
    addr: DeviceAddr,
    back: &ToolstackBack,
) -> Result<(), HandshakeError> {
    if addr.class() != DeviceClass::Vbd {
        return Err(HandshakeError::Unwritable("a disk of another class"));
    }
    check_frontend(addr, back.frontend_id, &back.frontend)?;
    create_backend_dir(xs, addr, back)
}

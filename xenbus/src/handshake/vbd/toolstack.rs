//! The keys that the toolstack writes for both sides of a disk when it creates the device.

use alloc::string::String;
use alloc::string::ToString;
use alloc::vec::Vec;

use pvio_ring::DomId;

use crate::handshake::HandshakeError;
use crate::handshake::common::{
    DeviceAddr, DeviceClass, create_backend_end, create_frontend_end, regrant_frontend_end,
    state_path, write_state,
};
use crate::handshake::fields::{Reader, Writer};
use crate::state::XenbusState;
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

impl DeviceType {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Cdrom => "cdrom",
        }
    }
}

/// The toolstack's keys for a disk's backend.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ToolstackBack {
    /// `frontend`: the frontend's directory.
    pub frontend: String,
    /// `frontend-id`: the frontend's domain.
    pub frontend_id: DomId,
    /// `online`: whether the device remains when the frontend closes.
    pub online: bool,
    /// `removable`: whether the frontend should present a drive with removable media.
    pub removable: bool,
    /// `bootable`: whether the guest may boot from it.
    pub bootable: bool,
    /// `dev`: the toolstack's name of the device (`xvda`).
    pub dev: String,
    /// `type`: the kind of storage that `params` names (`phy`, `file`, `tap`, …).
    pub kind: String,
    /// `mode`.
    pub mode: Mode,
    /// `device-type`.
    pub device_type: DeviceType,
    /// `params`: the storage of the disk, interpreted by the backend. It contains a path, so it is
    /// bytes.
    pub params: Vec<u8>,
    /// `script`: path of the hotplug script, which the toolstack runs to prepare the storage.
    pub script: Option<Vec<u8>>,
    /// `physical-device-path`: the block device that the script found or made for `params`.
    pub physical_device_path: Option<Vec<u8>>,
    /// `direct-io-safe`: whether the storage may be accessed with direct I/O, bypassing the host's
    /// cache.
    pub direct_io_safe: bool,
    /// `discard-enable`: whether discards may be advertised.
    pub discard_enable: bool,
    /// `pvio-options`: options in pvio's own syntax, interpreted by the backend. Options that apply
    /// to a connected disk can be changed while it is connected.
    pub options: Option<Vec<u8>>,
}

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

    /// Reads a backend's directory. `mode`, `params`, `frontend` and `frontend-id` are required;
    /// other missing keys have the header's defaults.
    ///
    /// # Errors
    /// [`HandshakeError`], also if the frontend's path is not in the home directory of its domain.
    pub fn read<X: Xenstore + ?Sized>(xs: &mut X, base: &str) -> Result<Self, HandshakeError> {
        transaction(xs, |tx| {
            let mut r = Reader { xs: tx, base };
            let frontend_id = r.domid("frontend-id")?;
            let mode = match r.raw("mode")?.as_deref() {
                Some(b"r") => Mode::ReadOnly,
                Some(b"w") => Mode::ReadWrite,
                Some(other) => return Err(r.malformed("mode", other, "r or w")),
                None => return Err(r.missing("mode")),
            };
            Ok(Self {
                frontend: r.peer_path("frontend", frontend_id)?,
                frontend_id,
                online: r.flag("online", false)?,
                removable: r.flag("removable", false)?,
                bootable: r.flag("bootable", false)?,
                dev: r.opt_text("dev")?.unwrap_or_default(),
                kind: r.opt_text("type")?.unwrap_or_default(),
                mode,
                device_type: read_device_type(&mut r)?,
                params: r.need_bytes("params")?,
                script: r.opt_bytes("script")?,
                physical_device_path: r.opt_bytes("physical-device-path")?,
                direct_io_safe: r.flag("direct-io-safe", false)?,
                discard_enable: r.flag("discard-enable", true)?,
                options: r.opt_bytes(OPTIONS)?,
            })
        })
    }

    /// Writes a backend's directory, without its state.
    ///
    /// # Errors
    /// [`HandshakeError`].
    pub fn write<X: Xenstore + ?Sized>(
        &self,
        xs: &mut X,
        base: &str,
    ) -> Result<(), HandshakeError> {
        transaction(xs, |tx| {
            let mut w = Writer { xs: tx, base };
            w.put("frontend", &self.frontend)?;
            w.put("frontend-id", self.frontend_id)?;
            w.flag("online", self.online)?;
            w.flag("removable", self.removable)?;
            w.flag("bootable", self.bootable)?;
            w.put("dev", &self.dev)?;
            w.put("type", &self.kind)?;
            w.put("mode", if self.mode == Mode::ReadOnly { "r" } else { "w" })?;
            w.put("device-type", self.device_type.as_str())?;
            w.put_bytes("params", &self.params)?;
            w.opt_bytes("script", self.script.as_deref())?;
            w.opt_bytes("physical-device-path", self.physical_device_path.as_deref())?;
            w.flag("direct-io-safe", self.direct_io_safe)?;
            w.flag("discard-enable", self.discard_enable)?;
            w.opt_bytes(OPTIONS, self.options.as_deref())
        })
    }
}

/// The toolstack's keys for a disk's frontend.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ToolstackFront {
    /// `backend`: the backend's directory.
    pub backend: String,
    /// `backend-id`: the backend's domain.
    pub backend_id: DomId,
    /// `virtual-device`: the number of the disk in the guest, encoded as in
    /// `docs/man/xen-vbd-interface.7`. If the key is missing, it is the name of the frontend's
    /// directory.
    pub virtual_device: u32,
    /// `device-type`.
    pub device_type: DeviceType,
    /// `trusted`: whether the backend may access the frontend's data pages; if not, the frontend
    /// must copy through pages that hold no other data.
    pub trusted: bool,
}

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

    /// Reads a frontend's directory.
    ///
    /// # Errors
    /// [`HandshakeError`], also if the backend's path is not in the home directory of its domain.
    pub fn read<X: Xenstore + ?Sized>(xs: &mut X, base: &str) -> Result<Self, HandshakeError> {
        transaction(xs, |tx| {
            let mut r = Reader { xs: tx, base };
            let backend_id = r.domid("backend-id")?;
            Ok(Self {
                backend: r.peer_path("backend", backend_id)?,
                backend_id,
                virtual_device: r.number_of_device("virtual-device")?,
                device_type: read_device_type(&mut r)?,
                trusted: r.flag("trusted", true)?,
            })
        })
    }

    /// Writes a frontend's directory, without its state.
    ///
    /// # Errors
    /// [`HandshakeError`].
    pub fn write<X: Xenstore + ?Sized>(
        &self,
        xs: &mut X,
        base: &str,
    ) -> Result<(), HandshakeError> {
        transaction(xs, |tx| {
            let mut w = Writer { xs: tx, base };
            w.put("backend", &self.backend)?;
            w.put("backend-id", self.backend_id)?;
            w.put("virtual-device", self.virtual_device)?;
            w.put("device-type", self.device_type.as_str())?;
            w.flag("trusted", self.trusted)
        })
    }
}

/// Creates a disk: the directories of both sides with their permissions, keys and state
/// [`XenbusState::Initialising`], in one transaction. To be called by dom0.
///
/// # Errors
/// [`HandshakeError::Exists`] if either directory exists; [`HandshakeError::Unwritable`] if `back`
/// names another frontend than `addr`, or `addr` is not a disk.
pub fn create_device<X: Xenstore + ?Sized>(
    xs: &mut X,
    addr: DeviceAddr,
    back: &ToolstackBack,
) -> Result<(), HandshakeError> {
    create_both_ends(xs, addr, &ToolstackFront::new(addr, back.device_type), back)
}

/// Creates a disk as [`create_device`] does, with other keys for the frontend than the default
/// ones.
///
/// # Errors
/// As [`create_device`].
pub fn create_both_ends<X: Xenstore + ?Sized>(
    xs: &mut X,
    addr: DeviceAddr,
    front: &ToolstackFront,
    back: &ToolstackBack,
) -> Result<(), HandshakeError> {
    transaction(xs, |tx| {
        create_frontend_end(tx, addr)?;
        create_backend(tx, addr, back)?;
        front.write(tx, &addr.frontend_path())?;
        write_state(tx, &addr.frontend_path(), XenbusState::Initialising)
    })
}

/// Inserts media into a drive, or ejects them if `params` are empty. The backend watches the key.
/// To be called by dom0.
///
/// # Errors
/// [`HandshakeError::Unwritable`] if there is no backend, or it is not a drive with removable
/// media.
pub fn change_medium<X: Xenstore + ?Sized>(
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
    if back.frontend_id != addr.front || back.frontend != addr.frontend_path() {
        return Err(HandshakeError::Unwritable("the frontend is not the address's"));
    }
    transaction(xs, |tx| {
        create_backend_end(tx, addr)?;
        regrant_frontend_end(tx, addr)?;
        back.write(tx, &addr.backend_path())?;
        write_state(tx, &addr.backend_path(), XenbusState::Initialising)
    })
}

fn read_device_type<X: Xenstore + ?Sized>(
    r: &mut Reader<'_, X>,
) -> Result<DeviceType, HandshakeError> {
    match r.raw("device-type")?.as_deref() {
        None | Some(b"disk") => Ok(DeviceType::Disk),
        Some(b"cdrom") => Ok(DeviceType::Cdrom),
        Some(other) => Err(r.malformed("device-type", other, "disk or cdrom")),
    }
}

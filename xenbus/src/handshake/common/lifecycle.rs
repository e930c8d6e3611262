//! How domains and devices come and go, for the toolstack.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use pvio_ring::DomId;

use super::addr::directory_opt;
use super::{
    DeviceAddr, DeviceClass, backend_root, clear_error, frontend_root, state_path, write_state,
};
use crate::handshake::HandshakeError;
use crate::handshake::fields::{Reader, Writer};
use crate::state::XenbusState;
use crate::wire::{Access, Perm};
use crate::xenstore::{Xenstore, XsError, transaction};

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
    let readable = [Perm::new(DomId::DOM0, Access::None), Perm::new(domid, Access::Read)];
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
        let mut w = Writer { xs: tx, base: &home };
        w.put("name", name)?;
        w.put("domid", domid)
    })
}

/// Tells libxl that a guest's device model runs, for which it waits. To be called by the domain the
/// device model is in.
///
/// # Errors
/// xenstore's.
pub fn announce_device_model<X: Xenstore + ?Sized>(
    xs: &mut X,
    guest: DomId,
) -> Result<(), HandshakeError> {
    // Relative to one's own home, as libxl has it.
    Writer { xs, base: &format!("device-model/{guest}") }.put("state", "running")
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
        Writer { xs: tx, base: &base }.put("online", 0)?;
        write_state(tx, &base, XenbusState::Closing)
    })
}

/// Makes the directories of a domain's backends again, which went with the domain when it was
/// destroyed, from what libxl keeps of them for itself. To be called by dom0, once the domain is back
/// under its old number: it then finds every backend Connected, as its frontend still is, and goes
/// on with the session. Which were made; those that are there stay as they are.
///
/// # Errors
/// xenstore's.
pub fn revive_backends<X: Xenstore + ?Sized>(
    xs: &mut X,
    back: DomId,
) -> Result<Vec<DeviceAddr>, HandshakeError> {
    let mut made = Vec::new();
    for guest in directory_opt(xs, "/libxl")? {
        for class in DeviceClass::ALL {
            let devices = format!("/libxl/{guest}/device/{}", class.as_str());
            for index in directory_opt(xs, &devices)? {
                let base = format!("{devices}/{index}");
                let backend = (Reader { xs, base: &base }).opt_text("backend")?;
                let addr = backend
                    .as_deref()
                    .and_then(|path| DeviceAddr::from_backend_path(path, DomId::DOM0))
                    .map(|(addr, _)| addr)
                    .filter(|addr| addr.back == back);
                if let Some(addr) = addr
                    && revive_backend(xs, addr, &base)?
                {
                    made.push(addr);
                }
            }
        }
    }
    Ok(made)
}

/// Writes down for libxl that a device was made: with that it lists the device, and removes it with
/// its guest. Only for kinds of backend that libxl knows. To be called by dom0.
///
/// # Errors
/// xenstore's.
pub fn tell_libxl<X: Xenstore + ?Sized>(
    xs: &mut X,
    addr: DeviceAddr,
) -> Result<(), HandshakeError> {
    let (base, kept) = (addr.backend_path(), libxl_path(addr));
    transaction(xs, |tx| {
        Writer { xs: tx, base: &kept }.put("backend", &base)?;
        for key in directory_opt(tx, &base)? {
            let value = tx.read_opt(&format!("{base}/{key}"))?.unwrap_or_default();
            tx.write(&format!("{kept}/{key}"), &value)?;
        }
        Ok(())
    })
}

fn libxl_path(addr: DeviceAddr) -> String {
    format!("/libxl/{}/device/{}/{}", addr.front, addr.class().as_str(), addr.index)
}

/// The name a domain has.
///
/// # Errors
/// xenstore's; that it has none is no error.
pub fn domain_name<X: Xenstore + ?Sized>(
    xs: &mut X,
    domain: DomId,
) -> Result<Option<String>, HandshakeError> {
    (Reader { xs, base: &format!("/local/domain/{domain}") }).opt_text("name")
}

/// Every domain that has a home.
///
/// # Errors
/// xenstore's.
pub fn list_domains<X: Xenstore + ?Sized>(xs: &mut X) -> Result<Vec<DomId>, XsError> {
    let mut ids: Vec<DomId> = directory_opt(xs, "/local/domain")?
        .iter()
        .filter_map(|name| name.parse().ok().map(DomId))
        .collect();
    ids.sort_unstable();
    Ok(ids)
}

/// The device that a frontend's directory leads to; `None` if there is none, or it leads nowhere.
///
/// # Errors
/// xenstore's.
pub fn find_device<X: Xenstore + ?Sized>(
    xs: &mut X,
    class: DeviceClass,
    front: DomId,
    index: u32,
) -> Result<Option<DeviceAddr>, HandshakeError> {
    let base = format!("{}/{index}", frontend_root(class, front));
    let backend = (Reader { xs, base: &base }).opt_text("backend")?;
    let addr = backend
        .and_then(|path| DeviceAddr::from_backend_path(&path, DomId::DOM0).map(|(addr, _)| addr));
    Ok(addr.filter(|a| a.front == front && a.index == index && a.class() == class))
}

fn revive_backend<X: Xenstore + ?Sized>(
    xs: &mut X,
    addr: DeviceAddr,
    kept: &str,
) -> Result<bool, HandshakeError> {
    let base = addr.backend_path();
    transaction(xs, |tx| {
        if tx.read_opt(&state_path(&base))?.is_some() {
            return Ok(false);
        }
        create_backend_end(tx, addr)?;
        regrant_frontend_end(tx, addr)?;
        for key in directory_opt(tx, kept)? {
            if key != "backend" && key != "state" {
                let value = tx.read_opt(&format!("{kept}/{key}"))?.unwrap_or_default();
                tx.write(&format!("{base}/{key}"), &value)?;
            }
        }
        Writer { xs: tx, base: &base }.put(REVIVED, 1)?;
        write_state(tx, &base, XenbusState::Connected)?;
        Ok(true)
    })
}

/// Stands in a directory made by [`revive_backends`] until its backend has said anew what went with
/// the old one.
const REVIVED: &str = "revived";

/// Whether a backend's directory was made by [`revive_backends`] and lacks what its backend told the
/// frontend once.
///
/// # Errors
/// xenstore's; the key holds no number.
pub fn is_revived<X: Xenstore + ?Sized>(xs: &mut X, back: &str) -> Result<bool, HandshakeError> {
    (Reader { xs, base: back }).flag(REVIVED, false)
}

/// It lacks nothing any more.
///
/// # Errors
/// xenstore's.
pub fn clear_revived<X: Xenstore + ?Sized>(xs: &mut X, back: &str) -> Result<(), XsError> {
    xs.rm(&format!("{back}/{REVIVED}"))
}

/// The number of the domain with a name.
///
/// # Errors
/// xenstore's; that there is none is no error.
pub fn find_domain<X: Xenstore + ?Sized>(
    xs: &mut X,
    name: &str,
) -> Result<Option<DomId>, HandshakeError> {
    for domain in directory_opt(xs, "/local/domain")? {
        let base = format!("/local/domain/{domain}");
        if (Reader { xs, base: &base }).opt_text("name")?.as_deref() == Some(name) {
            return Ok(domain.parse().ok().map(DomId));
        }
    }
    Ok(None)
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
    let front = addr.frontend_path();
    transaction(xs, |tx| {
        tx.rm(&front)?;
        clear_error(tx, &front)?;
        tx.rm(&libxl_path(addr))?;
        remove_backend_end(tx, addr)
    })
}

/// Removes a backend's directory, with the error told of it, and the frontend domain's directory
/// above if that is empty then. What the domain has no right to remove, stays.
///
/// # Errors
/// xenstore's.
pub fn remove_backend_end<X: Xenstore + ?Sized>(
    xs: &mut X,
    addr: DeviceAddr,
) -> Result<(), HandshakeError> {
    let back = addr.backend_path();
    let siblings = format!("{}/{}", backend_root(addr.kind, addr.back), addr.front);
    transaction(xs, |tx| {
        tx.rm(&back)?;
        clear_error(tx, &back)?;
        if matches!(tx.directory(&siblings), Ok(left) if left.is_empty()) {
            match tx.rm(&siblings) {
                // Only the toolstack may.
                Err(XsError::Refused { .. }) => {}
                other => other?,
            }
        }
        Ok(())
    })
}

/// Makes an end's directory with libxl's rights: it owns its own, and the other may read it.
fn create_end<X: Xenstore + ?Sized>(
    xs: &mut X,
    base: &str,
    owner: DomId,
    reader: DomId,
) -> Result<(), HandshakeError> {
    if xs.read_opt(base)?.is_some() {
        return Err(HandshakeError::Exists { path: base.into() });
    }
    xs.mkdir(base)?;
    Ok(xs.set_perms(base, &end_perms(owner, reader))?)
}

fn end_perms(owner: DomId, reader: DomId) -> Vec<Perm> {
    let mut perms = Vec::from([Perm::new(owner, Access::None)]);
    if reader != owner {
        perms.push(Perm::new(reader, Access::Read));
    }
    perms
}

/// Lets a backend's domain read the frontend's directory again, and all below it: a domain that
/// takes a dead one's number has none of its rights. Levels beyond what a device uses are left out.
pub(in crate::handshake) fn regrant_frontend_end<X: Xenstore + ?Sized>(
    xs: &mut X,
    addr: DeviceAddr,
) -> Result<(), HandshakeError> {
    const LEVELS: usize = 3;
    let perms = end_perms(addr.front, addr.back);
    let mut level = Vec::from([addr.frontend_path()]);
    for _ in 0..LEVELS {
        let mut below = Vec::new();
        for path in level {
            for child in directory_opt(xs, &path)? {
                below.push(format!("{path}/{child}"));
            }
            match xs.set_perms(&path, &perms) {
                // The frontend's domain is ending just now, and takes its nodes along.
                Err(error) if error.is_not_found() => {}
                result => result?,
            }
        }
        level = below;
    }
    Ok(())
}

/// Makes a backend's directory: see [`create_end`].
pub(in crate::handshake) fn create_backend_end<X: Xenstore + ?Sized>(
    xs: &mut X,
    addr: DeviceAddr,
) -> Result<(), HandshakeError> {
    create_end(xs, &addr.backend_path(), addr.back, addr.front)
}

/// Makes a frontend's directory: see [`create_end`].
pub(in crate::handshake) fn create_frontend_end<X: Xenstore + ?Sized>(
    xs: &mut X,
    addr: DeviceAddr,
) -> Result<(), HandshakeError> {
    create_end(xs, &addr.frontend_path(), addr.front, addr.back)
}

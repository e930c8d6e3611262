//! Creation and removal of domains and devices, for the toolstack.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use pvio_ring::DomId;

use super::addr::directory_opt;
use super::create::{create_dir, grant_frontend_dir};
use super::{
    DeviceAddr, DeviceClass, backend_root, clear_error, frontend_root, read_state, state_path,
    write_state,
};
use crate::handshake::HandshakeError;
use crate::handshake::fields::{Reader, Writer};
use crate::state::XenbusState;
use crate::wire::{Access, Perm};
use crate::xenstore::{Xenstore, XsError, transaction};

/// Creates a domain's home directory with the permissions that libxl uses: the domain may read all
/// of it, and write below `data` and `error`. To be called by dom0 before the domain's first
/// device.
///
/// # Errors
/// An error of xenstore.
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

/// Notifies libxl, which waits for it, that a guest's device model is running. To be called by the
/// device model's domain.
///
/// # Errors
/// An error of xenstore.
pub fn announce_device_model<X: Xenstore + ?Sized>(
    mut xs: &mut X,
    guest: DomId,
) -> Result<(), HandshakeError> {
    // Relative to the domain's own home directory, as libxl does it.
    Writer { xs: &mut xs, base: &format!("device-model/{guest}") }.put("state", "running")
}

/// Removes a domain's home directory, but not the backends of its devices, which are in other ones.
///
/// # Errors
/// An error of xenstore.
pub fn remove_domain<X: Xenstore + ?Sized>(xs: &mut X, domid: DomId) -> Result<(), XsError> {
    xs.rm(&format!("/local/domain/{domid}"))
}

/// Requests the removal of a device: sets the backend offline and to Closing, unless it is Closed
/// already, as libxl does: a backend that has nothing to close does not write Closed again. Once the
/// backend is [`XenbusState::Closed`] or its directory is gone, call [`remove_device`].
///
/// # Errors
/// An error of xenstore.
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
        match read_state(tx, &base)? {
            XenbusState::Closed => Ok(()),
            _ => write_state(tx, &base, XenbusState::Closing),
        }
    })
}

/// Recreates the directories of a domain's backends, which were removed when the domain was
/// destroyed, from libxl's own records of them. To be called by dom0, once the domain runs again
/// with its old number: it then finds every backend Connected, as its frontend still is, and
/// resumes the session. Returns the devices that were recreated; existing directories are not
/// changed.
///
/// # Errors
/// An error of xenstore.
pub fn revive_backends<X: Xenstore + ?Sized>(
    mut xs: &mut X,
    back: DomId,
) -> Result<Vec<DeviceAddr>, HandshakeError> {
    let mut made = Vec::new();
    for guest in directory_opt(xs, "/libxl")? {
        for class in DeviceClass::ALL {
            let devices = format!("/libxl/{guest}/device/{}", class.as_str());
            for index in directory_opt(xs, &devices)? {
                let base = format!("{devices}/{index}");
                let backend = (Reader { xs: &mut xs, base: &base }).text("backend")?;
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

/// Records a device in libxl's directory, so that libxl lists the device and removes it with its
/// guest. Only for kinds of backend that libxl knows. To be called by dom0.
///
/// # Errors
/// An error of xenstore.
pub fn record_for_libxl<X: Xenstore + ?Sized>(
    xs: &mut X,
    addr: DeviceAddr,
) -> Result<(), HandshakeError> {
    let (base, record) = (addr.backend_path(), libxl_path(addr));
    transaction(xs, |tx| {
        Writer { xs: tx, base: &record }.put("backend", &base)?;
        for key in directory_opt(tx, &base)? {
            let value = tx.read_opt(&format!("{base}/{key}"))?.unwrap_or_default();
            tx.write(&format!("{record}/{key}"), &value)?;
        }
        Ok(())
    })
}

fn libxl_path(addr: DeviceAddr) -> String {
    format!("/libxl/{}/device/{}/{}", addr.front, addr.class().as_str(), addr.index)
}

/// Returns a domain's name.
///
/// # Errors
/// An error of xenstore; a missing name is not an error.
pub fn domain_name<X: Xenstore + ?Sized>(
    mut xs: &mut X,
    domain: DomId,
) -> Result<Option<String>, HandshakeError> {
    (Reader { xs: &mut xs, base: &format!("/local/domain/{domain}") }).text("name")
}

/// Lists the domains that have a home directory.
///
/// # Errors
/// An error of xenstore.
pub fn list_domains<X: Xenstore + ?Sized>(xs: &mut X) -> Result<Vec<DomId>, XsError> {
    let mut ids: Vec<DomId> = directory_opt(xs, "/local/domain")?
        .iter()
        .filter_map(|name| name.parse().ok().map(DomId))
        .collect();
    ids.sort_unstable();
    Ok(ids)
}

/// Returns the device of a frontend; `None` if there is none, or if its directory names no valid
/// backend.
///
/// # Errors
/// An error of xenstore.
pub fn find_device<X: Xenstore + ?Sized>(
    mut xs: &mut X,
    class: DeviceClass,
    front: DomId,
    index: u32,
) -> Result<Option<DeviceAddr>, HandshakeError> {
    let base = format!("{}/{index}", frontend_root(class, front));
    let backend = (Reader { xs: &mut xs, base: &base }).text("backend")?;
    let addr = backend
        .and_then(|path| DeviceAddr::from_backend_path(&path, DomId::DOM0).map(|(addr, _)| addr));
    Ok(addr.filter(|a| a.front == front && a.index == index && a.class() == class))
}

fn revive_backend<X: Xenstore + ?Sized>(
    xs: &mut X,
    addr: DeviceAddr,
    record: &str,
) -> Result<bool, HandshakeError> {
    let base = addr.backend_path();
    transaction(xs, |tx| {
        if tx.read_opt(&state_path(&base))?.is_some() {
            return Ok(false);
        }
        create_dir(tx, &base, addr.back, addr.front)?;
        grant_frontend_dir(tx, addr)?;
        for key in directory_opt(tx, record)? {
            if key != "backend" && key != "state" {
                let value = tx.read_opt(&format!("{record}/{key}"))?.unwrap_or_default();
                tx.write(&format!("{base}/{key}"), &value)?;
            }
        }
        Writer { xs: tx, base: &base }.put(REVIVED, 1)?;
        write_state(tx, &base, XenbusState::Connected)?;
        Ok(true)
    })
}

/// Present in a directory made by [`revive_backends`] until its backend has written its keys again.
const REVIVED: &str = "revived";

/// Returns whether a backend's directory was made by [`revive_backends`] and lacks the keys that
/// its backend had written for the frontend.
///
/// # Errors
/// An error of xenstore; the key is not a number.
pub fn is_revived<X: Xenstore + ?Sized>(
    mut xs: &mut X,
    back: &str,
) -> Result<bool, HandshakeError> {
    (Reader { xs: &mut xs, base: back }).flag(REVIVED, false)
}

/// Records that the backend has written its keys again.
///
/// # Errors
/// An error of xenstore.
pub fn clear_revived<X: Xenstore + ?Sized>(xs: &mut X, back: &str) -> Result<(), XsError> {
    xs.rm(&format!("{back}/{REVIVED}"))
}

/// Returns the number of the domain with a name.
///
/// # Errors
/// An error of xenstore; a missing domain is not an error.
pub fn find_domain<X: Xenstore + ?Sized>(
    mut xs: &mut X,
    name: &str,
) -> Result<Option<DomId>, HandshakeError> {
    for domain in directory_opt(xs, "/local/domain")? {
        let base = format!("/local/domain/{domain}");
        if (Reader { xs: &mut xs, base: &base }).text("name")?.as_deref() == Some(name) {
            return Ok(domain.parse().ok().map(DomId));
        }
    }
    Ok(None)
}

/// Removes the directories of both sides of a device and their `error` nodes, and the directory of
/// the frontend's domain among the backends if it is empty afterwards. To be called by dom0.
///
/// # Errors
/// An error of xenstore.
pub fn remove_device<X: Xenstore + ?Sized>(
    xs: &mut X,
    addr: DeviceAddr,
) -> Result<(), HandshakeError> {
    let front = addr.frontend_path();
    transaction(xs, |tx| {
        tx.rm(&front)?;
        clear_error(tx, &front)?;
        tx.rm(&libxl_path(addr))?;
        remove_backend(tx, addr)
    })
}

/// Removes a backend's directory and its `error` node, and the directory of the frontend's domain
/// above it if that is empty afterwards. Without the permission to remove the latter, it is left.
///
/// # Errors
/// An error of xenstore.
pub fn remove_backend<X: Xenstore + ?Sized>(
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
                // Only the toolstack may remove it.
                Err(XsError::Refused { .. }) => {}
                other => other?,
            }
        }
        Ok(())
    })
}

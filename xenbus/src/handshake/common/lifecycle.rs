//! How domains and devices come and go, for the toolstack.

use alloc::format;
use alloc::vec::Vec;

use pvio_ring::DomId;

use super::{DeviceAddr, backend_root, clear_error, state_path, write_state};
use crate::handshake::HandshakeError;
use crate::handshake::fields::Writer;
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
pub(in crate::handshake) fn create_ends<X: Xenstore + ?Sized>(
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
        let mut perms = Vec::from([Perm::new(owner, Access::None)]);
        if reader != owner {
            perms.push(Perm::new(reader, Access::Read));
        }
        xs.set_perms(&base, &perms)?;
    }
    Ok(())
}

//! Creation of a device's directories by the toolstack, for every class of device.

use alloc::format;
use alloc::vec::Vec;

use pvio_ring::DomId;

use super::addr::directory_opt;
use super::{DeviceAddr, write_state};
use crate::handshake::HandshakeError;
use crate::handshake::fields::Writer;
use crate::handshake::record::Record;
use crate::state::XenbusState;
use crate::wire::{Access, Perm};
use crate::xenstore::{Xenstore, transaction};

/// Checks that the keys of a backend name the frontend of its address.
pub(in crate::handshake) fn check_frontend(
    addr: DeviceAddr,
    domain: DomId,
    path: &str,
) -> Result<(), HandshakeError> {
    if domain == addr.front && path == addr.frontend_path() {
        return Ok(());
    }
    Err(HandshakeError::Unwritable("the frontend is not the address's"))
}

/// Creates a frontend's directory with its keys and state [`XenbusState::Initialising`].
pub(in crate::handshake) fn create_frontend_dir<X: Xenstore + ?Sized>(
    xs: &mut X,
    addr: DeviceAddr,
    keys: &impl Record,
) -> Result<(), HandshakeError> {
    transaction(xs, |tx| create_side(tx, &addr.frontend_path(), addr.front, addr.back, keys))
}

/// Creates a backend's directory with its keys and state [`XenbusState::Initialising`]. Its domain
/// may read an existing frontend's directory afterwards.
pub(in crate::handshake) fn create_backend_dir<X: Xenstore + ?Sized>(
    xs: &mut X,
    addr: DeviceAddr,
    keys: &impl Record,
) -> Result<(), HandshakeError> {
    transaction(xs, |tx| {
        create_side(tx, &addr.backend_path(), addr.back, addr.front, keys)?;
        grant_frontend_dir(tx, addr)
    })
}

fn create_side(
    xs: &mut dyn Xenstore,
    base: &str,
    owner: DomId,
    reader: DomId,
    keys: &impl Record,
) -> Result<(), HandshakeError> {
    create_dir(xs, base, owner, reader)?;
    keys.write_keys(&mut Writer { xs, base })?;
    write_state(xs, base, XenbusState::Initialising)
}

/// Creates a side's directory with libxl's permissions: its domain owns it, and the peer may read
/// it.
pub(super) fn create_dir<X: Xenstore + ?Sized>(
    xs: &mut X,
    base: &str,
    owner: DomId,
    reader: DomId,
) -> Result<(), HandshakeError> {
    if xs.read_opt(base)?.is_some() {
        return Err(HandshakeError::Exists { path: base.into() });
    }
    xs.mkdir(base)?;
    Ok(xs.set_perms(base, &dir_perms(owner, reader))?)
}

fn dir_perms(owner: DomId, reader: DomId) -> Vec<Perm> {
    let mut perms = Vec::from([Perm::new(owner, Access::None)]);
    if reader != owner {
        perms.push(Perm::new(reader, Access::Read));
    }
    perms
}

/// Grants a backend's domain read permission for the frontend's directory and everything below: a
/// domain that takes over the number of a destroyed one has none of its permissions. Levels deeper
/// than a device uses are left out.
pub(super) fn grant_frontend_dir<X: Xenstore + ?Sized>(
    xs: &mut X,
    addr: DeviceAddr,
) -> Result<(), HandshakeError> {
    const LEVELS: usize = 3;
    let perms = dir_perms(addr.front, addr.back);
    let mut level = Vec::from([addr.frontend_path()]);
    for _ in 0..LEVELS {
        let mut below = Vec::new();
        for path in level {
            for child in directory_opt(xs, &path)? {
                below.push(format!("{path}/{child}"));
            }
            match xs.set_perms(&path, &perms) {
                // The frontend's domain is being destroyed, and its nodes with it.
                Err(error) if error.is_not_found() => {}
                result => result?,
            }
        }
        level = below;
    }
    Ok(())
}

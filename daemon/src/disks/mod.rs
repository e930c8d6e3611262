//! `pvio attach-disk`, `detach-disk`, `set-disk` and `list`: a toolstack's work on devices, by
//! xenstore alone, on Xen as on a hosted machine.
//!
//! | module | holds |
//! |---|---|
//! | [`args`] | what the commands take |
//! | [`attach`] | making a disk, and taking it away |
//! | [`change`] | what a disk that is served takes over |
//! | [`list`] | devices, their states, what was agreed on |
//! | [`vdev`] | the names of a guest's disks |

pub mod args;
pub mod attach;
pub mod change;
pub mod list;
pub mod vdev;

use crate::failure::Failure;
use args::StoreArgs;
use pvio_grant_table::DomId;
use pvio_xenbus::Xenstore;
use pvio_xenbus::client::{Client, default_path};
use pvio_xenbus::handshake::common::{
    BackendKind, DeviceAddr, DeviceClass, domain_name, find_device, find_domain, list_backends,
    list_domains,
};
use vdev::Vdev;

/// The driver domain of a hosted machine.
pub const HOSTED_DRIVER: DomId = DomId(1);

/// A connection to the xenstore the arguments name.
///
/// # Errors
/// When there is none.
pub fn connect(args: &StoreArgs) -> Result<Client, Failure> {
    let path = match &args.state_dir {
        Some(dir) => dir.join("xenstore.sock"),
        None => default_path(),
    };
    Client::connect(&path).map_err(|e| {
        Failure::input(
            format!("no xenstore at {}: {e}", path.display()),
            "run it in dom0, or name a running machine's folder with --state-dir",
        )
    })
}

/// The domain of that name or number.
///
/// # Errors
/// When there is none.
pub fn domain(xs: &mut Client, name: &str) -> Result<DomId, Failure> {
    let found = match name.parse() {
        Ok(number) => {
            let id = DomId(number);
            domain_name(xs, id).map_err(Failure::of)?.map(|_| id)
        }
        Err(_) => find_domain(xs, name).map_err(Failure::of)?,
    };
    found.ok_or_else(|| {
        Failure::input(format!("there is no domain {name}"), "pvio list shows those with devices")
    })
}

/// The disk of that name that a guest has.
///
/// # Errors
/// When it has none.
pub fn disk_of(xs: &mut Client, guest: DomId, vdev: Vdev) -> Result<DeviceAddr, Failure> {
    let found = find_device(xs, DeviceClass::Vbd, guest, vdev.number());
    found.map_err(Failure::of)?.ok_or_else(|| {
        Failure::input(format!("domain {guest} has no disk {vdev}"), "pvio list shows its disks")
    })
}

/// The disk of that name that a guest has or, if it is gone by now, that was left of it.
///
/// # Errors
/// When there is none.
pub fn disk_left_of(xs: &mut Client, guest: &str, vdev: Vdev) -> Result<DeviceAddr, Failure> {
    let not_there = match domain(xs, guest) {
        Ok(guest) => match disk_of(xs, guest, vdev) {
            Ok(addr) => return Ok(addr),
            Err(failure) => failure,
        },
        Err(failure) => failure,
    };
    let Ok(number) = guest.parse() else { return Err(not_there) };
    for back in list_domains(xs).map_err(Failure::of)? {
        for kind in [BackendKind::PvioVbd, BackendKind::Vbd] {
            let devices = list_backends(xs, kind, back).map_err(Failure::of)?;
            let wanted = |a: &DeviceAddr| a.front == DomId(number) && a.index == vdev.number();
            if let Some(addr) = devices.into_iter().find(wanted) {
                return Ok(addr);
            }
        }
    }
    Err(not_there)
}

/// A backend's words for an operator, without their codes.
fn in_words(text: &str) -> &str {
    let text = text.trim_start_matches(|c: char| c.is_ascii_digit()).trim_start();
    match text.split_once(": ") {
        Some((code, text)) if !code.contains(' ') => text,
        _ => text,
    }
}

/// What a backend told the operator of a device, if it did.
fn error_of<X: Xenstore>(xs: &mut X, addr: DeviceAddr) -> Option<String> {
    let text = pvio_xenbus::handshake::common::read_error(xs, &addr.backend_path()).ok()??;
    Some(in_words(&text).to_owned())
}

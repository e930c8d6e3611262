//! `pvio attach-disk`, `detach-disk`, `set-disk` and `list`: toolstack commands for devices. They
//! only use xenstore, on Xen as on a hosted machine.
//!
//! | module | contents |
//! |---|---|
//! | [`args`] | arguments of the commands |
//! | [`attach`] | attaching and detaching a disk |
//! | [`change`] | settings of a disk that is being served |
//! | [`list`] | devices, their states and negotiated features |
//! | [`vdev`] | names of a guest's disks |

pub mod args;
pub mod attach;
pub mod change;
pub mod list;
pub mod vdev;

use crate::failure::Failure;
use args::StoreArgs;
use pvio_grant_table::DomId;
use pvio_ring::error::Report;
use pvio_xenbus::Xenstore;
use pvio_xenbus::client::{Client, default_path};
use pvio_xenbus::handshake::common::{
    BackendKind, DeviceAddr, DeviceClass, domain_name, find_device, find_domain, list_backends,
    list_domains,
};
use vdev::Vdev;

/// The driver domain of a hosted machine.
pub const HOSTED_DRIVER: DomId = DomId(1);

/// Returns a connection to the xenstore that the arguments select.
///
/// # Errors
/// It cannot be reached.
pub fn connect(args: &StoreArgs) -> Result<Client, Failure> {
    let path = match &args.state_dir {
        Some(dir) => dir.join("xenstore.sock"),
        None => default_path(),
    };
    Client::connect(&path).map_err(|e| {
        Failure::input(
            format!("xenstore cannot be reached at {}: {}", path.display(), Report(&e)),
            "run it in dom0, or name the directory of a running machine with --state-dir",
        )
    })
}

/// Returns the domain of that name or number.
///
/// # Errors
/// There is none.
pub fn domain(xs: &mut Client, name: &str) -> Result<DomId, Failure> {
    let found = match name.parse() {
        Ok(number) => {
            let id = DomId(number);
            domain_name(xs, id).map_err(Failure::of)?.map(|_| id)
        }
        Err(_) => find_domain(xs, name).map_err(Failure::of)?,
    };
    found.ok_or_else(|| {
        let what = format!("the domain {name} does not exist");
        Failure::input(what, "list the domains that have devices with pvio list")
    })
}

/// Returns the address of a guest's disk by its name.
///
/// # Errors
/// The guest has no such disk.
pub fn find_disk(xs: &mut Client, guest: DomId, vdev: Vdev) -> Result<DeviceAddr, Failure> {
    let found = find_device(xs, DeviceClass::Vbd, guest, vdev.number());
    found.map_err(Failure::of)?.ok_or_else(|| {
        let what = format!("domain {guest} has no disk {vdev}");
        Failure::input(what, "list its disks with pvio list")
    })
}

/// Returns the address of a guest's disk by its name or, if the guest is gone, of the backend nodes
/// that remain of it.
///
/// # Errors
/// There is none.
pub fn find_disk_or_leftover(
    xs: &mut Client,
    guest: &str,
    vdev: Vdev,
) -> Result<DeviceAddr, Failure> {
    let not_found = match domain(xs, guest) {
        Ok(guest) => match find_disk(xs, guest, vdev) {
            Ok(addr) => return Ok(addr),
            Err(failure) => failure,
        },
        Err(failure) => failure,
    };
    let Ok(number) = guest.parse() else { return Err(not_found) };
    for back in list_domains(xs).map_err(Failure::of)? {
        for kind in [BackendKind::PvioVbd, BackendKind::Vbd] {
            let devices = list_backends(xs, kind, back).map_err(Failure::of)?;
            let selected = |a: &DeviceAddr| a.front == DomId(number) && a.index == vdev.number();
            if let Some(addr) = devices.into_iter().find(selected) {
                return Ok(addr);
            }
        }
    }
    Err(not_found)
}

/// Returns the message of an `error` node without its reason codes.
fn without_reason_codes(text: &str) -> &str {
    let text = text.trim_start_matches(|c: char| c.is_ascii_digit()).trim_start();
    match text.split_once(": ") {
        Some((code, text)) if !code.contains(' ') => text,
        _ => text,
    }
}

/// Returns the message of a device's `error` node, if the backend wrote one.
fn backend_error<X: Xenstore>(xs: &mut X, addr: DeviceAddr) -> Option<String> {
    let text = pvio_xenbus::handshake::common::read_error(xs, &addr.backend_path()).ok()??;
    Some(without_reason_codes(&text).to_owned())
}

//! Attaching a disk to a running guest, and detaching it.

use super::args::{AttachArgs, DetachArgs, ImageRootArgs};
use super::vdev::Vdev;
use super::{backend_error, connect, domain, find_disk_or_leftover};
use crate::disks::HOSTED_DRIVER;
use crate::failure::{Failure, say};
use pvio_grant_table::DomId;
use pvio_storage::image::EscapedPath;
use pvio_xenbus::client::Client;
use pvio_xenbus::driver::Fault;
use pvio_xenbus::handshake::common::{
    BackendKind, DeviceAddr, DeviceClass, list_frontends, read_state, record_for_libxl,
    remove_device, request_removal, state_path,
};
use pvio_xenbus::handshake::{HandshakeError, vbd};
use pvio_xenbus::{XenbusState, Xenstore};
use std::time::{Duration, Instant};

/// Interval between reads of the backend's state.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// Delay before a closed device's nodes are removed, so that libxl and the guest can see the state.
const REMOVAL_DELAY: Duration = Duration::from_millis(100);

/// Attaches a disk; returns when its backend has opened it.
///
/// # Errors
/// The disk cannot be attached; its nodes are removed again.
pub fn attach(args: &AttachArgs) -> Result<(), Failure> {
    let mut xs = connect(&args.store)?;
    let guest = domain(&mut xs, &args.guest)?;
    let back = match &args.backend {
        Some(name) => domain(&mut xs, name)?,
        None if args.store.state_dir.is_some() => HOSTED_DRIVER,
        None => DomId::DOM0,
    };
    let vdev = match args.vdev {
        Some(vdev) => vdev,
        None => first_free_vdev(&mut xs, guest)?,
    };
    let addr = DeviceAddr::new(args.kind.backend(), back, guest, vdev.number());
    let mut options = args.options.clone().or(args.disk.options.clone());
    let spec = args.disk.spec.clone();
    let is_local = back == DomId::DOM0 || args.store.state_dir.is_some();
    let spec = match spec.path() {
        Some(path) if !is_local && path.is_relative() => {
            return Err(Failure::input(
                format!(
                    "the relative path {} cannot be used: the disk is opened in domain {back}",
                    EscapedPath::new(path)
                ),
                "name its absolute path there",
            ));
        }
        _ => spec.absolute().map_err(Failure::foreign)?,
    };
    if is_local {
        ImageRootArgs::default().add_to(&mut options)?;
    }
    let mut config = vbd::ToolstackBack::new(addr, &spec.to_bytes());
    config.kind = vbd::OWN_KIND.into();
    config.dev = vdev.to_string();
    config.mode = match options.read_only {
        Some(true) => vbd::Mode::ReadOnly,
        _ => vbd::Mode::ReadWrite,
    };
    config.bootable = false;
    config.removable = options.removable.unwrap_or_default();
    config.direct_io_safe = options.direct.unwrap_or_default();
    config.discard_enable = options.discard != Some(false);
    if options.cdrom == Some(true) {
        config.device_type = vbd::DeviceType::Cdrom;
    }
    config.options = Some(options.to_string().into_bytes()).filter(|text| !text.is_empty());
    let front = vbd::ToolstackFront {
        trusted: options.trusted.unwrap_or(true),
        ..vbd::ToolstackFront::new(addr, config.device_type)
    };
    vbd::create_device_with(&mut xs, addr, &front, &config).map_err(|e| match e {
        HandshakeError::Exists { .. } => Failure::input(
            format!("domain {guest} has a disk {vdev} already"),
            "name another with --vdev, or leave --vdev out",
        ),
        other => Failure::of(other),
    })?;
    if addr.kind == BackendKind::Vbd && args.store.state_dir.is_none() {
        record_for_libxl(&mut xs, addr).map_err(Failure::of)?;
    }
    let deadline = Instant::now() + Duration::from_secs(args.wait);
    if let Err(failure) = wait_until_open(&mut xs, addr, deadline) {
        remove_device(&mut xs, addr).map_err(Failure::of)?;
        return Err(failure);
    }
    say!("{vdev}  {}", addr.backend_path());
    Ok(())
}

fn first_free_vdev(xs: &mut Client, guest: DomId) -> Result<Vdev, Failure> {
    let taken = list_frontends(xs, DeviceClass::Vbd, guest).map_err(Failure::of)?;
    let free = (0..taken.len() as u32 + 1).map(Vdev::disk).find(|v| !taken.contains(&v.number()));
    free.ok_or_else(|| Failure::new("the guest cannot have another disk: no number is free", ""))
}

/// Returns the failure that a backend has written to its `error` node.
fn reported(node: &str) -> Failure {
    let (what, remedy) = Fault::parse_node(node);
    Failure::new(what, remedy.unwrap_or_default())
}

/// Waits until a disk's backend has opened it.
fn wait_until_open(xs: &mut Client, addr: DeviceAddr, deadline: Instant) -> Result<(), Failure> {
    loop {
        match read_state(xs, &addr.backend_path()).map_err(Failure::of)? {
            XenbusState::InitWait | XenbusState::Initialised | XenbusState::Connected => {
                // A backend whose image is locked also enters InitWait, and reports that it waits.
                // It does so for a migration, where the other guest is about to end; that is not
                // expected here, so it is an error.
                return backend_error(xs, addr).map_or(Ok(()), |why| Err(reported(&why)));
            }
            XenbusState::Closing | XenbusState::Closed => {
                let why = backend_error(xs, addr);
                return Err(match why {
                    Some(why) => reported(&why),
                    None => Failure::new("the backend closed the disk", ""),
                });
            }
            _ if Instant::now() >= deadline => {
                return Err(Failure::new(
                    format!("no backend in domain {} opened the disk in time", addr.back),
                    format!("check that pvio serve runs there, for {}", addr.kind.as_str()),
                ));
            }
            _ => std::thread::sleep(POLL_INTERVAL),
        }
    }
}

/// Detaches a disk; returns when its nodes are removed.
///
/// # Errors
/// The backend does not close in time; the disk then stays attached.
pub fn detach(args: &DetachArgs) -> Result<(), Failure> {
    let mut xs = connect(&args.store)?;
    let addr = find_disk_or_leftover(&mut xs, &args.guest, args.vdev)?;
    request_removal(&mut xs, addr).map_err(Failure::of)?;
    let deadline = Instant::now() + Duration::from_secs(args.wait);
    let closed = loop {
        // pvio removes the backend's nodes itself in a driver domain.
        let back = state_path(&addr.backend_path());
        let exists = xs.read_opt(&back).map_err(Failure::of)?.is_some();
        let state = read_state(&mut xs, &addr.backend_path()).map_err(Failure::of)?;
        if !exists || state == XenbusState::Closed {
            break true;
        }
        if Instant::now() >= deadline {
            break false;
        }
        std::thread::sleep(POLL_INTERVAL);
    };
    if !closed && !args.force {
        return Err(Failure::new(
            format!("{} of domain {} was not closed within {} s", args.vdev, addr.front, args.wait),
            "end its use in the guest, or detach it with --force: data that the guest has not written \
             is lost then",
        ));
    }
    std::thread::sleep(REMOVAL_DELAY);
    remove_device(&mut xs, addr).map_err(Failure::of)?;
    say!("{}  gone", args.vdev);
    Ok(())
}

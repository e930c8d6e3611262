//! The guest's devices in xenstore.

use super::{DRIVER, GUEST};
use pvio_daemon::nics::NicArgs;
use pvio_storage::image::{Disk, Image, ImageError};
use pvio_xenbus::handshake::HandshakeError;
use pvio_xenbus::handshake::common::{
    BackendKind, DeviceAddr, read_error, read_frontend_state, read_state, write_state,
};
use pvio_xenbus::handshake::vif::Mac;
use pvio_xenbus::handshake::{vbd, vif};
use pvio_xenbus::wire::{Access, Perm};
use pvio_xenbus::{XenbusState, Xenstore, transaction};
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

/// The guest's disk: `xvda`.
pub const DISK: DeviceAddr = DeviceAddr::new(BackendKind::Vbd, DRIVER, GUEST, 51712);
/// The guest's NIC.
pub const NIC: DeviceAddr = DeviceAddr::new(BackendKind::Vif, DRIVER, GUEST, 0);

/// A disk's configuration, as the toolstack has it.
#[derive(Debug, Clone)]
pub struct DiskConfig {
    /// Image and options, with absolute paths.
    pub disk: Disk,
}

impl DiskConfig {
    /// Waits, up to a timeout, until the image is not locked by another process. The kernel closes
    /// the files of an io_uring some time after its process was killed.
    pub fn wait_until_free(&self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        while matches!(Image::open_as(&self.disk), Err(ImageError::Busy(_)))
            && Instant::now() < deadline
        {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// A NIC's configuration, as the toolstack has it.
#[derive(Debug, Clone)]
pub struct NicConfig {
    /// The guest's MAC address.
    pub mac: Mac,
    /// Maximum size of a packet in bytes.
    pub mtu: u32,
    /// The tap's name.
    pub tap: String,
    /// The bridge that the tap is added to.
    pub bridge: Option<String>,
    /// The driver domain's options of NICs.
    pub nic_args: NicArgs,
    /// The host's address on the tap.
    pub host: Option<(Ipv4Addr, u8)>,
}

impl NicConfig {
    /// Waits, up to a timeout, until the tap is removed, which also happens some time after its
    /// process was killed.
    pub fn wait_until_free(&self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        // /proc shows the network namespace of the process, /sys the one in which it was mounted.
        let exists = || {
            let list = std::fs::read_to_string("/proc/net/dev").unwrap_or_default();
            list.lines().any(|line| line.trim_start().split(':').next() == Some(&self.tap))
        };
        while exists() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Returns the message that a backend wrote before it closed a device, if any.
pub fn backend_error<X: Xenstore>(xs: &mut X) -> Option<String> {
    let message =
        |xs: &mut X, addr: DeviceAddr| read_error(xs, &addr.backend_path()).ok().flatten();
    let text = message(xs, DISK).or_else(|| message(xs, NIC))?;
    // The format is "<errno> <code>: <text>"; the codes are for logs.
    let text = text.trim_start_matches(|c: char| c.is_ascii_digit()).trim_start();
    let text = match text.split_once(": ") {
        Some((code, text)) if !code.contains(' ') => text,
        _ => text,
    };
    Some(text.to_owned())
}

/// Returns whether frontend and backend of each device are connected.
pub fn are_connected<X: Xenstore>(xs: &mut X, with_nic: bool) -> bool {
    let mut is = |path: String| read_state(xs, &path) == Ok(XenbusState::Connected);
    let mut both = |addr: DeviceAddr| is(addr.backend_path()) && is(addr.frontend_path());
    both(DISK) && (!with_nic || both(NIC))
}

/// Creates frontend and backend nodes of each device.
///
/// # Errors
/// [`HandshakeError`].
pub fn create<X: Xenstore>(
    xs: &mut X,
    disk: &DiskConfig,
    nic: Option<&NicConfig>,
) -> Result<(), HandshakeError> {
    vbd::create_device(xs, DISK, &disk_config(disk))?;
    nic.map_or(Ok(()), |nic| vif::create_device(xs, NIC, &nic_config(nic)))
}

/// Creates the backend nodes again after the driver domain was destroyed and created with the same
/// number. The frontend nodes stay, since the frontend drivers use them. The new domain lacks the
/// old one's permissions to read them, so they are granted again.
///
/// # Errors
/// [`HandshakeError`].
pub fn create_backends_again<X: Xenstore>(
    xs: &mut X,
    disk: &DiskConfig,
    nic: Option<&NicConfig>,
) -> Result<(), HandshakeError> {
    transaction(xs, |tx| {
        create_backend_nodes(tx, DISK)?;
        disk_config(disk).write(tx, &DISK.backend_path())?;
        if let Some(nic) = nic {
            create_backend_nodes(tx, NIC)?;
            nic_config(nic).write(tx, &NIC.backend_path())?;
        }
        Ok(())
    })
}

/// Waits, up to a timeout, until no frontend is in state Initialised, which it may have entered for
/// the dead backend. The next backend must not connect to rings that were set up for the former
/// one.
pub fn wait_for_frontends<X: Xenstore>(xs: &mut X, with_nic: bool, timeout: Duration) {
    let deadline = Instant::now() + timeout;
    let mut waits = |addr: DeviceAddr| {
        read_frontend_state(xs, &addr.frontend_path()) == Ok(XenbusState::Initialised)
    };
    while (waits(DISK) || (with_nic && waits(NIC))) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn create_backend_nodes<X: Xenstore>(xs: &mut X, addr: DeviceAddr) -> Result<(), HandshakeError> {
    let base = addr.backend_path();
    xs.mkdir(&base)?;
    let perms = [Perm::new(addr.back, Access::None), Perm::new(addr.front, Access::Read)];
    xs.set_perms(&base, &perms)?;
    let mut front = vec![addr.frontend_path()];
    while let Some(path) = front.pop() {
        let perms = [Perm::new(addr.front, Access::None), Perm::new(addr.back, Access::Read)];
        xs.set_perms(&path, &perms)?;
        front.extend(xs.directory(&path)?.iter().map(|name| format!("{path}/{name}")));
    }
    write_state(xs, &base, XenbusState::Initialising)
}

fn disk_config(disk: &DiskConfig) -> vbd::ToolstackBack {
    let mut config = vbd::ToolstackBack::new(DISK, &disk.disk.to_bytes());
    config.kind = vbd::OWN_KIND.into();
    config.dev = "xvda".into();
    let read_only = disk.disk.options.read_only == Some(true);
    config.mode = if read_only { vbd::Mode::ReadOnly } else { vbd::Mode::ReadWrite };
    config
}

fn nic_config(nic: &NicConfig) -> vif::ToolstackBack {
    let mut config = vif::ToolstackBack::new(NIC, nic.mac);
    config.mtu = Some(nic.mtu);
    config.bridge = nic.bridge.clone();
    config.vifname = Some(nic.tap.clone());
    config
}

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

/// A disk as the toolstack knows it.
#[derive(Debug, Clone)]
pub struct DiskConfig {
    /// What it is kept in, with absolute paths, and how it is to be served.
    pub disk: Disk,
}

impl DiskConfig {
    /// Waits, at most so long, until nobody has the image locked against us. The kernel closes the
    /// files of an io_uring some time after its process was killed.
    pub fn until_free(&self, most: Duration) {
        let by = Instant::now() + most;
        while matches!(Image::open_as(&self.disk), Err(ImageError::Busy(_))) && Instant::now() < by
        {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// A NIC as the toolstack knows it.
#[derive(Debug, Clone)]
pub struct NicConfig {
    /// The guest's station address.
    pub mac: Mac,
    /// Bytes of a packet.
    pub mtu: u32,
    /// The tap's name.
    pub tap: String,
    /// The bridge it joins.
    pub bridge: Option<String>,
    /// What is said of it to the driver domain.
    pub words: NicArgs,
    /// The host's address on the tap.
    pub host: Option<(Ipv4Addr, u8)>,
}

impl NicConfig {
    /// Waits, at most so long, until there is no tap of that name, for the same reason.
    pub fn until_free(&self, most: Duration) {
        let by = Instant::now() + most;
        // By /proc, which goes by our network namespace; /sys goes by whose it was when mounted.
        let is_there = || {
            let list = std::fs::read_to_string("/proc/net/dev").unwrap_or_default();
            list.lines().any(|line| line.trim_start().split(':').next() == Some(&self.tap))
        };
        while is_there() && Instant::now() < by {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// What a backend told the operator before it closed a device, if any did.
pub fn backend_error<X: Xenstore>(xs: &mut X) -> Option<String> {
    let told = |xs: &mut X, addr: DeviceAddr| read_error(xs, &addr.backend_path()).ok().flatten();
    let text = told(xs, DISK).or_else(|| told(xs, NIC))?;
    // "<errno> <code>: <text>"; the codes are for logs.
    let text = text.trim_start_matches(|c: char| c.is_ascii_digit()).trim_start();
    let text = match text.split_once(": ") {
        Some((code, text)) if !code.contains(' ') => text,
        _ => text,
    };
    Some(text.to_owned())
}

/// Whether both ends of each device are connected.
pub fn are_connected<X: Xenstore>(xs: &mut X, with_nic: bool) -> bool {
    let mut is = |path: String| read_state(xs, &path) == Ok(XenbusState::Connected);
    let mut both = |addr: DeviceAddr| is(addr.backend_path()) && is(addr.frontend_path());
    both(DISK) && (!with_nic || both(NIC))
}

/// Makes both ends of each device.
///
/// # Errors
/// [`HandshakeError`].
pub fn create<X: Xenstore>(
    xs: &mut X,
    disk: &DiskConfig,
    nic: Option<&NicConfig>,
) -> Result<(), HandshakeError> {
    vbd::create_device(xs, DISK, &disk_words(disk))?;
    nic.map_or(Ok(()), |nic| vif::create_device(xs, NIC, &nic_words(nic)))
}

/// Makes the backends' ends anew, after the domain they were in is gone and another has its
/// number. The frontends' ends are as they were, their drivers being at work on them; but the new
/// domain has none of the old one's rights to read them, so it is given its own.
///
/// # Errors
/// [`HandshakeError`].
pub fn create_backends_again<X: Xenstore>(
    xs: &mut X,
    disk: &DiskConfig,
    nic: Option<&NicConfig>,
) -> Result<(), HandshakeError> {
    transaction(xs, |tx| {
        make_back_end(tx, DISK)?;
        disk_words(disk).write(tx, &DISK.backend_path())?;
        if let Some(nic) = nic {
            make_back_end(tx, NIC)?;
            nic_words(nic).write(tx, &NIC.backend_path())?;
        }
        Ok(())
    })
}

/// Waits, at most so long, until no frontend waits for a backend that is dead: what it set up for
/// that one is of no use to the next, which must not find it.
pub fn until_frontends_know<X: Xenstore>(xs: &mut X, with_nic: bool, most: Duration) {
    let by = Instant::now() + most;
    let mut waits = |addr: DeviceAddr| {
        read_frontend_state(xs, &addr.frontend_path()) == Ok(XenbusState::Initialised)
    };
    while (waits(DISK) || (with_nic && waits(NIC))) && Instant::now() < by {
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn make_back_end<X: Xenstore>(xs: &mut X, addr: DeviceAddr) -> Result<(), HandshakeError> {
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

fn disk_words(disk: &DiskConfig) -> vbd::ToolstackBack {
    let mut words = vbd::ToolstackBack::new(DISK, &disk.disk.to_bytes());
    words.kind = vbd::OWN_KIND.into();
    words.dev = "xvda".into();
    let read_only = disk.disk.options.read_only == Some(true);
    words.mode = if read_only { vbd::Mode::ReadOnly } else { vbd::Mode::ReadWrite };
    words
}

fn nic_words(nic: &NicConfig) -> vif::ToolstackBack {
    let mut words = vif::ToolstackBack::new(NIC, nic.mac);
    words.mtu = Some(nic.mtu);
    words.bridge = nic.bridge.clone();
    words.vifname = Some(nic.tap.clone());
    words
}

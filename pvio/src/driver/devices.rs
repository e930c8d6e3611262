//! All backends of one class in this domain.

use pvio_grant_table::DomId;
use pvio_xenbus::driver::{BackendClass, BackendDriver, Life};
use pvio_xenbus::handshake::common::{
    BackendKind, DeviceAddr, backend_root, list_backends, read_error, read_online, read_state,
};
use pvio_xenbus::{WatchEvent, XenbusState, Xenstore, XsError};
use std::collections::BTreeMap;

/// The backends of one class, as the toolstack makes and removes them.
pub struct Devices<C, M> {
    home: DomId,
    /// Only devices of this domain, if it is given.
    only: Option<DomId>,
    make: M,
    /// Each kind that is served, and its directory, which is also the token of the watch on it.
    roots: Vec<(BackendKind, String)>,
    /// With what it last told the operator.
    devices: BTreeMap<DeviceAddr, (BackendDriver<C>, Option<String>)>,
}

impl<C, M> Devices<C, M>
where
    C: BackendClass,
    M: Fn(DeviceAddr) -> BackendDriver<C>,
{
    /// None yet; `make` is called for each of these kinds that turns up.
    pub fn new(kinds: Vec<BackendKind>, home: DomId, only: Option<DomId>, make: M) -> Self {
        let roots = kinds.into_iter().map(|kind| (kind, backend_root(kind, home))).collect();
        Self { home, only, make, roots, devices: BTreeMap::new() }
    }

    /// Begins to watch for devices.
    pub fn watch(&self, xs: &mut dyn Xenstore) -> Result<(), XsError> {
        self.roots.iter().try_for_each(|(_, root)| xs.watch(root, root))
    }

    /// Does what an event asks for, if it is one of ours.
    pub fn event(&mut self, xs: &mut dyn Xenstore, event: &WatchEvent) -> Result<(), XsError> {
        if let Some((kind, _)) = self.roots.iter().find(|(_, root)| *root == event.token) {
            // Also for changes of our own making below a device: then nothing is new.
            let at_device = DeviceAddr::from_backend_path(&event.path, self.home);
            match at_device {
                Some((addr, _)) if self.devices.contains_key(&addr) => {
                    if let Some((addr, "")) = at_device {
                        self.step(xs, addr)?;
                    }
                }
                _ => self.discover(xs, *kind)?,
            }
        } else if let Some((addr, _)) = DeviceAddr::from_backend_path(&event.token, self.home) {
            self.step(xs, addr)?;
        }
        Ok(())
    }

    /// Steps every device: some worker ended by itself.
    pub fn step_all(&mut self, xs: &mut dyn Xenstore) -> Result<(), XsError> {
        let all: Vec<DeviceAddr> = self.devices.keys().copied().collect();
        all.into_iter().try_for_each(|addr| self.step(xs, addr))
    }

    /// Closes every device.
    pub fn shut_down(&mut self, xs: &mut dyn Xenstore) -> Result<(), XsError> {
        // One after the other, whatever becomes of the one before.
        let all = std::mem::take(&mut self.devices).into_values();
        all.map(|(mut device, _)| device.shut_down(xs)).fold(Ok(()), Result::and)
    }

    fn discover(&mut self, xs: &mut dyn Xenstore, kind: BackendKind) -> Result<(), XsError> {
        for addr in list_backends(xs, kind, self.home)? {
            let ours = self.only.is_none_or(|only| addr.front == only);
            if ours && !self.devices.contains_key(&addr) && !is_over(xs, &addr)? {
                tracing::info!(device = addr.backend_path(), "a new device");
                self.devices.insert(addr, ((self.make)(addr), None));
                self.step(xs, addr)?;
            }
        }
        Ok(())
    }

    fn step(&mut self, xs: &mut dyn Xenstore, addr: DeviceAddr) -> Result<(), XsError> {
        let Some((device, told)) = self.devices.get_mut(&addr) else { return Ok(()) };
        let before = device.state();
        let life = match device.step(xs) {
            // Its frontend's domain is gone, and with it the right to look there.
            Err(XsError::Refused { path, errno, .. }) => {
                tracing::info!(device = device.token(), %path, %errno, "cannot go on");
                Life::Gone
            }
            life => life?,
        };
        let after = device.state();
        if before != after {
            tracing::info!(device = device.token(), from = %before, to = %after, "state");
        }
        // Told once by whoever fails; what is there already was said before.
        let why = read_error(xs, device.token())?;
        if why != *told {
            if let Some(why) = &why {
                tracing::warn!(device = device.token(), "{why}");
            }
            *told = why;
        }
        if life == Life::Gone {
            tracing::info!(device = device.token(), "gone");
            self.devices.remove(&addr);
        }
        Ok(())
    }
}

/// Whether a device has come to its end, and its directory is only waiting to be removed.
fn is_over(xs: &mut dyn Xenstore, addr: &DeviceAddr) -> Result<bool, XsError> {
    let base = addr.backend_path();
    // What is not a number is the device's to complain about.
    let online = read_online(xs, &base).unwrap_or(true);
    Ok(!online && read_state(xs, &base)? == XenbusState::Closed)
}

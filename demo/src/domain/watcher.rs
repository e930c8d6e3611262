//! Watches the states of the guest's devices in xenstore for the live page, and wakes a frontend
//! when its backend returns.

use crate::guest::status::{Device, Devices};
use pvio_daemon::failure::Failure;
use pvio_daemon::stop::sleep;
use pvio_hosted::Domain;
use pvio_runtime::LogLimit;
use pvio_xenbus::client::Client;
use pvio_xenbus::handshake::common::{
    DeviceAddr, DeviceClass, FrontendAddr, read_state, state_path,
};
use pvio_xenbus::handshake::{vbd, vif};
use pvio_xenbus::{XenbusState, Xenstore, XsError};
use std::os::fd::AsFd;
use std::thread;
use std::time::Duration;

/// Returns the display name of a device: `vbd-51712`.
#[must_use]
pub fn name_of(addr: impl Into<FrontendAddr>) -> String {
    let addr = addr.into();
    format!("{}-{}", addr.class.as_str(), addr.index)
}

const TOKEN: &str = "pvio-watcher";

/// Starts watching devices on a new thread, until the process ends.
///
/// # Errors
/// There is no connection to xenstore, or no thread can be created.
pub fn start(
    domain: &Domain,
    addrs: Vec<DeviceAddr>,
    devices: Devices,
    on_change: impl Fn(DeviceAddr) + Send + 'static,
) -> Result<(), Failure> {
    let xs = domain.xenstore().map_err(Failure::of)?;
    let mut watcher = Watcher { xs, addrs, devices, changes: LogLimit::new() };
    let spawned = thread::Builder::new().name("watcher".into()).spawn(move || {
        // Ends only when the hypervisor ends, and that also ends the process.
        if let Err(e) = watcher.run(&on_change) {
            tracing::warn!(error = %e, "device states are no longer watched");
        }
    });
    spawned.map(drop).map_err(|e| Failure::new(format!("a thread cannot start: {e}"), ""))
}

/// Interval at which devices that are not connected are polled.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

fn is_up(device: &Device) -> bool {
    device.state == "Connected" && device.backend_state == "Connected"
}

struct Watcher {
    xs: Client,
    addrs: Vec<DeviceAddr>,
    devices: Devices,
    changes: LogLimit,
}

impl Watcher {
    fn run(&mut self, on_change: &dyn Fn(DeviceAddr)) -> Result<(), XsError> {
        for addr in &self.addrs {
            for end in [addr.frontend_path(), addr.backend_path()] {
                self.xs.watch(&state_path(&end), TOKEN)?;
            }
        }
        loop {
            let mut all_up = true;
            for addr in self.addrs.clone() {
                let device = self.read_device(addr)?;
                let is_up = is_up(&device);
                all_up &= is_up;
                let previous = self.devices.get().into_iter().find(|d| d.name == device.name);
                let is_new = previous.is_none_or(|previous| previous != device);
                if is_new {
                    // Rate-limited, since a backend can cause any number of changes.
                    if let Some(unlogged) = self.changes.admit() {
                        let Device { name, state: front, backend_state: back, .. } = &device;
                        tracing::info!(device = name, front, back, unlogged, "states changed");
                    }
                    self.devices.set(device);
                }
                // The frontend may receive the event later than this thread, so it is woken until
                // it is connected.
                if is_new || !is_up {
                    on_change(addr);
                }
            }
            // Events that arrived during the work above are already read from the socket and would
            // not end a sleep.
            while self.xs.poll_event()?.is_none() {
                let time = (!all_up).then_some(POLL_INTERVAL);
                sleep(&[self.xs.as_fd()], time).map_err(|_| XsError::Closed)?;
                if !all_up {
                    break;
                }
            }
            while self.xs.poll_event()?.is_some() {}
        }
    }

    fn read_device(&mut self, addr: DeviceAddr) -> Result<Device, XsError> {
        let (front, back) = (addr.frontend_path(), addr.backend_path());
        let state = read_state(&mut self.xs, &front)?;
        let backend_state = read_state(&mut self.xs, &back)?;
        let name = name_of(addr);
        let previous = self.devices.get().into_iter().find(|d| d.name == name);
        let up_now = state == XenbusState::Connected && backend_state == XenbusState::Connected;
        let (features, reattached) = match previous {
            Some(previous) if is_up(&previous) || !up_now => {
                (previous.features, previous.reattached)
            }
            previous => (self.features(addr), previous.map_or(0, |d| d.reattached)),
        };
        Ok(Device {
            name,
            kind: if addr.class() == DeviceClass::Vbd { "disk" } else { "nic" },
            state: format!("{state:?}"),
            backend_state: format!("{backend_state:?}"),
            features,
            reattached,
        })
    }

    /// Returns the negotiated features; empty if the keys cannot be read.
    fn features(&mut self, addr: DeviceAddr) -> Vec<(String, String)> {
        match addr.class() {
            DeviceClass::Vbd => self.disk_features(addr).unwrap_or_default(),
            DeviceClass::Vif => self.nic_features(addr).unwrap_or_default(),
        }
    }

    fn disk_features(&mut self, addr: DeviceAddr) -> Option<Vec<(String, String)>> {
        let disk = vbd::BackDisk::read(&mut self.xs, &addr.backend_path()).ok()?;
        let request =
            vbd::FrontRequest::read(&mut self.xs, &addr.frontend_path(), &disk.offer).ok()?;
        let agreed = vbd::Negotiated::new(&disk.offer, &request);
        let yes = |yes: bool| if yes { "yes" } else { "no" }.to_owned();
        let megabytes = disk.sectors as f64 * 512.0 / 1e6;
        Some(vec![
            ("size".into(), format!("{megabytes:.1} MB, sectors of {}", disk.sector_size)),
            ("read-only".into(), yes(disk.info.read_only)),
            (
                "protocol".into(),
                agreed.protocol.map_or("native".into(), |p| format!("{p:?}").to_lowercase()),
            ),
            ("queues × ring pages".into(), format!("{} × {}", agreed.queues, agreed.ring_pages)),
            ("persistent grants".into(), yes(agreed.persistent)),
            ("indirect segments".into(), agreed.max_indirect_segments.to_string()),
            ("flush, barrier".into(), format!("{}, {}", yes(agreed.flush), yes(agreed.barrier))),
            ("discard".into(), yes(agreed.discard.is_some())),
        ])
    }

    fn nic_features(&mut self, addr: DeviceAddr) -> Option<Vec<(String, String)>> {
        let offer = vif::BackOffer::read(&mut self.xs, &addr.backend_path()).ok()?;
        let request = vif::FrontRequest::read(&mut self.xs, &addr.frontend_path(), &offer).ok()?;
        let agreed = vif::Negotiated::new(&offer, &request);
        let yes = |yes: bool| if yes { "yes" } else { "no" }.to_owned();
        let offloads = |o: vif::Offloads| {
            let names = [
                (o.sg, "scatter-gather"),
                (o.csum_v4, "checksum v4"),
                (o.csum_v6, "checksum v6"),
                (o.gso_v4, "TSO v4"),
                (o.gso_v6, "TSO v6"),
            ];
            let on: Vec<&str> = names.iter().filter(|(on, _)| *on).map(|(_, name)| *name).collect();
            if on.is_empty() { "none".to_owned() } else { on.join(", ") }
        };
        Some(vec![
            ("queues".into(), agreed.queues.to_string()),
            ("split event channels".into(), yes(agreed.split_event_channels)),
            ("guest may leave out".into(), offloads(agreed.to_back)),
            ("backend may leave out".into(), offloads(agreed.to_front)),
            ("rx notify".into(), yes(agreed.rx_notify)),
            ("control ring".into(), yes(agreed.ctrl_ring)),
            (
                "multicast".into(),
                if agreed.multicast_control { "groups it names" } else { "all" }.into(),
            ),
        ])
    }
}

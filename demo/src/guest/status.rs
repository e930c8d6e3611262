//! States of the devices for the live page.

use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A device of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Device {
    /// Its name in xenstore: `vbd-51712`, `vif-0`.
    pub name: String,
    /// `disk` or `nic`.
    pub kind: &'static str,
    /// The state of the frontend: `Connected`.
    pub state: String,
    /// The state of the backend.
    pub backend_state: String,
    /// Negotiated features, as names and values.
    pub features: Vec<(String, String)>,
    /// Number of reconnections; set from [`Devices::set_sessions`].
    pub reattached: u32,
}

#[derive(Debug, Default)]
struct DeviceTable {
    devices: Vec<Device>,
    /// Number of sessions, by the device's name.
    sessions: BTreeMap<String, u32>,
}

/// The current states of the devices; written by the threads that use the devices, read by the live
/// page.
#[derive(Debug, Clone, Default)]
pub struct Devices(Arc<Mutex<DeviceTable>>);

impl Devices {
    /// Replaces the device of that name, or adds it.
    pub fn set(&self, device: Device) {
        let devices = &mut self.lock().devices;
        match devices.iter_mut().find(|d| d.name == device.name) {
            Some(known) => *known = device,
            None => devices.push(device),
        }
    }

    /// Removes the device of that name.
    pub fn remove(&self, name: &str) {
        let mut known = self.lock();
        known.devices.retain(|device| device.name != name);
        known.sessions.remove(name);
    }

    /// Sets the number of sessions of the device of that name.
    pub fn set_sessions(&self, name: &str, sessions: u32) {
        self.lock().sessions.insert(name.to_owned(), sessions);
    }

    /// Returns all devices.
    #[must_use]
    pub fn get(&self) -> Vec<Device> {
        let known = self.lock();
        let mut devices = known.devices.clone();
        for device in &mut devices {
            let sessions = known.sessions.get(&device.name).copied();
            device.reattached = sessions.map_or(device.reattached, |n| n.saturating_sub(1));
        }
        devices
    }

    fn lock(&self) -> MutexGuard<'_, DeviceTable> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

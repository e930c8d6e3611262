//! What the live page shows, beside the meters.

use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// One device of the guest.
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
    /// What both ends agreed on, a name and a value each.
    pub features: Vec<(String, String)>,
    /// How often it was attached again; [`Devices::attached`] says so.
    pub reattached: u32,
}

#[derive(Debug, Default)]
struct Known {
    devices: Vec<Device>,
    /// By name.
    sessions: BTreeMap<String, u32>,
}

/// The devices as they are now; written by those who run them, read by the page.
#[derive(Debug, Clone, Default)]
pub struct Devices(Arc<Mutex<Known>>);

impl Devices {
    /// Replaces the device of that name, or adds it.
    pub fn set(&self, device: Device) {
        let devices = &mut self.lock().devices;
        match devices.iter_mut().find(|d| d.name == device.name) {
            Some(known) => *known = device,
            None => devices.push(device),
        }
    }

    /// Forgets the device of that name.
    pub fn remove(&self, name: &str) {
        let mut known = self.lock();
        known.devices.retain(|device| device.name != name);
        known.sessions.remove(name);
    }

    /// The device of that name has been attached that often.
    pub fn attached(&self, name: &str, sessions: u32) {
        self.lock().sessions.insert(name.to_owned(), sessions);
    }

    /// All of them.
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

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

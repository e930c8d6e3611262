//! What the live page shows, beside the meters.

use serde::Serialize;
use std::sync::{Arc, Mutex, PoisonError};

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
    /// How often it was attached again.
    pub reattached: u32,
}

/// The devices as they are now; written by those who run them, read by the page.
#[derive(Debug, Clone, Default)]
pub struct Devices(Arc<Mutex<Vec<Device>>>);

impl Devices {
    /// Replaces the device of that name, or adds it.
    pub fn set(&self, device: Device) {
        let mut devices = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match devices.iter_mut().find(|d| d.name == device.name) {
            Some(known) => *known = device,
            None => devices.push(device),
        }
    }

    /// All of them.
    #[must_use]
    pub fn get(&self) -> Vec<Device> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

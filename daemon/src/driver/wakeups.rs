//! Devices that have to be stepped because a worker requested it.

use crate::stop::Wakeup;
use pvio_xenbus::handshake::common::DeviceAddr;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

/// A set of device addresses: any thread adds to it, and the thread that steps the devices takes
/// them.
#[derive(Debug, Clone)]
pub struct WokenDevices {
    wakeup: Wakeup,
    all: Arc<Mutex<BTreeSet<DeviceAddr>>>,
}

impl WokenDevices {
    /// Returns an empty set; `wakeup` is signaled at each addition.
    pub fn new(wakeup: &Wakeup) -> Self {
        Self { wakeup: wakeup.clone(), all: Arc::default() }
    }

    /// Returns a function that wakes a device, from any thread.
    pub fn of(&self, addr: DeviceAddr) -> Arc<dyn Fn() + Send + Sync> {
        let woken = self.clone();
        Arc::new(move || {
            woken.all.lock().unwrap_or_else(PoisonError::into_inner).insert(addr);
            woken.wakeup.wake();
        })
    }

    /// Takes the devices that were added since the last call.
    pub fn take(&self) -> BTreeSet<DeviceAddr> {
        std::mem::take(&mut self.all.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

//! Devices that their workers want stepped.

use crate::stop::Bell;
use pvio_xenbus::handshake::common::DeviceAddr;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

/// Any thread names devices here; the one that steps them takes the names.
#[derive(Debug, Clone)]
pub struct Woken {
    bell: Bell,
    all: Arc<Mutex<BTreeSet<DeviceAddr>>>,
}

impl Woken {
    /// None yet; the bell is rung with each.
    pub fn new(bell: &Bell) -> Self {
        Self { bell: bell.clone(), all: Arc::default() }
    }

    /// What wakes a device, from any thread.
    pub fn of(&self, addr: DeviceAddr) -> Arc<dyn Fn() + Send + Sync> {
        let woken = self.clone();
        Arc::new(move || {
            woken.all.lock().unwrap_or_else(PoisonError::into_inner).insert(addr);
            woken.bell.ring();
        })
    }

    /// Those that were named since this was last asked.
    pub fn take(&self) -> BTreeSet<DeviceAddr> {
        std::mem::take(&mut self.all.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

//! The devices that a driver domain serves, as other threads may inspect them.

use crate::budget::Budget;
use crate::descriptors::{Descriptors, open_now};
use crate::disks::vdev::Vdev;
use crate::driver::disk::DiskServer;
use crate::driver::nic::IsolatedNicServer;
use crate::process::nic::CapturePoint;
use crate::process::status::ServedBy;
use crate::upgrade::progress::Upgrade;
use pvio_blkback::Vbd;
use pvio_event_channel::DevicePlatform;
use pvio_grant_table::policy::MappingBudget;
use pvio_netback::Vif;
use pvio_ports::settings::RuntimeSettings;
use pvio_recordfile::CounterFile;
use pvio_ring::proto::netif::CtrlStatus;
use pvio_runtime::LogLimit;
use pvio_storage::MappingBudgets;
use pvio_storage::engine::offload::BudgetUsage;
use pvio_storage::host::{DISK_BUDGETS, DISK_EVENTS};
use pvio_xenbus::handshake::common::{DeviceAddr, DeviceClass};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

/// All devices; each is included from its first step until it is removed.
#[derive(Debug, Clone, Default)]
pub struct Served {
    devices: Arc<Mutex<BTreeMap<DeviceAddr, DeviceStatus>>>,
    /// Budgets of the process.
    shared: Arc<OnceLock<(Descriptors, MappingBudgets)>>,
    /// The upgrade that the process is part of.
    upgrade: Arc<OnceLock<Upgrade>>,
}

/// The settings, budgets and counters of a device.
#[derive(Debug, Clone, Default)]
pub struct DeviceStatus {
    nic: Option<SettingsLocation>,
    mappings: Option<Arc<MappingBudget>>,
    load: Option<Arc<BudgetUsage>>,
    /// The counters of a disk in another process.
    remote: Option<CounterFile>,
    /// Number of file descriptors reserved for it, and the budget of its steps.
    descriptors: u64,
    steps: Option<Budget>,
    queues: Vec<Counters>,
    /// Rate-limited log events.
    events: Events,
    served_by: ServedBy,
}

/// Where the settings and the capture point of a NIC are.
#[derive(Debug, Clone)]
pub enum SettingsLocation {
    /// In this process.
    Local(Arc<RuntimeSettings>),
    /// In the process of the NIC. A capture is sent to it.
    Remote(CapturePoint),
}

/// Counts of the rate-limited log events of a device, by name.
pub type Events = Vec<(&'static str, Arc<LogLimit>)>;

/// The counters of one queue.
#[derive(Debug, Clone)]
enum Counters {
    Disk(Arc<pvio_blkback::Stats>),
    Nic(Arc<pvio_netback::Stats>),
    /// A queue of a disk in another process.
    RemoteDisk(CounterFile, usize),
    /// A queue of a NIC in another process.
    RemoteNic(CounterFile, usize),
}

/// A backend whose settings, budgets and counters can be inspected.
pub trait ReportStatus {
    /// Returns the current state; a later call may return more queues.
    fn status(&self) -> DeviceStatus;
}

impl<P> ReportStatus for Vbd<DiskServer<P>>
where
    P: DevicePlatform<Channel: AsFd> + Send + Sync + 'static,
    P::Description: Serialize + DeserializeOwned,
{
    fn status(&self) -> DeviceStatus {
        let mut status = DeviceStatus { events: self.events().into(), ..DeviceStatus::default() };
        let server = self.server();
        status.served_by = ServedBy::Threads(server.reason());
        if let Some(remote) = server.remote() {
            status.events.extend(remote.events());
            status.served_by = ServedBy::Process(remote.process().clone());
            status.remote = remote.counters().cloned();
            let queues =
                status.remote.iter().flat_map(|c| (0..c.queues() - 1).map(move |n| (c, n)));
            let queues = queues.map(|(file, queue)| Counters::RemoteDisk(file.clone(), queue));
            status.queues = queues.collect();
        }
        if let Some(thread) = server.thread() {
            status.events.extend(thread.events());
            status.mappings = thread.mapping_budget().cloned();
            status.load = thread.load().cloned();
            let queues = self.stats().iter();
            status.queues = queues.map(|stats| Counters::Disk(Arc::clone(stats))).collect();
        }
        status
    }
}

impl<P> ReportStatus for Vif<IsolatedNicServer<P>>
where
    P: DevicePlatform<Channel: AsFd> + Send + Sync + 'static,
    P::Description: Serialize + DeserializeOwned,
{
    fn status(&self) -> DeviceStatus {
        let mut status = DeviceStatus::default();
        let server = self.server();
        if let Some(remote) = server.remote() {
            status.nic = Some(SettingsLocation::Remote(remote.capture().clone()));
            status.served_by = ServedBy::Process(remote.process().clone());
            status.events = remote.events();
            status.queues = remote_queues(remote.counters(), Counters::RemoteNic);
        }
        if let Some(thread) = server.thread() {
            status.nic = Some(SettingsLocation::Local(Arc::clone(thread.settings())));
            status.served_by = ServedBy::Threads(server.reason());
            status.events = thread.events();
            let queues = self.stats().iter();
            status.queues = queues.map(|stats| Counters::Nic(Arc::clone(stats))).collect();
        }
        status
    }
}

/// Returns the counters of each queue in another process.
fn remote_queues(
    counters: Option<&CounterFile>,
    of: fn(CounterFile, usize) -> Counters,
) -> Vec<Counters> {
    let each = |file: &CounterFile| (0..file.queues()).map(|n| of(file.clone(), n)).collect();
    counters.map(each).unwrap_or_default()
}

impl DeviceStatus {
    /// Adds events.
    #[must_use]
    pub fn with(mut self, events: &Events) -> Self {
        self.events.extend(events.iter().cloned());
        self
    }

    /// Adds the number of file descriptors reserved for the device, and the budget of its steps.
    #[must_use]
    pub fn budgeted(self, descriptors: u64, steps: Budget) -> Self {
        Self { descriptors, steps: Some(steps), ..self }
    }
}

impl Served {
    /// Sets the budgets that all devices of the process share.
    pub fn set_budgets(&self, descriptors: &Descriptors, mappings: &MappingBudgets) {
        // Already set only by a second driver domain in the same process, which does not occur.
        let _ = self.shared.set((descriptors.clone(), mappings.clone()));
    }

    /// Returns usage and limit of each budget of the process.
    #[must_use]
    pub fn process(&self) -> Map<String, Value> {
        let mut all = Vec::new();
        if let Some((descriptors, mappings)) = self.shared.get() {
            let (reserved, most) = descriptors.reserved();
            let kept = mappings.process();
            all.push(("kept-pages", kept.used() as u64, kept.most() as u64));
            all.push(("promised-file-descriptors", reserved, most));
        }
        let (open, most) = open_now();
        all.push(("file-descriptors", open, most));
        budgets(all)
    }

    /// Sets the upgrade that the process is part of.
    pub fn set_upgrade(&self, upgrade: &Upgrade) {
        let _ = self.upgrade.set(upgrade.clone());
    }

    /// Returns the upgrade that the process is part of, if its devices outlive it.
    #[must_use]
    pub fn upgrade(&self) -> Option<&Upgrade> {
        self.upgrade.get()
    }

    /// Adds or replaces a device.
    pub fn insert(&self, addr: DeviceAddr, seen: DeviceStatus) {
        self.lock().insert(addr, seen);
    }

    /// Removes a device.
    pub fn remove(&self, addr: DeviceAddr) {
        self.lock().remove(&addr);
    }

    /// Returns the names of the NICs.
    #[must_use]
    pub fn nics(&self) -> Vec<String> {
        let all = self.lock();
        all.iter()
            .filter(|(_, seen)| seen.nic.is_some())
            .map(|(addr, _)| device_name(*addr))
            .collect()
    }

    /// Returns the settings and the capture point of the NIC of that name.
    #[must_use]
    pub fn nic(&self, name: &str) -> Option<SettingsLocation> {
        self.lock().iter().find(|(addr, _)| device_name(**addr) == name)?.1.nic.clone()
    }

    /// Returns the counters of every device, ordered by address.
    #[must_use]
    pub fn counters(&self) -> Vec<Value> {
        let to_json = |(addr, seen): (&DeviceAddr, &DeviceStatus)| {
            let mut device = json!({
                "device": device_name(*addr),
                "path": addr.backend_path(),
                "events": seen.event_counts(),
                "queues": seen.queues.iter().map(|queue| queue.local().to_json()).collect::<Vec<_>>(),
            });
            device["budgets"] = Value::Object(self.budgets_of(seen));
            device
        };
        self.lock().iter().map(to_json).collect()
    }

    /// Returns the confinement of each device's process, ordered by address.
    #[must_use]
    pub fn confinement(&self) -> Vec<Value> {
        // Files of `/proc` are read without the lock.
        let all: Vec<(DeviceAddr, ServedBy)> =
            self.lock().iter().map(|(addr, seen)| (*addr, seen.served_by.clone())).collect();
        let to_json = |(addr, served_by): (DeviceAddr, ServedBy)| {
            let mut device = served_by.confinement();
            device["device"] = device_name(addr).into();
            device["path"] = addr.backend_path().into();
            device
        };
        all.into_iter().map(to_json).collect()
    }

    /// Returns usage and limit of each budget of a device, except those of its queues.
    fn budgets_of(&self, seen: &DeviceStatus) -> Map<String, Value> {
        let mut all = Vec::new();
        if let Some(guest) = &seen.mappings {
            all.push(("kept-pages of the guest", guest.used() as u64, guest.most() as u64));
        }
        all.extend(seen.load.iter().flat_map(|load| load.budgets()));
        if seen.remote.is_some() {
            let words = seen.remote_words();
            let budgets = DISK_BUDGETS.iter().zip(words.chunks_exact(2));
            all.extend(budgets.map(|(name, pair)| (*name, pair[0], pair[1])));
        }
        if let Some((descriptors, _)) = self.shared.get() {
            all.push(("promised-file-descriptors", seen.descriptors, descriptors.reserved().1));
        }
        if let Some(steps) = &seen.steps {
            let (spent, most) = steps.spent(Instant::now());
            all.push(("steps", spent, most));
        }
        budgets(all)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<DeviceAddr, DeviceStatus>> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DeviceStatus {
    /// Returns the budgets and events that the process of a disk has published.
    fn remote_words(&self) -> Vec<u64> {
        let words = self.remote.iter().flat_map(|file| file.words(file.queues().saturating_sub(1)));
        words.collect()
    }

    /// Returns the number of events by name: those that were counted here, and those of the process
    /// that have happened.
    fn event_counts(&self) -> BTreeMap<&'static str, u64> {
        let mut counts: BTreeMap<_, _> =
            self.events.iter().map(|(name, log)| (*name, log.seen())).collect();
        let remote = self.remote_words().into_iter().skip(2 * DISK_BUDGETS.len());
        for (name, count) in DISK_EVENTS.into_iter().zip(remote).filter(|(_, count)| *count > 0) {
            let sum: &mut u64 = counts.entry(name).or_default();
            *sum = sum.saturating_add(count);
        }
        counts
    }
}

impl Counters {
    /// Returns the counters of a queue in another process, as that has published them.
    fn local(&self) -> Self {
        match self {
            Self::RemoteDisk(file, queue) => {
                let stats = pvio_blkback::Stats::default();
                stats.set_words(file.words(*queue));
                Self::Disk(Arc::new(stats))
            }
            Self::RemoteNic(file, queue) => {
                let stats = pvio_netback::Stats::default();
                stats.set_words(file.words(*queue));
                Self::Nic(Arc::new(stats))
            }
            other => other.clone(),
        }
    }

    fn to_json(&self) -> Value {
        let mut all = Map::new();
        let mut tell =
            |group: Option<&str>, counters: &mut dyn Iterator<Item = (&'static str, u64)>| {
                let counters = counters.map(|(name, n)| (name.to_owned(), Value::from(n)));
                match group {
                    None => all.extend(counters),
                    Some(group) => {
                        drop(all.insert(group.into(), Value::Object(counters.collect())))
                    }
                }
            };
        match self {
            Self::RemoteDisk(..) | Self::RemoteNic(..) => {}
            Self::Disk(stats) => {
                tell(None, &mut stats.named());
                tell(Some("refused"), &mut stats.refused().map(|(why, n)| (why.code(), n)));
            }
            Self::Nic(stats) => {
                tell(None, &mut stats.named());
                let answers = [
                    ("success", CtrlStatus::Success),
                    ("not-supported", CtrlStatus::NotSupported),
                    ("invalid-parameter", CtrlStatus::InvalidParameter),
                    ("buffer-overflow", CtrlStatus::BufferOverflow),
                ];
                let answers = answers.map(|(name, status)| (name, stats.controls(status)));
                tell(Some("control"), &mut answers.into_iter());
                tell(Some("dropped"), &mut stats.drops());
                tell(Some("ended"), &mut stats.ends());
            }
        }
        let bounded = match self {
            Self::RemoteDisk(..) | Self::RemoteNic(..) => Map::new(),
            Self::Disk(stats) => budgets(stats.budgets()),
            Self::Nic(stats) => budgets(stats.budgets()),
        };
        all.insert("budgets".into(), Value::Object(bounded));
        Value::Object(all)
    }
}

/// Formats usage and limit of each budget.
pub fn budgets(all: impl IntoIterator<Item = (&'static str, u64, u64)>) -> Map<String, Value> {
    let to_json = |(name, used, limit): (&str, u64, u64)| {
        (name.to_owned(), json!({ "used": used, "limit": limit }))
    };
    all.into_iter().map(to_json).collect()
}

/// Returns the name of a device: of a NIC the default name of the backend's interface in Linux,
/// whatever the tap's name is (`vif7.0`), of a disk likewise, with its name in the guest
/// (`vbd7.xvda`).
fn device_name(addr: DeviceAddr) -> String {
    match addr.class() {
        DeviceClass::Vif => format!("vif{}.{}", addr.front, addr.index),
        DeviceClass::Vbd => format!("vbd{}.{}", addr.front, Vdev::from_number(addr.index)),
    }
}

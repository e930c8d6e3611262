//! The driver domain: serves every disk and network interface that the toolstack creates for it.
//!
//! One thread watches xenstore and steps the devices; each device's queue has its own thread. The
//! main thread sleeps until there is an event of xenstore, a worker or a signal, and does not block
//! on a device: opening an image or a port, starting and stopping queues, and closing are done by
//! other threads, which wake it. The work that one guest can cause is bounded: a device is stepped
//! at most once per iteration, a step makes a bounded number of transitions, and each device has a
//! budget of them per second.

mod devices;
pub mod disk;
mod link;
pub mod nic;
#[cfg(test)]
mod tests;
mod wakeups;

use crate::descriptors::Descriptors;
use crate::failure::Failure;
use crate::process::disk::{DiskConfig, RemoteDisk};
use crate::process::hub::Hub;
use crate::process::nic::RemoteNic;
use crate::process::supervised::Environment;
use crate::served::Served;
use crate::stop::{Stop, Wakeup, sleep};
use crate::upgrade::progress::Upgrade;
use devices::Devices;
use disk::DiskServer;
pub use link::XenstoreLink;
use nic::IsolatedNicServer;
use pvio_blkback::{Config, Vbd};
use pvio_event_channel::DevicePlatform;
use pvio_grant_table::DomId;
use pvio_netback::Vif;
use pvio_ports::host::{NicConfig, NicServer, NicSettings};
use pvio_recordfile::RecordDir;
use pvio_storage::MappingBudgets;
use pvio_storage::host::{Groups, ImageServer};
use pvio_storage::image::DiskOptions;
use pvio_xenbus::driver::{BackendClass, BackendDriver, HotplugMode};
use pvio_xenbus::handshake::common::{BackendKind, DeviceAddr, DeviceClass};
use pvio_xenbus::{XenbusState, Xenstore, XsError};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use wakeups::WokenDevices;

/// Maximum number of xenstore events that are handled in one iteration. A guest can cause any number.
const MAX_EVENTS: usize = 256;

/// How long all devices together may take to close when the process is stopped: somewhat longer
/// than a queue may take to complete requests in flight.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(40);

/// Configuration of the driver domain, beyond what the toolstack writes for each device.
#[derive(Debug, Clone)]
pub struct Options {
    /// The host's address on each NIC's tap, and its prefix length.
    pub host: Option<(Ipv4Addr, u8)>,
    /// The kinds of backend to serve.
    pub kinds: Vec<BackendKind>,
    /// Serve only this domain's devices.
    pub only: Option<DomId>,
    /// Whether hotplug scripts of the toolstack or this daemon set up the devices.
    pub hotplug_mode: HotplugMode,
    /// Resume the sessions of an earlier process, without a reconnection of the frontends.
    pub resume: bool,
    /// On stop, leave the sessions open for the next process.
    pub leave: bool,
    /// Where in-flight records are stored for the next process; without them, sessions cannot be
    /// resumed.
    pub records: Option<RecordDir>,
    /// Default configuration of disks.
    pub disks: Config,
    /// Default options of disks; a disk's own options take precedence.
    pub disk_options: DiskOptions,
    /// Budgets of cached mappings of guest pages.
    pub mappings: MappingBudgets,
    /// How NICs access guest pages.
    pub nic_policy: pvio_netback::queue::Policy,
    /// Maximum number of queues of a NIC; the number of processors, up to eight, if `None`.
    pub nic_queues: Option<u32>,
    /// Settings that all NICs share.
    pub nic_settings: Arc<NicSettings>,
    /// Where devices are served.
    pub isolation: Isolation,
}

/// Where devices are served.
#[derive(Debug, Clone, Default)]
pub enum Isolation {
    /// In this process, by threads.
    #[default]
    Thread,
    /// Each in a process of its own, without rights beyond its descriptors.
    Process(Environment),
}

impl Isolation {
    /// Returns the events of the device processes.
    fn hub(&self) -> Option<&Hub> {
        match self {
            Self::Thread => None,
            Self::Process(environment) => Some(&environment.hub),
        }
    }

    /// Returns the upgrade that the supervisor is part of.
    fn upgrade(&self) -> Option<&Upgrade> {
        match self {
            Self::Thread => None,
            Self::Process(environment) => Some(&environment.upgrade),
        }
    }

    /// Stops device processes of an earlier supervisor whose devices do not exist any more.
    fn stop_unclaimed(&self) {
        if let Self::Process(environment) = self {
            environment.found.stop_unclaimed();
        }
    }

    /// Wakes the devices whose processes have sent something or ended.
    fn dispatch(&self) {
        if let Some(Err(error)) = self.hub().map(Hub::dispatch) {
            tracing::error!(%error, "the events of device processes cannot be read");
        }
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            host: None,
            kinds: vec![BackendKind::Vbd, BackendKind::Vif],
            only: None,
            hotplug_mode: HotplugMode::Plain,
            resume: false,
            leave: false,
            records: None,
            disks: Config::for_this_machine(),
            disk_options: DiskOptions::default(),
            mappings: MappingBudgets::default(),
            nic_policy: pvio_netback::queue::Policy::default(),
            nic_queues: None,
            nic_settings: Arc::default(),
            isolation: Isolation::default(),
        }
    }
}

/// Opens the directory for in-flight records; creates it if it does not exist.
///
/// # Errors
/// It cannot be created, or other users have access to it.
pub fn records(path: &Path) -> Result<RecordDir, Failure> {
    let dir = RecordDir::open(path)
        .map_err(|e| Failure::of(e).context("in-flight records cannot be used").as_input())?;
    dir.sweep().map_err(|e| {
        let what = format!("in-flight records in {} cannot be used: {e}", path.display());
        Failure::input(what, "name another directory")
    })?;
    Ok(dir)
}

/// Runs the driver domain until it is stopped, then closes every device, or leaves them to another
/// binary if an upgrade was requested. `ready` is called once the watches for new devices are
/// registered. While the connection to xenstore is lost and can be made again, sessions continue.
///
/// # Errors
/// The connection to xenstore is lost, and cannot be made again, or is lost while devices are closed.
pub fn run<P>(
    (platform, id): (&P, DomId),
    xs: &mut XenstoreLink<'_>,
    options: &Options,
    served: &Served,
    (stop, wakeup): (&Stop, &Wakeup),
    ready: impl FnOnce(),
) -> Result<(), XsError>
where
    P: DevicePlatform<Channel: AsFd> + Send + Sync + 'static,
    P::Description: Serialize + DeserializeOwned,
{
    let hotplug = options.hotplug_mode;
    let of_class = |class| options.kinds.iter().copied().filter(move |k| k.class() == class);
    let woken = WokenDevices::new(wakeup);
    let (shared, wakes) = (platform.clone(), woken.clone());
    let (disks, chosen) = (of_class(DeviceClass::Vbd).collect(), options.clone());
    let groups = Groups::default();
    let descriptors = Descriptors::default();
    served.set_budgets(&descriptors, &options.mappings);
    let mut disks = Devices::new(disks, id, options.only, move |addr, state| {
        let usual = chosen.disk_options.clone();
        let server = ImageServer::with(shared.clone(), usual, groups.clone(), wakes.of(addr));
        let server = server.within(chosen.mappings.clone());
        let server = match &chosen.records {
            Some(records) => server.recorded_in(records.clone()),
            None => server,
        };
        let process = match &chosen.isolation {
            Isolation::Thread => None,
            Isolation::Process(environment) => {
                let config = DiskConfig {
                    addr,
                    usual: chosen.disk_options.clone(),
                    cached_mappings: chosen.mappings.most_of_guest(),
                    environment: environment.clone(),
                };
                Some(RemoteDisk::new(shared.clone(), config, wakes.of(addr)))
            }
        };
        let server = DiskServer::new(server, process, chosen.disk_options.clone());
        new_driver(&chosen, addr, state, Vbd::with(server, chosen.disks))
    })
    .removing_nodes(hotplug == HotplugMode::DriverDomain)
    .published_in(served)
    .with_descriptors(&descriptors, disk_descriptors(options.disks.max_queues))
    .with_polling();
    let (shared, wakes) = (platform.clone(), woken.clone());
    let (nics, chosen) = (of_class(DeviceClass::Vif).collect(), options.clone());
    let mut nics = Devices::new(nics, id, options.only, move |addr, state| {
        let config = NicConfig {
            address: chosen.host,
            policy: chosen.nic_policy,
            max_queues: chosen.nic_queues,
            ..NicConfig::default()
        };
        let process = match &chosen.isolation {
            Isolation::Thread => None,
            Isolation::Process(environment) => Some(RemoteNic::new(
                shared.clone(),
                addr,
                (config.clone(), Arc::clone(&chosen.nic_settings)),
                environment.clone(),
                wakes.of(addr),
            )),
        };
        let server = NicServer::new(shared.clone(), config, wakes.of(addr));
        let server = server.within(Arc::clone(&chosen.nic_settings));
        let server = match &chosen.records {
            Some(records) => server.recorded_in(records.clone()),
            None => server,
        };
        new_driver(&chosen, addr, state, Vif::new(IsolatedNicServer::new(server, process)))
    })
    .removing_nodes(hotplug == HotplugMode::DriverDomain)
    .published_in(served)
    .with_descriptors(&descriptors, nic_descriptors(options.nic_queues.unwrap_or(NIC_QUEUES)))
    .with_polling();
    disks.watch(xs)?;
    nics.watch(xs)?;
    tracing::info!(domain = id.0, kinds = ?options.kinds, within = ?hotplug, "the driver domain is serving");
    let upgrade = options.isolation.upgrade();
    if let Some(upgrade) = upgrade {
        upgrade.begin(wakeup);
        served.set_upgrade(upgrade);
    }
    ready();
    while !stop.is_requested() && upgrade.is_none_or(|upgrade| upgrade.request().is_none()) {
        if xs.is_lost() && xs.reconnect() {
            disks.reconnected();
            nics.reconnected();
        }
        let mut iterate = || -> Result<Progress, XsError> {
            if xs.is_lost() {
                return Err(XsError::Closed);
            }
            disks.remove_closed(xs)?;
            nics.remove_closed(xs)?;
            disks.check_for_changes(xs)?;
            nics.check_for_changes(xs)?;
            options.isolation.stop_unclaimed();
            let mut events = 0;
            while events < MAX_EVENTS
                && let Some(event) = xs.poll_event()?
            {
                disks.event(&event);
                nics.event(&event);
                events += 1;
            }
            options.isolation.dispatch();
            for addr in woken.take() {
                disks.wake(addr);
                nics.wake(addr);
            }
            let worked = [disks.step_pending(xs)?, nics.step_pending(xs)?].contains(&true);
            if events > 0 || worked {
                // Requests to xenstore also read events, so there may be more.
                return Ok(Progress::Worked);
            }
            let removals = disks.next_removal().into_iter().chain(nics.next_removal()).min();
            let checks = disks.next_check().into_iter().chain(nics.next_check());
            let steps = disks.next_step().into_iter().chain(nics.next_step());
            Ok(Progress::Idle(removals.into_iter().chain(checks).chain(steps).min()))
        };
        let time = match iterate() {
            Ok(Progress::Worked) => continue,
            Ok(Progress::Idle(next)) => {
                next.map(|when| when.saturating_duration_since(Instant::now()))
            }
            Err(_) if xs.is_lost() => {
                // A process that ends is replaced in the meantime.
                options.isolation.dispatch();
                for addr in woken.take() {
                    disks.wake(addr);
                    nics.wake(addr);
                }
                let _ = (disks.step_pending(xs), nics.step_pending(xs));
                xs.wait()
            }
            Err(error) => return Err(error),
        };
        // The wait fails only for lack of memory. Continuing would be a busy loop.
        let hub = options.isolation.hub().map(Hub::as_fd);
        let connection = (!xs.is_lost()).then(|| xs.as_fd());
        let events: Vec<_> = [wakeup.as_fd()].into_iter().chain(hub).chain(connection).collect();
        sleep(&events, time).map_err(|_| XsError::Closed)?;
        wakeup.take();
    }
    let leave = options.leave || upgrade.is_some_and(Upgrade::leaves_devices);
    if leave {
        tracing::info!("leaving all devices to the next process");
    } else {
        tracing::info!("closing all devices");
    }
    let by = Instant::now() + SHUTDOWN_TIMEOUT;
    loop {
        let over = if leave {
            [disks.leave(), nics.leave()]
        } else {
            let (disks, nics) = (disks.shut_down(xs), nics.shut_down(xs));
            [disks?, nics?]
        };
        if over.iter().all(|over| over.is_ready()) {
            return Ok(());
        }
        let now = Instant::now();
        if now >= by {
            tracing::warn!("some devices did not close in time; exiting without them");
            // Dropping them would wait for their threads.
            std::mem::forget((disks, nics));
            return Ok(());
        }
        let hub = options.isolation.hub().map(Hub::as_fd);
        let events: Vec<_> = [wakeup.as_fd()].into_iter().chain(hub).collect();
        sleep(&events, Some(by - now)).map_err(|_| XsError::Closed)?;
        options.isolation.dispatch();
        wakeup.take();
    }
}

/// Result of one iteration of the loop.
enum Progress {
    /// There may be more to do.
    Worked,
    /// Nothing is left until this time.
    Idle(Option<Instant>),
}

/// Upper bound of the file descriptors of a disk: its image with the layers below it and the
/// threads that open it. Each queue needs an event channel, an io_uring, the files registered in
/// it, and a wakeup descriptor.
const fn disk_descriptors(queues: u32) -> u64 {
    32 + 16 * queues as u64
}

/// Maximum number of queues of a NIC, if not configured.
const NIC_QUEUES: u32 = 8;

/// Upper bound of the file descriptors of a NIC: its tap. Each queue needs event channels, an
/// io_uring, the tap's queue, and wakeup descriptors.
const fn nic_descriptors(queues: u32) -> u64 {
    16 + 24 * queues as u64
}

/// Returns the driver of a device whose state may be from an earlier process.
fn new_driver<C: BackendClass>(
    options: &Options,
    addr: DeviceAddr,
    state: XenbusState,
    class: C,
) -> BackendDriver<C> {
    let driver = if options.resume && options.records.is_some() {
        BackendDriver::taking_over(addr, class, state)
    } else {
        BackendDriver::restarted(addr, class)
    };
    driver.with_hotplug_mode(options.hotplug_mode)
}

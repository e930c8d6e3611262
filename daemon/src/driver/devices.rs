//! The backends of one class in this domain.

use crate::budget::Budget;
use crate::descriptors::{Descriptors, Reservation};
use crate::served::{Events, ReportStatus, Served};
use pvio_grant_table::DomId;
use pvio_runtime::LogLimit;
use pvio_xenbus::driver::{BackendClass, BackendDriver, Fault, Life};
use pvio_xenbus::handshake::HandshakeError;
use pvio_xenbus::handshake::common::{
    BackendKind, DeviceAddr, backend_root, list_backends, read_error, read_online, read_state,
    remove_backend, state_path,
};
use pvio_xenbus::handshake::vbd::changes_live;
use pvio_xenbus::handshake::vif::is_live;
use pvio_xenbus::{WatchEvent, XenbusState, Xenstore, XsError};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

/// How long the backend nodes of a removed device stay in xenstore with state Closed before they
/// are removed, where that is this daemon's task. libxl reports an error if the nodes disappear
/// before it has read the state, and waits up to 10 seconds for their removal.
const REMOVAL_DELAY: Duration = Duration::from_secs(1);

/// Interval at which image sizes are polled. A file or block device may be resized by any program,
/// and there is no notification that covers all ways to do so. Reading the size takes a microsecond
/// per disk.
const POLL_INTERVAL: Duration = Duration::from_secs(3);

/// How long a guest may stay in state Closing before that is reported. It is not necessarily an
/// error: a guest with a mounted disk does not close it. libxl waits 10 seconds before it removes a
/// NIC by force.
pub(super) const CLOSING_TIMEOUT: Duration = Duration::from_secs(5);

/// The backends of one class, which the toolstack creates and removes.
pub struct Devices<C, M> {
    home: DomId,
    /// Serve only this domain's devices, if set.
    only: Option<DomId>,
    create: M,
    /// Each kind that is served, and its directory, which is also the token of its watch.
    roots: Vec<(BackendKind, String)>,
    devices: BTreeMap<DeviceAddr, Device<C>>,
    /// Kinds in whose directories a new device may have appeared.
    unknown: BTreeSet<BackendKind>,
    /// Removed devices whose nodes this daemon has to remove, and when to do it. `None` if the
    /// toolstack removes them.
    pending_removals: Option<BTreeMap<DeviceAddr, Instant>>,
    /// When images and ports were last polled for changes; `None` if they are not polled.
    last_poll: Option<Instant>,
    /// Where the control socket finds the devices.
    served: Served,
    /// The budget of file descriptors, and how many a device needs.
    descriptors: (Descriptors, u64),
}

struct Device<C> {
    driver: BackendDriver<C>,
    /// The message last read from its `error` node.
    last_error: Option<String>,
    /// When it entered state Closing; cleared once the delay has been reported.
    closing: Option<Instant>,
    /// Its reserved file descriptors; `None` if the device was refused.
    reservation: Option<Reservation>,
    /// It has to be stepped, as soon as its budget allows.
    step: bool,
    /// The toolstack has changed one of its settings.
    refresh: bool,
    budget: Budget,
    /// Rate limits of log lines about its changes of state, and about its errors.
    states: Arc<LogLimit>,
    errors: Arc<LogLimit>,
    /// Rate limit of log lines about changes that could not be announced to the guest.
    unannounced: Arc<LogLimit>,
    events: Events,
}

impl<C, M> Devices<C, M>
where
    C: BackendClass + ReportStatus,
    M: Fn(DeviceAddr, XenbusState) -> BackendDriver<C>,
{
    /// Returns an empty set. `create` is called for each new device of these kinds, with the state
    /// that its nodes have.
    pub fn new(kinds: Vec<BackendKind>, home: DomId, only: Option<DomId>, create: M) -> Self {
        let roots = kinds.into_iter().map(|kind| (kind, backend_root(kind, home))).collect();
        Self {
            home,
            only,
            create,
            roots,
            devices: BTreeMap::new(),
            unknown: BTreeSet::new(),
            pending_removals: None,
            last_poll: None,
            served: Served::default(),
            descriptors: (Descriptors::default(), 0),
        }
    }

    /// Reserves `each` file descriptors per device, and refuses devices for which too few are left.
    pub fn with_descriptors(mut self, descriptors: &Descriptors, each: u64) -> Self {
        self.descriptors = (descriptors.clone(), each);
        self
    }

    /// Sets whether the nodes of removed devices are removed here, because no toolstack does it.
    pub fn removing_nodes(mut self, whether: bool) -> Self {
        self.pending_removals = whether.then(BTreeMap::new);
        self
    }

    /// Polls images and ports for changes, such as another size.
    pub fn with_polling(mut self) -> Self {
        self.last_poll = Some(Instant::now());
        self
    }

    /// Publishes the devices in `served`.
    pub fn published_in(mut self, served: &Served) -> Self {
        self.served = served.clone();
        self
    }

    /// Returns when to call [`remove_closed`](Self::remove_closed).
    pub fn next_removal(&self) -> Option<Instant> {
        self.pending_removals.as_ref()?.values().min().copied()
    }

    /// Removes the nodes of removed devices whose delay is over.
    pub fn remove_closed(&mut self, xs: &mut dyn Xenstore) -> Result<(), XsError> {
        let (Some(pending_removals), now) = (&mut self.pending_removals, Instant::now()) else {
            return Ok(());
        };
        let due: Vec<DeviceAddr> = pending_removals
            .iter()
            .filter(|(_, when)| **when <= now)
            .map(|(addr, _)| *addr)
            .collect();
        for addr in due {
            pending_removals.remove(&addr);
            // The toolstack may have created a device with the same address again.
            if is_closed_offline(xs, &addr)?
                && let Err(error) = remove_backend(xs, addr)
            {
                tracing::warn!(device = addr.backend_path(), %error, "the backend nodes cannot be removed");
            }
        }
        Ok(())
    }

    /// Registers the watches for devices.
    pub fn watch(&self, xs: &mut dyn Xenstore) -> Result<(), XsError> {
        self.roots.iter().try_for_each(|(_, root)| xs.watch(root, root))
    }

    /// Records what has to be done because of an event, if it is about a device of this set;
    /// [`step_pending`](Self::step_pending) does it. Several events about a device are combined.
    pub fn event(&mut self, event: &WatchEvent) {
        if let Some((kind, _)) = self.roots.iter().find(|(_, root)| *root == event.token) {
            let at_device = DeviceAddr::from_backend_path(&event.path, self.home);
            let device = at_device.and_then(|(addr, below)| {
                self.devices.get_mut(&addr).map(|device| (device, below))
            });
            // This daemon's own writes below a device cause events, too; they need no action.
            match device {
                Some((device, "")) => device.step = true,
                Some((device, below)) => {
                    device.refresh |= below == "params" || changes_live(below) || is_live(below);
                }
                None => drop(self.unknown.insert(*kind)),
            }
        } else if let Some((addr, _)) = DeviceAddr::from_backend_path(&event.token, self.home) {
            self.wake(addr);
        }
    }

    /// Schedules a step of a device, if it is in this set.
    pub fn wake(&mut self, addr: DeviceAddr) {
        if let Some(device) = self.devices.get_mut(&addr) {
            device.step = true;
        }
    }

    /// Schedules everything that may have been missed while there was no connection to xenstore.
    pub fn reconnected(&mut self) {
        self.unknown.extend(self.roots.iter().map(|(kind, _)| *kind));
        for device in self.devices.values_mut() {
            (device.step, device.refresh) = (true, true);
        }
    }

    /// Does what was recorded: steps each device with pending work once, unless its budget is
    /// spent. Returns whether anything was done.
    pub fn step_pending(&mut self, xs: &mut dyn Xenstore) -> Result<bool, XsError> {
        let unknown = std::mem::take(&mut self.unknown);
        for kind in &unknown {
            self.discover(xs, *kind)?;
        }
        let now = Instant::now();
        let due = |device: &mut Device<C>| device.refresh || device.may_step(now);
        let due = self.devices.iter_mut().filter_map(|(addr, device)| due(device).then_some(*addr));
        let due: Vec<DeviceAddr> = due.collect();
        // Without a connection, the other devices are stepped nevertheless, for events of their
        // processes.
        let mut lost = Ok(());
        for addr in &due {
            let stepped = self.refresh(xs, *addr).and_then(|()| self.step(xs, *addr));
            lost = lost.and(stepped);
        }
        lost?;
        Ok(!unknown.is_empty() || !due.is_empty())
    }

    /// Returns when to call [`step_pending`](Self::step_pending) without an event, because the budget of a device
    /// with pending work allows a step then.
    pub fn next_step(&mut self) -> Option<Instant> {
        let now = Instant::now();
        let waiting = self.devices.values_mut().filter(|device| device.step);
        waiting.map(|device| device.budget.next(now)).min()
    }

    /// Closes all devices concurrently. To be called again, whenever a device is woken, until it is
    /// ready.
    pub fn shut_down(&mut self, xs: &mut dyn Xenstore) -> Result<Poll<()>, XsError> {
        let mut result = Ok(());
        self.devices.retain(|_, device| match device.driver.shut_down(xs) {
            Ok(outcome) => outcome.is_pending(),
            Err(error) => {
                result = Err(error);
                false
            }
        });
        result.map(|()| self.is_empty())
    }

    /// Does as [`shut_down`](Self::shut_down), but leaves the sessions open for another process.
    pub fn leave(&mut self) -> Poll<()> {
        self.devices.retain(|_, device| device.driver.leave().is_pending());
        self.is_empty()
    }

    fn is_empty(&self) -> Poll<()> {
        if self.devices.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Returns when to call [`check_for_changes`](Self::check_for_changes), if there is anything to check.
    pub fn next_check(&self) -> Option<Instant> {
        let closing = self.devices.values().filter_map(|device| device.closing).min();
        self.next_poll_of_backends()
            .into_iter()
            .chain(closing.map(|since| since + CLOSING_TIMEOUT))
            .min()
    }

    fn next_poll_of_backends(&self) -> Option<Instant> {
        self.last_poll.map(|last| last + POLL_INTERVAL).filter(|_| !self.devices.is_empty())
    }

    /// Polls images and ports for changes, and reports guests that do not close a device; does
    /// nothing before the time is due.
    pub fn check_for_changes(&mut self, xs: &mut dyn Xenstore) -> Result<(), XsError> {
        let now = Instant::now();
        self.report_unclosed(xs, now)?;
        if self.next_poll_of_backends().is_none_or(|when| when > now) {
            return Ok(());
        }
        self.last_poll = Some(now);
        for Device { driver: device, step, unannounced, .. } in self.devices.values_mut() {
            // A device may wait for a deadline, which causes no event.
            *step |= device.is_waiting();
            match device.check_for_changes(xs) {
                Ok(()) => {}
                Err(HandshakeError::Xenstore(error)) if error.is_connection_lost() => {
                    return Err(error);
                }
                Err(error) => {
                    if let Some(unlogged) = unannounced.admit() {
                        tracing::warn!(device = device.token(), %error, unlogged, "a change could not be announced to the guest");
                    }
                }
            }
        }
        Ok(())
    }

    /// Reports, once, each device that its guest does not close.
    fn report_unclosed(&mut self, xs: &mut dyn Xenstore, now: Instant) -> Result<(), XsError> {
        let due =
            |device: &Device<C>| device.closing.is_some_and(|since| since + CLOSING_TIMEOUT <= now);
        let due = self.devices.iter().filter(|(_, device)| due(device));
        let due: Vec<DeviceAddr> = due.map(|(addr, _)| *addr).collect();
        for addr in due {
            let Some(device) = self.devices.get_mut(&addr) else { continue };
            device.closing = None;
            if device.driver.is_waiting() {
                // The guest has closed it; the backend's queues are completing requests in flight.
                continue;
            }
            let why = format!(
                "the guest has not released the device for {} s: it is in use there, or the guest \
                 does not respond",
                CLOSING_TIMEOUT.as_secs()
            );
            let fault = Fault::new("frontend-keeps-device", why);
            let remedy = "end its use in the guest, or detach it by force; it is served until then";
            device.driver.complain(xs, &fault.with_remedy(remedy))?;
            device.step = true;
        }
        Ok(())
    }

    fn refresh(&mut self, xs: &mut dyn Xenstore, addr: DeviceAddr) -> Result<(), XsError> {
        let Some(Device { driver: device, refresh, .. }) = self.devices.get_mut(&addr) else {
            return Ok(());
        };
        if !std::mem::take(refresh) {
            return Ok(());
        }
        match device.refresh(xs) {
            Ok(()) => tracing::info!(device = device.token(), "changed settings applied"),
            Err(error) => {
                let (device, remedy) = (device.token(), error.remedy.as_deref());
                tracing::warn!(device, %error, remedy, "changed settings rejected: the previous ones stay in force");
            }
        }
        Ok(())
    }

    fn discover(&mut self, xs: &mut dyn Xenstore, kind: BackendKind) -> Result<(), XsError> {
        for addr in list_backends(xs, kind, self.home)? {
            let is_selected = self.only.is_none_or(|only| addr.front == only);
            if !is_selected || self.devices.contains_key(&addr) || !has_state(xs, &addr)? {
                continue;
            }
            if is_closed_offline(xs, &addr)? {
                // It may be from an earlier process.
                if let Some(pending_removals) = &mut self.pending_removals {
                    pending_removals.entry(addr).or_insert_with(|| Instant::now() + REMOVAL_DELAY);
                }
            } else {
                tracing::info!(device = addr.backend_path(), "device found");
                let state = read_state(xs, &addr.backend_path())?;
                let mut driver = (self.create)(addr, state);
                let (descriptors, each) = &self.descriptors;
                let reservation = match descriptors.reserve(*each) {
                    Ok(reservation) => Some(reservation),
                    Err(fault) => {
                        driver.refuse(xs, &fault)?;
                        None
                    }
                };
                self.devices.insert(addr, Device::new(driver, reservation));
            }
        }
        Ok(())
    }

    fn step(&mut self, xs: &mut dyn Xenstore, addr: DeviceAddr) -> Result<(), XsError> {
        let Some(device) = self.devices.get_mut(&addr) else { return Ok(()) };
        let Device {
            driver: device,
            last_error,
            closing,
            reservation,
            step,
            budget,
            states,
            errors,
            events,
            ..
        } = device;
        let (before, transitions) = (device.state(), device.transitions());
        let stepped = match device.step(xs) {
            // If the frontend's domain is gone, its nodes cannot be read any more.
            Err(XsError::Refused { path, errno, .. }) => {
                tracing::info!(device = device.token(), %path, %errno, "xenstore request rejected: the device is no longer served");
                Ok(Life::Gone)
            }
            stepped => stepped,
        };
        if let Ok(life) = &stepped {
            *step = *life == Life::More;
            budget.spend(Instant::now(), 1 + device.transitions() - transitions);
        }
        // Its process may have been replaced, also if there is no connection to xenstore.
        let descriptors = reservation.as_ref().map_or(0, Reservation::count);
        let seen = device.class().status().with(events).budgeted(descriptors, budget.clone());
        self.served.insert(addr, seen);
        let (life, after) = (stepped?, device.state());
        if before != after {
            *closing = (after == XenbusState::Closing).then(Instant::now);
            if let Some(unlogged) = states.admit() {
                let device = device.token();
                tracing::info!(device, from = %before, to = %after, unlogged, "state changed");
            }
        }
        // The component that fails writes the node once; a message that was there before was logged
        // then.
        let why = read_error(xs, device.token())?;
        if why != *last_error {
            if let Some(why) = &why
                && let Some(unlogged) = errors.admit()
            {
                tracing::warn!(
                    device = device.token(),
                    error = why,
                    unlogged,
                    "the device reports an error"
                );
            }
            *last_error = why;
        }
        if life == Life::Gone {
            tracing::info!(device = device.token(), "device removed");
            self.devices.remove(&addr);
            self.served.remove(addr);
            if let Some(pending_removals) = &mut self.pending_removals {
                pending_removals.insert(addr, Instant::now() + REMOVAL_DELAY);
            }
        }
        Ok(())
    }
}

impl<C: BackendClass> Device<C> {
    fn new(driver: BackendDriver<C>, reservation: Option<Reservation>) -> Self {
        let [states, errors, unannounced] = [(); 3].map(|()| Arc::<LogLimit>::default());
        Self {
            driver,
            last_error: None,
            closing: None,
            reservation,
            step: true,
            refresh: false,
            budget: Budget::new(Instant::now()),
            events: vec![
                ("state-changes", Arc::clone(&states)),
                ("errors", Arc::clone(&errors)),
                ("untold-changes", Arc::clone(&unannounced)),
            ],
            states,
            errors,
            unannounced,
        }
    }

    fn may_step(&mut self, now: Instant) -> bool {
        self.step && self.budget.next(now) <= now
    }
}

/// Returns whether a device's nodes are complete. A toolstack that does not use a transaction
/// writes the state last.
fn has_state(xs: &mut dyn Xenstore, addr: &DeviceAddr) -> Result<bool, XsError> {
    Ok(xs.read_opt(&state_path(&addr.backend_path()))?.is_some())
}

/// Returns whether a device is closed and its nodes only have to be removed.
fn is_closed_offline(xs: &mut dyn Xenstore, addr: &DeviceAddr) -> Result<bool, XsError> {
    let base = addr.backend_path();
    // The device's own step reports a value that is not a number.
    let online = read_online(xs, &base).unwrap_or(true);
    Ok(!online && read_state(xs, &base)? == XenbusState::Closed)
}

//! All backends of one class in this domain.

use super::budget::Budget;
use crate::descriptors::{Descriptors, Promise};
use crate::served::{Events, Served, Visible};
use pvio_grant_table::DomId;
use pvio_uring::LogLimit;
use pvio_xenbus::driver::{BackendClass, BackendDriver, Fault, Life};
use pvio_xenbus::handshake::HandshakeError;
use pvio_xenbus::handshake::common::{
    BackendKind, DeviceAddr, backend_root, list_backends, read_error, read_online, read_state,
    remove_backend_end, state_path,
};
use pvio_xenbus::handshake::vbd::changes_live;
use pvio_xenbus::handshake::vif::is_live;
use pvio_xenbus::{WatchEvent, XenbusState, Xenstore, XsError};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

/// How long a device that is gone stands Closed in xenstore before its directory is removed, where
/// that is ours to do. libxl takes a directory that goes before it saw the state for an error, and
/// waits 10 seconds for it to go.
const LINGER: Duration = Duration::from_secs(1);

/// How often it is looked whether a disk has another size. A file or a block device may be made
/// larger by anybody, and of all ways to do that only one thing is common: that its size is another
/// afterwards. Asking for it takes a microsecond a disk.
const LOOK: Duration = Duration::from_secs(3);

/// How long a guest may take to let go of a device before that is said to be odd. It need not be: one
/// whose disk is mounted keeps it. libxl waits for 10 seconds before it gives a NIC up.
pub(super) const CLOSING: Duration = Duration::from_secs(5);

/// The backends of one class, as the toolstack makes and removes them.
pub struct Devices<C, M> {
    home: DomId,
    /// Only devices of this domain, if it is given.
    only: Option<DomId>,
    make: M,
    /// Each kind that is served, and its directory, which is also the token of the watch on it.
    roots: Vec<(BackendKind, String)>,
    devices: BTreeMap<DeviceAddr, Device<C>>,
    /// Kinds of which there may be new ones.
    unknown: BTreeSet<BackendKind>,
    /// Devices that are gone and whose directories are ours to remove, and from when on.
    leftovers: Option<BTreeMap<DeviceAddr, Instant>>,
    /// When it was last looked whether anything has changed by itself, if that is done.
    looked: Option<Instant>,
    /// Where others see them.
    served: Served,
    /// What file descriptors there are, and how many a device needs.
    descriptors: (Descriptors, u64),
}

struct Device<C> {
    driver: BackendDriver<C>,
    /// What it last told the operator.
    told: Option<String>,
    /// Since when the guest is asked to let go of it, until that is said to be odd.
    closing: Option<Instant>,
    /// The file descriptors it may use; none if it was refused.
    promise: Option<Promise>,
    /// It is to be stepped, when its budget lets it.
    step: bool,
    /// The toolstack has changed something.
    refresh: bool,
    budget: Budget,
    /// Its changes of state, and what was wrong with it.
    states: Arc<LogLimit>,
    errors: Arc<LogLimit>,
    /// Changes that could not be announced to the guest.
    untold: Arc<LogLimit>,
    events: Events,
}

impl<C, M> Devices<C, M>
where
    C: BackendClass + Visible,
    M: Fn(DeviceAddr, XenbusState) -> BackendDriver<C>,
{
    /// None yet; `make` is called for each of these kinds that turns up, with the state that was
    /// left there.
    pub fn new(kinds: Vec<BackendKind>, home: DomId, only: Option<DomId>, make: M) -> Self {
        let roots = kinds.into_iter().map(|kind| (kind, backend_root(kind, home))).collect();
        Self {
            home,
            only,
            make,
            roots,
            devices: BTreeMap::new(),
            unknown: BTreeSet::new(),
            leftovers: None,
            looked: None,
            served: Served::default(),
            descriptors: (Descriptors::default(), 0),
        }
    }

    /// Also refuses devices for which there are not enough file descriptors: each needs so many.
    pub fn counting(mut self, descriptors: &Descriptors, each: u64) -> Self {
        self.descriptors = (descriptors.clone(), each);
        self
    }

    /// Also removes the directories of devices that are gone, which no one else does.
    pub fn clearing_up(mut self, whether: bool) -> Self {
        self.leftovers = whether.then(BTreeMap::new);
        self
    }

    /// Also looks now and then whether what devices stand on has changed by itself.
    pub fn looking(mut self) -> Self {
        self.looked = Some(Instant::now());
        self
    }

    /// Also lets others see them.
    pub fn shown_in(mut self, served: &Served) -> Self {
        self.served = served.clone();
        self
    }

    /// When to call [`clear_up`](Self::clear_up).
    pub fn next_clearing(&self) -> Option<Instant> {
        self.leftovers.as_ref()?.values().min().copied()
    }

    /// Removes the directories whose time has come.
    pub fn clear_up(&mut self, xs: &mut dyn Xenstore) -> Result<(), XsError> {
        let (Some(leftovers), now) = (&mut self.leftovers, Instant::now()) else { return Ok(()) };
        let due: Vec<DeviceAddr> =
            leftovers.iter().filter(|(_, when)| **when <= now).map(|(addr, _)| *addr).collect();
        for addr in due {
            leftovers.remove(&addr);
            // The toolstack may have begun anew with it.
            if is_over(xs, &addr)?
                && let Err(error) = remove_backend_end(xs, addr)
            {
                tracing::warn!(device = addr.backend_path(), %error, "cannot be removed");
            }
        }
        Ok(())
    }

    /// Begins to watch for devices.
    pub fn watch(&self, xs: &mut dyn Xenstore) -> Result<(), XsError> {
        self.roots.iter().try_for_each(|(_, root)| xs.watch(root, root))
    }

    /// Notes down what an event asks for, if it is one of ours; [`turn`](Self::turn) does it. Any
    /// number of events before that are as good as one.
    pub fn event(&mut self, event: &WatchEvent) {
        if let Some((kind, _)) = self.roots.iter().find(|(_, root)| *root == event.token) {
            let at_device = DeviceAddr::from_backend_path(&event.path, self.home);
            let known = at_device.and_then(|(addr, below)| {
                self.devices.get_mut(&addr).map(|device| (device, below))
            });
            // Also for changes of our own making below a device: then nothing is new.
            match known {
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

    /// Has a device stepped, if it is one of ours.
    pub fn wake(&mut self, addr: DeviceAddr) {
        if let Some(device) = self.devices.get_mut(&addr) {
            device.step = true;
        }
    }

    /// Does what was noted down: each device that has something to do is stepped once, unless its
    /// guest has cost too much of late. Whether anything was done.
    pub fn turn(&mut self, xs: &mut dyn Xenstore) -> Result<bool, XsError> {
        let unknown = std::mem::take(&mut self.unknown);
        for kind in &unknown {
            self.discover(xs, *kind)?;
        }
        let now = Instant::now();
        let due = |device: &mut Device<C>| device.refresh || device.may_step(now);
        let due = self.devices.iter_mut().filter_map(|(addr, device)| due(device).then_some(*addr));
        let due: Vec<DeviceAddr> = due.collect();
        for addr in &due {
            self.refresh(xs, *addr)?;
            self.step(xs, *addr)?;
        }
        Ok(!unknown.is_empty() || !due.is_empty())
    }

    /// When to call [`turn`](Self::turn) although nothing happens: a guest has cost too much, and
    /// waits for its turn.
    pub fn next_turn(&mut self) -> Option<Instant> {
        let now = Instant::now();
        let waiting = self.devices.values_mut().filter(|device| device.step);
        waiting.map(|device| device.budget.next(now)).min()
    }

    /// Closes every device, all at the same time; called again, when one is woken, until it is ready.
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

    /// As [`shut_down`](Self::shut_down), and leaves the sessions to another process.
    pub fn leave(&mut self) -> Poll<()> {
        self.devices.retain(|_, device| device.driver.leave().is_pending());
        self.is_empty()
    }

    fn is_empty(&self) -> Poll<()> {
        if self.devices.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    }

    /// When to call [`look`](Self::look); never, while there is nothing to look at.
    pub fn next_look(&self) -> Option<Instant> {
        let closing = self.devices.values().filter_map(|device| device.closing).min();
        self.next_change().into_iter().chain(closing.map(|since| since + CLOSING)).min()
    }

    fn next_change(&self) -> Option<Instant> {
        self.looked.map(|last| last + LOOK).filter(|_| !self.devices.is_empty())
    }

    /// Looks whether what devices stand on has changed by itself, and which guest does not let go of
    /// one, if it is time.
    pub fn look(&mut self, xs: &mut dyn Xenstore) -> Result<(), XsError> {
        let now = Instant::now();
        self.complain(xs, now)?;
        if self.next_change().is_none_or(|when| when > now) {
            return Ok(());
        }
        self.looked = Some(now);
        for Device { driver: device, step, untold, .. } in self.devices.values_mut() {
            // What it waits for may have a deadline, and nobody who says that it is over.
            *step |= device.is_waiting();
            match device.look(xs) {
                Ok(()) => {}
                Err(HandshakeError::Xenstore(error)) if error.is_connection_lost() => {
                    return Err(error);
                }
                Err(error) => {
                    if let Some(unlogged) = untold.admit() {
                        tracing::warn!(device = device.token(), %error, unlogged, "is not told");
                    }
                }
            }
        }
        Ok(())
    }

    /// Says of which devices guests do not let go, once.
    fn complain(&mut self, xs: &mut dyn Xenstore, now: Instant) -> Result<(), XsError> {
        let due = |device: &Device<C>| device.closing.is_some_and(|since| since + CLOSING <= now);
        let due = self.devices.iter().filter(|(_, device)| due(device));
        let due: Vec<DeviceAddr> = due.map(|(addr, _)| *addr).collect();
        for addr in due {
            let Some(device) = self.devices.get_mut(&addr) else { continue };
            device.closing = None;
            if device.driver.is_waiting() {
                // The guest has let go; its queues finish what they have begun.
                continue;
            }
            let why = format!(
                "the guest has not let go of the device for {} s, as it is to: it is in use there, \
                 or the guest does not answer; it is served until then, or until it is taken away by \
                 force",
                CLOSING.as_secs()
            );
            device.driver.complain(xs, &Fault::new("frontend-keeps-device", why))?;
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
            Ok(()) => tracing::info!(device = device.token(), "what the toolstack changed holds"),
            Err(error) => {
                tracing::warn!(device = device.token(), %error, "what was in force stays so");
            }
        }
        Ok(())
    }

    fn discover(&mut self, xs: &mut dyn Xenstore, kind: BackendKind) -> Result<(), XsError> {
        for addr in list_backends(xs, kind, self.home)? {
            let ours = self.only.is_none_or(|only| addr.front == only);
            if !ours || self.devices.contains_key(&addr) || !is_there(xs, &addr)? {
                continue;
            }
            if is_over(xs, &addr)? {
                // Of an earlier process's time, perhaps.
                if let Some(leftovers) = &mut self.leftovers {
                    leftovers.entry(addr).or_insert_with(|| Instant::now() + LINGER);
                }
            } else {
                tracing::info!(device = addr.backend_path(), "a new device");
                let left = read_state(xs, &addr.backend_path())?;
                let mut driver = (self.make)(addr, left);
                let (descriptors, each) = &self.descriptors;
                let promise = match descriptors.promise(*each) {
                    Ok(promise) => Some(promise),
                    Err(why) => {
                        driver.refuse(xs, &Fault::new("file-descriptors", why))?;
                        None
                    }
                };
                self.devices.insert(addr, Device::new(driver, promise));
            }
        }
        Ok(())
    }

    fn step(&mut self, xs: &mut dyn Xenstore, addr: DeviceAddr) -> Result<(), XsError> {
        let Some(device) = self.devices.get_mut(&addr) else { return Ok(()) };
        let Device {
            driver: device,
            told,
            closing,
            promise,
            step,
            budget,
            states,
            errors,
            events,
            ..
        } = device;
        let (before, made) = (device.state(), device.transitions());
        let life = match device.step(xs) {
            // Its frontend's domain is gone, and with it the right to look there.
            Err(XsError::Refused { path, errno, .. }) => {
                tracing::info!(device = device.token(), %path, %errno, "cannot go on");
                Life::Gone
            }
            life => life?,
        };
        *step = life == Life::More;
        budget.spend(Instant::now(), 1 + device.transitions() - made);
        let after = device.state();
        let descriptors = promise.as_ref().map_or(0, Promise::count);
        let seen = device.class().seen().with(events).budgeted(descriptors, *budget);
        self.served.show(addr, seen);
        if before != after {
            *closing = (after == XenbusState::Closing).then(Instant::now);
            if let Some(unlogged) = states.admit() {
                let device = device.token();
                tracing::info!(device, from = %before, to = %after, unlogged, "state");
            }
        }
        // Told once by whoever fails; what is there already was said before.
        let why = read_error(xs, device.token())?;
        if why != *told {
            if let Some(why) = &why
                && let Some(unlogged) = errors.admit()
            {
                tracing::warn!(device = device.token(), unlogged, "{why}");
            }
            *told = why;
        }
        if life == Life::Gone {
            tracing::info!(device = device.token(), "gone");
            self.devices.remove(&addr);
            self.served.forget(addr);
            if let Some(leftovers) = &mut self.leftovers {
                leftovers.insert(addr, Instant::now() + LINGER);
            }
        }
        Ok(())
    }
}

impl<C: BackendClass> Device<C> {
    fn new(driver: BackendDriver<C>, promise: Option<Promise>) -> Self {
        let [states, errors, untold] = [(); 3].map(|()| Arc::<LogLimit>::default());
        Self {
            driver,
            told: None,
            closing: None,
            promise,
            step: true,
            refresh: false,
            budget: Budget::new(Instant::now()),
            events: vec![
                ("state-changes", Arc::clone(&states)),
                ("errors", Arc::clone(&errors)),
                ("untold-changes", Arc::clone(&untold)),
            ],
            states,
            errors,
            untold,
        }
    }

    fn may_step(&mut self, now: Instant) -> bool {
        self.step && self.budget.next(now) <= now
    }
}

/// Whether a device's directory has been filled in: a toolstack that writes key by key has the state
/// last.
fn is_there(xs: &mut dyn Xenstore, addr: &DeviceAddr) -> Result<bool, XsError> {
    Ok(xs.read_opt(&state_path(&addr.backend_path()))?.is_some())
}

/// Whether a device has come to its end, and its directory is only waiting to be removed.
fn is_over(xs: &mut dyn Xenstore, addr: &DeviceAddr) -> Result<bool, XsError> {
    let base = addr.backend_path();
    // What is not a number is the device's to complain about.
    let online = read_online(xs, &base).unwrap_or(true);
    Ok(!online && read_state(xs, &base)? == XenbusState::Closed)
}

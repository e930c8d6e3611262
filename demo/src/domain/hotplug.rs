//! Disks that the toolstack attaches to a running guest: each is attached, mounted, and closed when
//! it is removed. One thread watches all of them in xenstore. Attaching waits for a backend, so it
//! is done on another thread.

use super::ChildMessage;
use super::disk::AttachedDisk;
use super::watcher::name_of;
use crate::guest::fs::Disk;
use crate::guest::fs::thread::{BackendPoller, FsThread, Reply};
use crate::guest::status::{Device, Devices};
use crate::machine::devices::DISK;
use crossbeam_channel::{Receiver, Sender, unbounded};
use pvio_daemon::disks::vdev::Vdev;
use pvio_daemon::failure::Failure;
use pvio_daemon::stop::{Wakeup, sleep};
use pvio_daemon::units::human;
use pvio_hosted::Domain;
use pvio_xenbus::client::Client;
use pvio_xenbus::handshake::common::{
    DeviceAddr, DeviceClass, find_device, frontend_root, list_frontends, read_state, state_path,
};
use pvio_xenbus::{XenbusState, Xenstore, XsError};
use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::thread;
use std::time::Duration;

const TOKEN: &str = "pvio-hotplug";
/// Interval at which a disk is polled while its backend is not connected: the disk's own connection
/// to xenstore may receive a change later than this thread's.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// Starts attaching every disk except the first one, until the process ends.
///
/// # Errors
/// There is no connection to xenstore, or no thread can be created.
pub fn start(domain: &Domain, devices: Devices) -> Result<(), Failure> {
    let xs = domain.xenstore().map_err(Failure::of)?;
    let (sender, attached) = unbounded();
    let wakeup = Wakeup::new()?;
    let (domain, disks) = (domain.clone(), BTreeMap::new());
    let mut hotplug = Hotplug { domain, xs, devices, disks, wakeup, sender, attached };
    let spawned = thread::Builder::new().name("hotplug".into()).spawn(move || {
        if let Err(e) = hotplug.run() {
            tracing::warn!(error = %e, "new disks are no longer detected");
        }
    });
    spawned.map(drop).map_err(|e| Failure::new(format!("a thread cannot start: {e}"), ""))
}

struct Hotplug {
    domain: Domain,
    xs: Client,
    devices: Devices,
    /// By device number; `None` while a disk is being attached.
    disks: BTreeMap<u32, Option<Attached>>,
    /// Rung when attaching has finished.
    wakeup: Wakeup,
    sender: Sender<Outcome>,
    attached: Receiver<Outcome>,
}

/// A disk's number and the result of attaching it.
type Outcome = (u32, Result<Attached, Failure>);

/// An attached disk.
struct Attached {
    addr: DeviceAddr,
    fs: FsThread,
    poller: Option<BackendPoller>,
    size: String,
    /// A description of its contents.
    contents: String,
}

impl Hotplug {
    fn run(&mut self) -> Result<(), XsError> {
        let root = frontend_root(DeviceClass::Vbd, self.domain.id());
        self.xs.watch(&root, TOKEN)?;
        loop {
            while let Ok((index, outcome)) = self.attached.try_recv() {
                self.finish_attach(index, outcome)?;
            }
            let settled = self.publish_states()?;
            for index in list_frontends(&mut self.xs, DeviceClass::Vbd, self.domain.id())? {
                if index != DISK.index && !self.disks.contains_key(&index) {
                    self.start_attach(index);
                }
            }
            // Events that arrived during the work above are already read from the socket and would
            // not end a sleep.
            while self.xs.poll_event()?.is_none() && !self.wakeup.is_pending() {
                let time = (!settled).then_some(POLL_INTERVAL);
                sleep(&[self.xs.as_fd(), self.wakeup.as_fd()], time)
                    .map_err(|_| XsError::Closed)?;
                if !settled {
                    break;
                }
            }
            while self.xs.poll_event()?.is_some() {}
            self.wakeup.take();
        }
    }

    /// Starts attaching a new disk.
    fn start_attach(&mut self, index: u32) {
        let found = find_device(&mut self.xs, DeviceClass::Vbd, self.domain.id(), index);
        let Ok(Some(addr)) = found else { return };
        // The nodes of a closed device are still to be removed by the toolstack.
        let is_new = |state| state == Ok(XenbusState::Initialising);
        if !is_new(read_state(&mut self.xs, &addr.frontend_path())) {
            return;
        }
        let (domain, devices) = (self.domain.clone(), self.devices.clone());
        let (sender, wakeup) = (self.sender.clone(), self.wakeup.clone());
        let thread = thread::Builder::new().name(Vdev::from_number(index).to_string());
        let spawned = thread.spawn(move || {
            let _ = sender.send((index, attach(&domain, addr, devices)));
            wakeup.wake();
        });
        match spawned {
            Ok(_) => drop(self.disks.insert(index, None)),
            Err(error) => tracing::warn!(%error, "the thread of a new disk cannot start"),
        }
    }

    /// Handles the result of attaching a disk.
    fn finish_attach(
        &mut self,
        index: u32,
        outcome: Result<Attached, Failure>,
    ) -> Result<(), XsError> {
        let name = Vdev::from_number(index);
        match outcome {
            Ok(disk) => {
                self.xs.watch(&state_path(&disk.addr.backend_path()), TOKEN)?;
                ChildMessage::Note(format!(
                    "{name} was attached: {}, {}",
                    disk.size, disk.contents
                ))
                .send();
                self.disks.insert(index, Some(disk));
            }
            Err(failure) => {
                self.disks.remove(&index);
                ChildMessage::Note(format!("{name}: {}", failure.what)).send();
            }
        }
        Ok(())
    }

    /// Publishes the state of every disk, polls those whose backends are not connected, and drops
    /// those that are closed. Returns whether no disk has to be polled again soon.
    fn publish_states(&mut self) -> Result<bool, XsError> {
        let (mut settled, mut closed) = (true, Vec::new());
        for (index, disk) in &self.disks {
            let Some(disk) = disk else { continue };
            let [state, backend_state] = [disk.addr.frontend_path(), disk.addr.backend_path()]
                .map(|end| read_state(&mut self.xs, &end).unwrap_or(XenbusState::Closed));
            if matches!(state, XenbusState::Closed | XenbusState::Unknown) {
                closed.push(*index);
                continue;
            }
            self.devices.set(Device {
                name: name_of(disk.addr),
                kind: "disk",
                state: format!("{state:?}"),
                backend_state: format!("{backend_state:?}"),
                features: vec![("holds".into(), disk.contents.clone())],
                reattached: 0,
            });
            if backend_state != XenbusState::Connected {
                settled = false;
                disk.poller.iter().for_each(BackendPoller::poll_backend);
            }
        }
        for index in closed {
            let Some(disk) = self.disks.remove(&index).flatten() else { continue };
            let _ = self.xs.unwatch(&state_path(&disk.addr.backend_path()), TOKEN);
            self.devices.remove(&name_of(disk.addr));
            // On a new thread: the disk's own thread may be blocked in a read, and other disks must
            // not wait for it.
            let end = thread::Builder::new().name("disk-end".into());
            let _ = end.spawn(move || drop(disk.fs));
            ChildMessage::Note(format!("{} was detached", Vdev::from_number(index))).send();
        }
        Ok(settled)
    }
}

/// Waits for a disk's backend, and reads what the disk contains.
fn attach(domain: &Domain, addr: DeviceAddr, devices: Devices) -> Result<Attached, Failure> {
    let disk = AttachedDisk::attach(domain, addr, devices)?;
    let size = human(disk.bytes());
    let started = FsThread::start(Disk::new(disk), Box::new(|| ()));
    let (fs, responses) =
        started.map_err(|e| Failure::new(format!("a thread cannot start: {e}"), ""))?;
    let poller = fs.backend_poller();
    fs.info(0).map_err(Failure::foreign)?;
    let contents = match responses.recv().map(|response| response.result) {
        Ok(Ok(Reply::Info(info))) => format!("{} {:?}", info.kind, info.label),
        Ok(Err(error)) => error.line(),
        Ok(Ok(_)) | Err(_) => "nothing can be read".into(),
    };
    Ok(Attached { addr, fs, poller, size, contents })
}

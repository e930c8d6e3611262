//! Disks that the toolstack gives a guest while it runs: each is attached, looked at, and closed when it is
//! to go. A thread watches the guest's devices; each disk has a thread of its own besides.

use super::Said;
use super::disk::AttachedDisk;
use super::stop::sleep;
use super::watcher::name_of;
use crate::disks::vdev::Vdev;
use crate::failure::Failure;
use crate::guest::fs::Disk;
use crate::guest::fs::thread::{FsThread, Reply};
use crate::guest::http::listing::human;
use crate::guest::status::{Device, Devices};
use crate::machine::devices::DISK;
use pvio_hosted::Domain;
use pvio_xenbus::client::Client;
use pvio_xenbus::handshake::common::{
    DeviceAddr, DeviceClass, find_device, frontend_root, list_frontends, read_state,
};
use pvio_xenbus::{XenbusState, Xenstore, XsError};
use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::thread::{self, JoinHandle};
use std::time::Duration;

const TOKEN: &str = "pvio-hotplug";
/// How often a disk whose backend has not come yet, or is about to go, is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// Takes every disk but the first, for as long as the process lives.
///
/// # Errors
/// When there is no connection or no thread to be had.
pub fn start(domain: &Domain, devices: Devices) -> Result<(), Failure> {
    let xs = domain.xenstore().map_err(Failure::of)?;
    let mut hotplug = Hotplug { domain: domain.clone(), xs, devices, disks: BTreeMap::new() };
    let spawned = thread::Builder::new().name("hotplug".into()).spawn(move || {
        if let Err(e) = hotplug.run() {
            tracing::warn!("new disks are not looked for any more: {e}");
        }
    });
    spawned.map(drop).map_err(|e| Failure::new(format!("no thread: {e}"), ""))
}

struct Hotplug {
    domain: Domain,
    xs: Client,
    devices: Devices,
    disks: BTreeMap<u32, JoinHandle<()>>,
}

impl Hotplug {
    fn run(&mut self) -> Result<(), XsError> {
        let root = frontend_root(DeviceClass::Vbd, self.domain.id());
        self.xs.watch(&root, TOKEN)?;
        loop {
            // One that ended may come again under its number.
            self.disks.retain(|_, disk| !disk.is_finished());
            for index in list_frontends(&mut self.xs, DeviceClass::Vbd, self.domain.id())? {
                if index != DISK.index && !self.disks.contains_key(&index) {
                    self.take(index);
                }
            }
            while self.xs.poll_event()?.is_none() {
                sleep(&[self.xs.as_fd()], None).map_err(|_| XsError::Closed)?;
            }
            while self.xs.poll_event()?.is_some() {}
        }
    }

    fn take(&mut self, index: u32) {
        let found = find_device(&mut self.xs, DeviceClass::Vbd, self.domain.id(), index);
        let Ok(Some(addr)) = found else { return };
        // What is over is only waiting to be removed.
        let is_new = |state| state == Ok(XenbusState::Initialising);
        if !is_new(read_state(&mut self.xs, &addr.frontend_path())) {
            return;
        }
        let (domain, devices) = (self.domain.clone(), self.devices.clone());
        let name = Vdev::of_number(index).to_string();
        let thread = thread::Builder::new().name(name.clone()).spawn(move || {
            if let Err(failure) = serve(&domain, addr, &name, &devices) {
                Said::Note(format!("{name}: {}", failure.what)).say();
            }
        });
        match thread {
            Ok(thread) => drop(self.disks.insert(index, thread)),
            Err(error) => tracing::warn!(%error, "no thread for a new disk"),
        }
    }
}

/// Uses a disk until its backend wants it to go.
fn serve(domain: &Domain, addr: DeviceAddr, name: &str, devices: &Devices) -> Result<(), Failure> {
    let disk = AttachedDisk::attach(domain, addr, devices.clone())?;
    let size = human(disk.bytes());
    let mut xs = domain.xenstore().map_err(Failure::of)?;
    let started = FsThread::start(Disk::new(disk), Box::new(|| ()));
    let (fs, answers) = started.map_err(|e| Failure::new(format!("no thread: {e}"), ""))?;
    let nudge = fs.nudge();
    fs.info(0).map_err(Failure::of)?;
    let found = match answers.recv().map(|answer| answer.result) {
        Ok(Ok(Reply::Info(info))) => format!("{} {:?}", info.kind, info.label),
        Ok(Err(error)) => error.to_string(),
        Ok(Ok(_)) | Err(_) => "nothing can be read".into(),
    };
    Said::Note(format!("{name} was attached: {size}, {found}")).say();
    loop {
        let [state, backend_state] = [addr.frontend_path(), addr.backend_path()]
            .map(|end| read_state(&mut xs, &end).unwrap_or(XenbusState::Closed));
        devices.set(Device {
            name: name_of(addr),
            kind: "disk",
            state: format!("{state:?}"),
            backend_state: format!("{backend_state:?}"),
            features: vec![("holds".into(), found.clone())],
            reattached: 0,
        });
        if state == XenbusState::Closed || state == XenbusState::Unknown {
            break;
        }
        if backend_state != XenbusState::Connected
            && let Some(nudge) = &nudge
        {
            nudge.tend();
        }
        thread::sleep(LOOK);
    }
    drop(fs);
    devices.remove(&name_of(addr));
    Said::Note(format!("{name} was detached")).say();
    Ok(())
}

//! What the supervisor opens for a session of any class.

use super::messages::{Descriptor, Start};
use pvio_event_channel::{DeviceDescriptors, DevicePlatform, DeviceScope};
use pvio_recordfile::{CounterFile, RecordError, RecordStore};
use pvio_xenbus::driver::Fault;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// Memory of the counters of a device's queues, over all its sessions.
#[derive(Debug, Default)]
pub struct CounterMemory(Option<(OwnedFd, CounterFile)>);

impl CounterMemory {
    /// Uses the memory that the process of an earlier supervisor has.
    pub fn adopt(&mut self, file: OwnedFd) {
        self.0 = CounterFile::read(file).ok();
    }

    /// Returns the counters.
    #[must_use]
    pub fn file(&self) -> Option<&CounterFile> {
        self.0.as_ref().map(|(_, counters)| counters)
    }

    /// Returns the memory for a session of this number of queues, with the counters until now.
    ///
    /// # Errors
    /// A [`Fault`] if there is no memory or descriptor.
    pub fn for_queues(&mut self, queues: usize) -> Result<OwnedFd, Fault> {
        let failed = |e: io::Error| {
            Fault::new("device-process", format!("the counters' memory cannot be created: {e}"))
        };
        let fits = |(_, counters): &(OwnedFd, CounterFile)| counters.queues() >= queues;
        let memory = match self.0.take() {
            Some(memory) if fits(&memory) => memory,
            before => {
                let (file, counters) = CounterFile::create(queues).map_err(failed)?;
                if let Some((_, before)) = before {
                    let all = 0..before.queues();
                    all.for_each(|queue| counters.publish(queue, before.words(queue)));
                }
                (file, counters)
            }
        };
        let (file, _) = self.0.insert(memory);
        file.try_clone().map_err(failed)
    }
}

/// Opens the in-flight record of a session, without mapping it here.
///
/// # Errors
/// A [`Fault`] if there is none.
pub fn open_record(
    records: &RecordStore,
    device: &str,
    len: usize,
    start: Start,
) -> Result<(Descriptor, OwnedFd), Fault> {
    let record = match records.open_unmapped(device, len, start != Start::New) {
        Err(RecordError::Missing { .. }) if start == Start::ResumedOrNew => {
            records.open_unmapped(device, len, false)
        }
        other => other,
    };
    let record = record.map_err(|e| Fault::of(e.code(), &e))?;
    Ok((Descriptor::Record, record))
}

/// Opens the platform for a device.
///
/// # Errors
/// A [`Fault`] if the platform refuses.
pub fn open_platform<P: DevicePlatform>(
    platform: &P,
    scope: &DeviceScope,
) -> Result<(P::Description, impl Iterator<Item = (Descriptor, OwnedFd)> + use<P>), Fault> {
    let opened = platform.device_descriptors(scope);
    let DeviceDescriptors { description, fds } =
        opened.map_err(|e| Fault::of("device-platform", &e))?;
    Ok((description, fds.into_iter().map(|fd| (Descriptor::Platform, fd))))
}

/// Duplicates a descriptor for a device process.
///
/// # Errors
/// A [`Fault`] if there is no descriptor.
pub fn copy(fd: &dyn AsFd) -> Result<OwnedFd, Fault> {
    fd.as_fd().try_clone_to_owned().map_err(|e| {
        Fault::new("device-process", format!("a descriptor cannot be duplicated: {e}"))
    })
}

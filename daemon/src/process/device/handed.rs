//! The descriptors that a device process was handed.

use super::Descriptors;
use crate::process::disk::connection_to_hypervisor;
use crate::process::messages::Descriptor;
use pvio_event_channel::{DeviceDescriptors, DevicePlatform};
use pvio_recordfile::{CounterFile, RecordFile};
use pvio_storage::image::HandedRecord;
use pvio_xenbus::driver::Fault;
use std::io;
use std::os::fd::OwnedFd;

/// The descriptors, by purpose.
#[derive(Default)]
pub struct Handed {
    platform: Vec<OwnedFd>,
    /// The files of the image.
    pub image: Vec<(HandedRecord, OwnedFd)>,
    record: Option<OwnedFd>,
    /// The write end of the fence.
    pub fence: Option<OwnedFd>,
    counters: Option<OwnedFd>,
    /// The file of the trace.
    pub trace: Option<OwnedFd>,
    /// The queues of the link.
    pub link: Vec<OwnedFd>,
}

impl Handed {
    /// Sorts descriptors.
    #[must_use]
    pub fn of(descriptors: Descriptors) -> Self {
        let mut this = Self::default();
        for (purpose, fd) in descriptors {
            match purpose {
                Descriptor::Platform => this.platform.push(fd),
                Descriptor::Image(record) => this.image.push((record, fd)),
                Descriptor::Record => this.record = Some(fd),
                Descriptor::Fence => this.fence = Some(fd),
                Descriptor::Counters => this.counters = Some(fd),
                Descriptor::Trace => this.trace = Some(fd),
                Descriptor::Link => this.link.push(fd),
                Descriptor::Listen => {}
            }
        }
        this
    }

    /// Takes the platform, and the connection to a hypervisor that is a process.
    ///
    /// # Errors
    /// A [`Fault`] if the descriptors are not those of the description.
    pub fn platform<P: DevicePlatform>(
        &mut self,
        description: P::Description,
    ) -> Result<(P, Option<OwnedFd>), Fault> {
        let fds = std::mem::take(&mut self.platform);
        let hypervisor = connection_to_hypervisor(&fds).map_err(unusable)?;
        let platform = P::from_descriptors(DeviceDescriptors { description, fds });
        Ok((platform.map_err(|e| Fault::of("device-platform", &e))?, hypervisor))
    }

    /// Takes the memory of the counters, and a descriptor of it for another supervisor.
    ///
    /// # Errors
    /// A [`Fault`] if it is missing or too short.
    pub fn counters(&mut self, queues: usize) -> Result<(OwnedFd, CounterFile), Fault> {
        let counters = self.counters.take().ok_or_else(|| missing("memory for counters"))?;
        let published = counters.try_clone().and_then(|fd| CounterFile::open(fd, queues));
        Ok((counters, published.map_err(unusable)?))
    }

    /// Takes the in-flight record.
    ///
    /// # Errors
    /// A [`Fault`] if it is missing or cannot be mapped.
    pub fn record(&mut self, len: usize) -> Result<RecordFile, Fault> {
        let record = self.record.take().ok_or_else(|| missing("in-flight record"))?;
        RecordFile::map(record, len).map_err(unusable)
    }
}

fn missing(what: &str) -> Fault {
    Fault::new("device-process", format!("the supervisor sent no {what}"))
}

/// Returns the fault of a descriptor that cannot be used.
pub fn unusable(error: io::Error) -> Fault {
    Fault::new("device-process", format!("a descriptor is unusable: {error}"))
}

/// Returns the session of an earlier process if that had begun it, else a new one.
///
/// # Errors
/// Why it cannot be started.
pub fn resumed_or_new<S>(
    resumed: Result<S, Fault>,
    new: impl FnOnce() -> Result<S, Fault>,
) -> Result<S, Fault> {
    match resumed {
        Err(fault) if fault.code == "record-invalid" => new(),
        other => other,
    }
}

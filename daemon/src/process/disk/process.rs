//! The process of a disk.

use super::super::channel::Channel;
use super::super::device::{Control, Received};
use super::super::messages::{Descriptor, FromDevice, Start};
use super::dial::SupervisorDial;
use super::{DiskChange, DiskIdentity, DiskServe};
use crate::failure::Failure;
use crate::stop::Wakeup;
use pvio_blkback::Stats;
use pvio_blkback::engine::FlushState;
use pvio_blkback::session::{Begin, Session, SessionParts};
use pvio_confinement::{ProcessKind, SystemCalls};
use pvio_event_channel::{DeviceDescriptors, DevicePlatform};
use pvio_grant_table::policy::MappingBudget;
use pvio_recordfile::{CounterFile, RecordFile};
use pvio_runtime::Gate;
use pvio_storage::engine::throttle::Throttles;
use pvio_storage::host::{DiskParts, ImageQueues, OpenDisk, TraceFile};
use pvio_storage::image::{HandedFiles, HandedRecord, Image};
use pvio_xenbus::driver::Fault;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::task::Poll;
use std::time::Instant;

type DiskSession<P> = Session<P, RecordFile, ImageQueues>;

/// A disk that is being served.
struct Serving<P: DevicePlatform<Channel: AsFd> + Send + 'static> {
    session: DiskSession<P>,
    disk: Arc<OpenDisk>,
    flush_state: Arc<FlushState>,
    dial: Arc<SupervisorDial>,
    identity: DiskIdentity,
    counters: (OwnedFd, CounterFile),
    /// The connection to a hypervisor that is a process.
    hypervisor: Option<OwnedFd>,
}

/// Serves a disk, until the supervisor stops it or it has a fault.
///
/// # Errors
/// There is no supervisor, or a system call failed.
pub fn serve<P>(channel: Channel) -> Result<(), Failure>
where
    P: DevicePlatform<Channel: AsFd> + Send + 'static,
    P::Description: Serialize + DeserializeOwned,
{
    let (mut control, serve, descriptors) =
        Control::begin::<DiskServe<P::Description>, DiskChange, DiskIdentity>(channel)?;
    let received = Instant::now();
    // Before there are threads.
    let mut applied = serve.confined.layers.apply().map_err(Failure::foreign)?;
    let enforcement = serve.confined.enforcement;
    let wakeup = Wakeup::new()?;
    let gate = Gate::closed();
    let mut serving = match begin::<P>((serve, received), descriptors, &wakeup, &gate) {
        Ok(serving) => serving,
        Err(fault) => {
            control.send::<DiskIdentity>(&FromDevice::Fault(fault));
            return Ok(());
        }
    };
    let (mut confined, mut ready, mut stopping) = (false, false, false);
    let (mut flush_failed, mut paused) = (false, false);
    loop {
        while let Some(received) = control.receive::<DiskServe<P::Description>, DiskChange>() {
            match received {
                Received::Change(DiskChange::Options(options)) => serving.disk.refresh(&options),
                Received::Change(DiskChange::Resize(sectors)) => serving.session.resize(sectors),
                Received::Change(DiskChange::Abandoned) => serving.disk.abandon(),
                Received::Change(DiskChange::Connection(error)) => {
                    let missing = || io::Error::other(error.unwrap_or_default());
                    serving.dial.answer(control.take_descriptors().pop().ok_or_else(missing));
                }
                Received::Stop => stopping = true,
                Received::NewSupervisor => {
                    serving.dial.set_unsent();
                    (ready, flush_failed, paused) = (false, false, false);
                    control.hello(Some(serving.identity.clone()), &[serving.counters.0.as_fd()]);
                }
            }
        }
        if stopping {
            if serving.session.stop().is_ready() {
                return Ok(());
            }
        } else {
            match serving.session.ready() {
                Ok(Poll::Pending) => {}
                Ok(Poll::Ready(())) if ready => {}
                Ok(Poll::Ready(())) => {
                    if !std::mem::replace(&mut confined, true) {
                        // All threads have their rings, and wait at the gate.
                        SystemCalls::of(ProcessKind::Disk).install(enforcement, &mut applied);
                        gate.open();
                    }
                    ready = true;
                    control.send::<DiskIdentity>(&FromDevice::Confined(applied.clone()));
                    control.send::<DiskIdentity>(&FromDevice::Ready);
                }
                Err(fault) => return end(control, fault),
            }
            if let Some(fault) = serving.session.fault() {
                return end(control, fault);
            }
        }
        if !flush_failed && serving.flush_state.has_failed() {
            flush_failed = true;
            control.send::<DiskIdentity>(&FromDevice::FlushFailed);
        }
        let now = serving.disk.image().pauses().is_paused();
        if now != std::mem::replace(&mut paused, now) {
            control.send::<DiskIdentity>(&FromDevice::Paused(now));
        }
        if serving.dial.take_request() {
            control.send::<DiskIdentity>(&FromDevice::Redial);
        }
        control.wait_also_for(&wakeup, serving.hypervisor.as_ref().map(AsFd::as_fd))?;
        if serving.hypervisor.as_ref().is_some_and(has_ended) {
            return Err(Failure::new("the hypervisor has ended", ""));
        }
    }
}

/// Returns whether the other end of a socket was closed.
pub fn has_ended(socket: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::RDHUP)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(poll(&mut fds, Some(&now)), Ok(1..))
}

/// Returns the connection to a hypervisor that is a process of this host, and may end before this
/// one.
pub fn connection_to_hypervisor(platform: &[OwnedFd]) -> io::Result<Option<OwnedFd>> {
    let is_socket = |fd: &&OwnedFd| rustix::net::sockopt::socket_type(fd).is_ok();
    platform.iter().find(is_socket).map(OwnedFd::try_clone).transpose()
}

/// Reports a fault and ends the process, which stops the session.
fn end(mut control: Control, fault: Fault) -> Result<(), Failure> {
    control.send::<DiskIdentity>(&FromDevice::Fault(fault));
    Ok(())
}

fn begin<P>(
    (serve, received): (DiskServe<P::Description>, Instant),
    descriptors: Vec<(Descriptor, OwnedFd)>,
    wakeup: &Wakeup,
    gate: &Gate,
) -> Result<Serving<P>, Fault>
where
    P: DevicePlatform<Channel: AsFd> + Send + 'static,
{
    let mut found = Found::of(descriptors);
    let failed =
        |e: io::Error| Fault::new("device-process", format!("a descriptor is unusable: {e}"));
    let description = serve.platform;
    let fds = std::mem::take(&mut found.platform);
    let hypervisor = connection_to_hypervisor(&fds).map_err(failed)?;
    let platform = P::from_descriptors(DeviceDescriptors { description, fds });
    let platform = platform.map_err(|e| Fault::of("device-platform", &e))?;
    let (records, files) = std::mem::take(&mut found.image).into_iter().unzip();
    let files = HandedFiles::new(records, files).map_err(failed)?;
    let dial = Arc::new(SupervisorDial::new(wakeup.clone()));
    let files = files.exporting(serve.image.export).redialing(Arc::<SupervisorDial>::clone(&dial));
    let image = Image::open_handed(&serve.disk, files, &serve.image.geometry);
    let image = image.map_err(|e| Fault::of(e.code(), &e))?;
    let trace = match (serve.trace, found.trace.take()) {
        (Some((path, target)), Some(file)) => {
            Some(TraceFile { file: File::from(file), path: path.into(), target })
        }
        _ => None,
    };
    let parts = DiskParts {
        image,
        throttles: Arc::new(Throttles::new(serve.disk.options.limits())),
        fence: found.fence.take(),
        trace,
        unsized_images: Arc::default(),
    };
    let disk = OpenDisk::new(&serve.disk, parts).map_err(|e| Fault::of(e.code(), &e))?;
    let disk = Arc::new(disk);
    let flush_state = Arc::clone(disk.flush_state());
    if serve.flush_failed {
        flush_state.mark_failed();
    }
    let failure = wakeup.clone();
    flush_state.on_failure(move || failure.wake());
    let change = wakeup.clone();
    disk.image().pauses().on_change(move || change.wake());
    let spec = serve.spec;
    let missing = |what| Fault::new("device-process", format!("the supervisor sent no {what}"));
    let queues = spec.identity.queues.len();
    let counters = found.counters.take().ok_or_else(|| missing("memory for counters"))?;
    let published =
        CounterFile::open(counters.try_clone().map_err(failed)?, queues + 1).map_err(failed)?;
    let stats: Vec<Arc<Stats>> = (0..queues).map(|_| Arc::default()).collect();
    for (queue, stats) in stats.iter().enumerate() {
        stats.set_words(published.words(queue));
    }
    let record = found.record.take().ok_or_else(|| missing("in-flight record"))?;
    let record = RecordFile::map(record, spec.identity.record_len()?).map_err(failed)?;
    // A frontend that finds a page still mapped after the response disables the disk (XSA-396).
    std::thread::sleep(serve.unmapping.saturating_sub(received.elapsed()));
    let mappings = MappingBudget::new(serve.cached_mappings);
    let start = |begin: Begin| {
        let wake = wakeup.clone();
        let queues = ImageQueues::new(Arc::clone(&disk), Arc::new(move || wake.wake()));
        let parts = SessionParts {
            platform: platform.clone(),
            record: record.clone(),
            flush_state: Arc::clone(&flush_state),
            mapping_budget: Arc::clone(&mappings),
            stats: stats.clone(),
            queues: queues
                .behind(gate.clone())
                .publishing(published.clone(), Arc::clone(&mappings)),
        };
        Session::start(&spec, begin, parts)
    };
    let session = match serve.start {
        Start::New => start(Begin::New),
        Start::Resumed => start(Begin::Resumed),
        Start::Again => start(Begin::Again),
        Start::ResumedOrNew => match start(Begin::Resumed) {
            Err(fault) if fault.code == "record-invalid" => start(Begin::New),
            other => other,
        },
    }?;
    let identity = DiskIdentity { session: spec.identity, disk: serve.disk, image: serve.image };
    Ok(Serving {
        session,
        disk,
        flush_state,
        dial,
        identity,
        counters: (counters, published),
        hypervisor,
    })
}

/// The descriptors, by purpose.
#[derive(Default)]
struct Found {
    platform: Vec<OwnedFd>,
    image: Vec<(HandedRecord, OwnedFd)>,
    record: Option<OwnedFd>,
    fence: Option<OwnedFd>,
    counters: Option<OwnedFd>,
    trace: Option<OwnedFd>,
}

impl Found {
    fn of(descriptors: Vec<(Descriptor, OwnedFd)>) -> Self {
        let mut this = Self::default();
        for (purpose, fd) in descriptors {
            match purpose {
                Descriptor::Platform => this.platform.push(fd),
                Descriptor::Image(record) => this.image.push((record, fd)),
                Descriptor::Record => this.record = Some(fd),
                Descriptor::Fence => this.fence = Some(fd),
                Descriptor::Counters => this.counters = Some(fd),
                Descriptor::Trace => this.trace = Some(fd),
                Descriptor::Listen | Descriptor::Link => {}
            }
        }
        this
    }
}

//! The process of a NIC.

use super::super::channel::{Channel, MAX_DESCRIPTORS};
use super::super::device::{
    self, Control, Descriptors, Filtered, Handed, resumed_or_new, unusable,
};
use super::super::messages::{FromDevice, Start};
use super::capture;
use super::{NicChange, NicIdentity, NicServe};
use crate::failure::Failure;
use crate::stop::Wakeup;
use pvio_confinement::ProcessKind;
use pvio_event_channel::DevicePlatform;
use pvio_netback::session::{Begin, Session, SessionParts};
use pvio_netback::stats::Stats;
use pvio_ports::host::{LinkDescription, LinkQueues, OpenLink};
use pvio_ports::settings::{RuntimeSettings, SharedRates};
use pvio_recordfile::RecordFile;
use pvio_runtime::Gate;
use pvio_xenbus::driver::Fault;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::task::Poll;

type NicSession<P> = Session<P, RecordFile, LinkQueues>;

/// A NIC that is being served.
struct Serving<P: DevicePlatform<Channel: AsFd> + Send + 'static> {
    session: NicSession<P>,
    settings: Arc<RuntimeSettings>,
    /// The thread that sends captured packets.
    captures: Sender<(usize, OwnedFd)>,
    identity: NicIdentity,
    counters: OwnedFd,
    /// Descriptors of the link, for another supervisor.
    link: Vec<OwnedFd>,
    /// The connection to a hypervisor that is a process.
    hypervisor: Option<OwnedFd>,
}

/// Serves a NIC, until the supervisor stops it or it has a fault.
///
/// # Errors
/// There is no supervisor, or a system call failed.
pub fn serve<P>(channel: Channel) -> Result<(), Failure>
where
    P: DevicePlatform<Channel: AsFd> + Send + 'static,
    P::Description: Serialize + DeserializeOwned,
{
    let (mut control, serve, descriptors) =
        Control::begin::<NicServe<P::Description>, NicChange, NicIdentity>(channel)?;
    // Before there are threads.
    let applied = serve.confined.layers.apply().map_err(Failure::foreign)?;
    let enforcement = serve.confined.enforcement;
    let wakeup = Wakeup::new()?;
    let gate = Gate::closed();
    let serving = match begin::<P>(serve, descriptors, &wakeup, &gate) {
        Ok(serving) => serving,
        Err(fault) => {
            control.send::<NicIdentity>(&FromDevice::Fault(fault));
            return Ok(());
        }
    };
    device::serve(control, serving, Filtered { applied, enforcement }, (&gate, &wakeup))
}

impl<P> device::Serving for Serving<P>
where
    P: DevicePlatform<Channel: AsFd> + Send + 'static,
    P::Description: Serialize + DeserializeOwned,
{
    const KIND: ProcessKind = ProcessKind::Nic;
    type Serve = NicServe<P::Description>;
    type Change = NicChange;
    type Identity = NicIdentity;

    fn identity(&self) -> Option<(NicIdentity, Vec<BorrowedFd<'_>>)> {
        let link = self.link.iter().map(AsFd::as_fd);
        let descriptors: Vec<_> = [self.counters.as_fd()].into_iter().chain(link).collect();
        (descriptors.len() <= MAX_DESCRIPTORS).then(|| (self.identity.clone(), descriptors))
    }

    fn hypervisor(&self) -> Option<&OwnedFd> {
        self.hypervisor.as_ref()
    }

    fn change(&mut self, change: NicChange, descriptors: Vec<OwnedFd>) {
        match change {
            NicChange::Settings(settings) => {
                // The supervisor has applied them to its own.
                if let Err(fault) = self.settings.apply(&settings, &SharedRates::new()) {
                    tracing::warn!(error = %fault, "settings are not applied");
                }
            }
            NicChange::Rate(rate) => self.session.set_rate(rate),
            NicChange::FilterGroups(chosen) => self.session.filter_groups(chosen),
            NicChange::Headroom(bytes) => self.session.set_headroom(bytes),
            NicChange::Capture(snaplen) => {
                // None if the capture has ended already.
                for socket in descriptors {
                    let _ = self.captures.send((snaplen, socket));
                }
            }
        }
    }

    fn ready(&mut self) -> Result<Poll<()>, Fault> {
        self.session.ready()
    }

    fn fault(&mut self) -> Option<Fault> {
        self.session.fault()
    }

    fn messages(&mut self, _new: bool) -> Vec<FromDevice<NicIdentity>> {
        Vec::new()
    }

    /// Leaves the port as it is: the supervisor resets it if no process follows.
    fn stop(&mut self) -> Poll<()> {
        self.session.leave()
    }
}

fn begin<P>(
    serve: NicServe<P::Description>,
    descriptors: Descriptors,
    wakeup: &Wakeup,
    gate: &Gate,
) -> Result<Serving<P>, Fault>
where
    P: DevicePlatform<Channel: AsFd> + Send + 'static,
{
    let mut handed = Handed::of(descriptors);
    let (platform, hypervisor) = handed.platform::<P>(serve.platform)?;
    let queues = std::mem::take(&mut handed.link);
    let (lasting, kept) = lasting(&serve.link, &queues).map_err(unusable)?;
    let link = OpenLink::from_descriptors(&serve.link, queues)?;
    let settings: Arc<RuntimeSettings> = Arc::default();
    settings.apply(&serve.settings, &SharedRates::new())?;
    let spec = serve.spec;
    let (counters, published) = handed.counters(spec.queues.len())?;
    let stats: Vec<Arc<Stats>> = spec.queues.iter().map(|_| Arc::default()).collect();
    for (queue, stats) in stats.iter().enumerate() {
        stats.set_words(published.words(queue));
    }
    let record = handed.record(spec.record_len())?;
    let start = |begin: Begin| {
        let wake = wakeup.clone();
        let wake = Arc::new(move || wake.wake());
        let queues = LinkQueues::new(link.clone(), Arc::clone(&settings), wake);
        let parts = SessionParts {
            platform: platform.clone(),
            record: record.clone(),
            limit: Arc::default(),
            stats: stats.clone(),
            queues: queues.behind(gate.clone()).publishing(published.clone()),
        };
        Session::start(&spec, begin, parts)
    };
    let session = match serve.start {
        Start::New => start(Begin::New),
        Start::Resumed | Start::Again => start(Begin::Resumed),
        Start::ResumedOrNew => resumed_or_new(start(Begin::Resumed), || start(Begin::New)),
    }?;
    let captures = capture::start_thread(settings.probe.clone())?;
    let identity = NicIdentity { spec, link: lasting, settings: serve.settings };
    Ok(Serving { session, settings, captures, identity, counters, link: kept, hypervisor })
}

/// Returns the link as another process can use it after this one, and its descriptors: the packets
/// of a file are sent once, and a socket is bound once.
fn lasting(
    link: &LinkDescription,
    queues: &[OwnedFd],
) -> io::Result<(LinkDescription, Vec<OwnedFd>)> {
    let mut lasting = link.clone();
    match &mut lasting {
        LinkDescription::Files { replay, .. } => *replay = None,
        LinkDescription::AfXdp { sockets, .. } => *sockets = false,
        LinkDescription::Tap { .. } | LinkDescription::Loopback => {}
    }
    let kept = queues.iter().take(lasting.descriptors()).map(OwnedFd::try_clone);
    Ok((lasting, kept.collect::<io::Result<_>>()?))
}

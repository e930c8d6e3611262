//! The device: a virtual disk's backend end, from the toolstack's words to served queues.

mod media;

pub use crate::config::Config;
use crate::config::abi;
use crate::engine::Geometry;
use crate::live::Live;
use crate::pages::most_pages;
use crate::path::{DataPath, Policy};
use crate::queue::{QueueFault, QueueParts};
use crate::stats::Stats;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::task::Poll;
use media::Change;
use pvio_event_channel::{EventChannel, EventChannels, Port};
use pvio_grant_table::{Access, DomId, GrantCopier, GrantMapper, GrantRef};
use pvio_ring::BackRing;
use pvio_xenbus::driver::{BackendClass, Ends, Fault, Prepared, hotplug};
use pvio_xenbus::handshake::HandshakeError;
use pvio_xenbus::handshake::common::{clear_error, read_state};
use pvio_xenbus::handshake::vbd::{
    BackDisk, BackOffer, DeviceType, Discard, DiskInfo, FrontRequest, Mode, Negotiated,
    Queue as QueueKeys, ToolstackBack, announce_resize,
};
use pvio_xenbus::{XenbusState, Xenstore};

/// What a vbd needs of the platform it runs on.
pub trait Platform: GrantMapper + GrantCopier + EventChannels + Clone {}
impl<P: GrantMapper + GrantCopier + EventChannels + Clone> Platform for P {}

/// What has become of a disk that is being opened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Opening {
    /// It is open, and looks so.
    Done(Geometry),
    /// It is not done.
    Pending,
    /// Neither, and why: somebody has the image, and is waited for.
    Busy(Fault),
}

/// Opens disks and runs queues: threads, or whatever the platform has.
pub trait Serve<P: Platform> {
    /// A queue that is being served. Dropping it finishes what is under way and lets go of
    /// everything.
    type Running;

    /// What is offered for a disk, where the toolstack's words about it ask for something else than
    /// is usual. Asked before the disk is opened, and before the toolstack's script has run.
    ///
    /// # Errors
    /// A [`Fault`] that tells the operator what to do.
    fn configure(&mut self, _disk: &ToolstackBack, usual: Config) -> Result<Config, Fault> {
        Ok(usual)
    }

    /// Takes over what the toolstack changed of a disk that is open.
    ///
    /// # Errors
    /// A [`Fault`] that tells the operator what to do; what was in force stays so.
    fn refresh(&mut self, _disk: &ToolstackBack) -> Result<(), Fault> {
        Ok(())
    }

    /// Opens what backs the disk, and lets go of what was open before. Nothing is being served.
    /// Of a drive without a medium ([`ToolstackBack::is_empty_drive`]) this is a disk of no sectors,
    /// whose queues are [started](Self::start) all the same.
    ///
    /// # Errors
    /// A [`Fault`] that tells the operator what to do.
    fn open(&mut self, disk: &ToolstackBack) -> Result<Geometry, Fault>;

    /// The same where opening takes time and nothing may wait for it: called again with the same
    /// words, when the server wakes whoever drives the device, until it is done. The one given by
    /// default opens at once.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    fn poll_open(&mut self, disk: &ToolstackBack) -> Result<Opening, Fault> {
        self.open(disk).map(Opening::Done)
    }

    /// Closes what is open, or is being opened; called again until it is ready. The one given by
    /// default leaves that to the server's end.
    fn close(&mut self) -> Poll<()> {
        Poll::Ready(())
    }

    /// How many sectors of 512 bytes the disk has now, if it may have become larger or smaller since
    /// it was opened. Called now and then while it is served, and cheap.
    fn sectors(&mut self) -> Option<u64> {
        None
    }

    /// Begins to serve a queue from it, without waiting until it is [ready](Self::ready).
    ///
    /// # Errors
    /// A [`Fault`] when the system has not what that takes.
    fn start(
        &mut self,
        name: &str,
        parts: QueueParts<P, P::Channel>,
    ) -> Result<Self::Running, Fault>;

    /// Whether a queue that was started is served.
    ///
    /// # Errors
    /// A [`Fault`] when the system has not what that takes.
    fn ready(&mut self, _running: &mut Self::Running) -> Result<Poll<()>, Fault> {
        Ok(Poll::Ready(()))
    }

    /// Why a queue ended by itself, if it did; told once.
    fn fault(&mut self, running: &mut Self::Running) -> Option<QueueFault>;

    /// Stops serving a queue: nothing new is taken, and what was begun is finished. Called again
    /// until it is ready; dropping the queue does not wait then. The one given by default leaves
    /// everything to that.
    fn stop(&mut self, _running: &mut Self::Running) -> Poll<()> {
        Poll::Ready(())
    }
}

/// A virtual disk's backend, to be driven by [`pvio_xenbus::driver::BackendDriver`].
#[derive(Debug)]
pub struct Vbd<P: Platform, S: Serve<P>> {
    platform: P,
    server: S,
    /// What is usual.
    usual: Config,
    /// What holds for this disk.
    config: Config,
    /// What the toolstack said of it, and what it looks like; none before it was opened.
    disk: Option<(ToolstackBack, Arc<Live>)>,
    /// The image is in use elsewhere, and the error node says so.
    told_busy: bool,
    /// A change of media that was begun.
    change: Option<Change>,
    /// What became of one that could not be carried through.
    failed: Option<Fault>,
    /// What this session's frontend was offered, and asked for.
    asked: Option<(BackOffer, FrontRequest)>,
    /// The queues of this session; none when there is no session.
    running: Vec<S::Running>,
    negotiated: Option<Negotiated>,
    /// Of each queue, over all sessions.
    stats: Vec<Arc<Stats>>,
    #[cfg(feature = "std")]
    sessions: Arc<pvio_uring::LogLimit>,
}

impl<P: Platform, S: Serve<P>> Vbd<P, S> {
    /// A disk nobody has asked about yet, as the default [`Config`] has it.
    pub fn new(platform: P, server: S) -> Self {
        Self::with(platform, server, Config::default())
    }

    /// A disk nobody has asked about yet.
    pub fn with(platform: P, server: S, config: Config) -> Self {
        Self {
            platform,
            server,
            usual: config,
            config: config.bounded(),
            disk: None,
            told_busy: false,
            change: None,
            failed: None,
            asked: None,
            running: Vec::new(),
            negotiated: None,
            stats: Vec::from([Arc::default()]),
            #[cfg(feature = "std")]
            sessions: Arc::default(),
        }
    }

    /// What each of its queues has done, over all sessions; [`Stats::total`] adds them up.
    pub fn stats(&self) -> &[Arc<Stats>] {
        &self.stats
    }

    /// How many sessions there were.
    #[cfg(feature = "std")]
    pub const fn sessions(&self) -> &Arc<pvio_uring::LogLimit> {
        &self.sessions
    }

    /// What this session may use; `None` when there is none.
    pub fn negotiated(&self) -> Option<&Negotiated> {
        self.negotiated.as_ref()
    }

    /// How this session's data reaches the guest; `None` when there is no session.
    pub fn data_path(&self) -> Option<DataPath> {
        self.negotiated.as_ref().map(|agreed| self.config.policy.path(agreed.persistent))
    }

    /// How queues are served.
    pub fn server(&self) -> &S {
        &self.server
    }

    /// What the disk looks like now; `None` before it was opened.
    pub fn geometry(&self) -> Option<Geometry> {
        self.disk.as_ref().map(|(_, live)| live.geometry())
    }

    fn features(&self) -> BackOffer {
        let discard = self.geometry().and_then(|g| g.discard).map(|d| Discard {
            granularity: Some(d.granularity),
            alignment: Some(d.alignment),
            secure: d.secure,
        });
        BackOffer {
            flush: true,
            barrier: true,
            discard,
            persistent: self.config.policy.offers_persistent(),
            max_indirect_segments: Some(self.config.max_indirect_segments).filter(|n| *n > 0),
            max_queues: Some(self.config.max_queues),
            max_ring_page_order: Some(self.config.max_ring_page_order),
            // The older way to say it, for older frontends.
            max_ring_pages: Some(1 << self.config.max_ring_page_order),
        }
    }

    /// Maps a queue's ring and binds its event channel.
    fn attach(
        &self,
        front: DomId,
        queue: &QueueKeys,
        stats: &Arc<Stats>,
        agreed: &Negotiated,
    ) -> Result<QueueParts<P, P::Channel>, Fault> {
        let Some((_, disk)) = &self.disk else {
            return Err(Fault::new("image-missing", "no image is open"));
        };
        let abi = abi(agreed.protocol);
        let grefs: Vec<GrantRef> = queue.ring_refs.iter().copied().map(GrantRef).collect();
        let mapped = self.platform.map(front, &grefs, Access::ReadWrite).map_err(|status| {
            let what = format!("the ring (grants {grefs:?}) cannot be mapped: {status}");
            Fault::new(status.code(), what)
        })?;
        let ring = BackRing::attach(mapped, abi.slot_size())
            .map_err(|fault| Fault::new(fault.reason(), fault))?;
        let port = Port(queue.event_channel);
        let channel = self.platform.bind_interdomain(front, port).map_err(|e| {
            Fault::new(e.code(), format!("event channel {} cannot be bound: {e}", port.0))
        })?;
        let data_path = self.config.policy.path(agreed.persistent);
        let most = u32::try_from(most_pages(data_path)).unwrap_or(u32::MAX);
        Ok(QueueParts {
            frontend: front,
            disk: Arc::clone(disk),
            grants: self.platform.clone(),
            data_path,
            ring,
            channel,
            abi,
            max_indirect_segments: agreed.max_indirect_segments.min(most),
            in_order: self.config.in_order,
            stats: Arc::clone(stats),
        })
    }

    /// Opens what backs the disk, as the toolstack lets it be used.
    fn poll_open(&mut self, disk: &ToolstackBack) -> Result<Opening, Fault> {
        self.disk = None;
        let opening = self.server.poll_open(disk)?;
        if let Opening::Done(mut geometry) = opening {
            geometry.read_only |= disk.mode == Mode::ReadOnly;
            if !disk.discard_enable || geometry.read_only {
                geometry.discard = None;
            }
            if geometry.copied {
                self.config.policy = Policy::Copy;
            }
            self.disk = Some((disk.clone(), Arc::new(Live::new(geometry))));
        }
        Ok(opening)
    }

    /// Attaches every queue the frontend asks for and begins to serve them: all of them or none.
    /// `over` tells that they were served before.
    fn serve(&mut self, ends: &Ends, over: bool) -> Result<(), Fault> {
        let Some((offer, request)) = &self.asked else { return Ok(()) };
        let agreed = Negotiated::new(offer, request);
        while self.stats.len() < request.queues.len() {
            self.stats.push(Arc::default());
        }
        // What was attached or started when one fails is dropped.
        let attached = request.queues.iter().zip(&self.stats);
        let attached: Vec<_> = attached
            .map(|(queue, stats)| self.attach(ends.addr.front, queue, stats, &agreed))
            .collect::<Result<_, _>>()?;
        if over {
            // The last answers may have been published by one who died before telling.
            for parts in &attached {
                parts.channel.notify().map_err(|e| Fault::new(e.code(), e))?;
            }
        }
        let disk = format!("vbd-{}-{}", ends.addr.front, ends.addr.index);
        let several = attached.len() > 1;
        for (n, parts) in attached.into_iter().enumerate() {
            let name: String = if several { format!("{disk}-q{n}") } else { disk.clone() };
            // If one fails, disconnecting stops those before it.
            self.running.push(self.server.start(&name, parts)?);
        }
        #[cfg(feature = "std")]
        if let Some(unlogged) = self.sessions.admit() {
            let data_path = self.config.policy.path(agreed.persistent);
            tracing::info!(disk, %data_path, ?agreed, unlogged, "connected");
        }
        self.negotiated = Some(agreed);
        Ok(())
    }

    /// Looks how large the disk is; whether it was another size before. Queues know it at once.
    fn measure(&mut self) -> Option<u64> {
        let (_, live) = self.disk.as_ref()?;
        let sectors = self.server.sectors()?;
        live.resize(sectors).then_some(sectors)
    }

    /// Begins a session with what the frontend asks for.
    fn begin(&mut self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<(), Fault> {
        // What stands there, since it may be an earlier process's, of which the frontend knows and of
        // us nothing.
        let mut offer = BackOffer::read(xs, &ends.back)?;
        if !ends.resumed {
            // Not known before the disk was opened.
            offer.discard = self.features().discard;
        }
        let request = FrontRequest::read(xs, &ends.front, &offer)?;
        self.asked = Some((offer, request));
        self.measure();
        self.serve(ends, ends.resumed)
    }

    /// Stops every queue at once; whether all have ended.
    fn stop(&mut self) -> Poll<()> {
        let Self { server, running, .. } = self;
        running.retain_mut(|queue| server.stop(queue).is_pending());
        if running.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl<P: Platform, S: Serve<P>> BackendClass for Vbd<P, S> {
    fn prepare(&mut self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<Prepared, Fault> {
        let disk = ToolstackBack::read(xs, &ends.back)?;
        self.config = self.server.configure(&disk, self.usual)?.bounded();
        if hotplug(xs, ends, disk.script.as_deref())? == Prepared::AfterOffer {
            return Ok(Prepared::AfterOffer);
        }
        match self.poll_open(&disk)? {
            Opening::Done(_) => {
                if self.told_busy {
                    clear_error(xs, &ends.back)?;
                }
                Ok(Prepared::Yes)
            }
            Opening::Pending => Ok(Prepared::Pending),
            Opening::Busy(fault) => {
                if !core::mem::replace(&mut self.told_busy, true) {
                    fault.report(xs, &ends.back)?;
                }
                Ok(Prepared::AfterOffer)
            }
        }
    }

    fn offer(&self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<(), HandshakeError> {
        // A frontend that has asked already has asked a predecessor in this domain, and been answered
        // by nobody: it goes by what that one offered. From the next session on this is ours.
        if read_state(xs, &ends.front)? == XenbusState::Initialised
            && BackOffer::read(xs, &ends.back)? != BackOffer::default()
        {
            return Ok(());
        }
        self.features().write(xs, &ends.back)
    }

    fn connect(&mut self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<Poll<()>, Fault> {
        if self.change.is_some() {
            self.go_on(xs, ends)?;
            if self.change.is_some() {
                return Ok(Poll::Pending);
            }
        }
        if self.negotiated.is_none() {
            self.begin(xs, ends)?;
        }
        let Self { server, running, .. } = self;
        for queue in running {
            if server.ready(queue)?.is_pending() {
                return Ok(Poll::Pending);
            }
        }
        Ok(Poll::Ready(()))
    }

    fn is_superseded(&mut self, xs: &mut dyn Xenstore, ends: &Ends) -> bool {
        let Some((offer, asked)) = &self.asked else { return false };
        // One that has taken its keys away, as firmware does at its end, is not another.
        FrontRequest::read(xs, &ends.front, offer).is_ok_and(|now| now != *asked)
    }

    fn refresh(&mut self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<(), Fault> {
        let told = ToolstackBack::read(xs, &ends.back)?;
        let Some((disk, _)) = &self.disk else { return Ok(()) };
        if (&told.params, &told.kind) == (&disk.params, &disk.kind) {
            self.server.refresh(&told)?;
            return Ok(self.look(xs, ends)?);
        }
        if !told.is_drive() {
            let text = "what is in a disk that is not removable cannot be changed; detach it, \
                        and attach another";
            return Err(Fault::new("medium-fixed", text));
        }
        self.change_medium(xs, ends, told)
    }

    fn proceed(&mut self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<(), Fault> {
        self.go_on(xs, ends)
    }

    fn look(&mut self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<(), HandshakeError> {
        match self.measure() {
            Some(sectors) if self.negotiated.is_some() => {
                #[cfg(feature = "std")]
                tracing::info!(device = ends.back, sectors, "the disk has another size");
                announce_resize(xs, &ends.back, sectors)
            }
            _ => Ok(()),
        }
    }

    fn describe(&self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<(), HandshakeError> {
        let Some((disk, live)) = &self.disk else {
            return Err(HandshakeError::Unwritable("a disk that was never opened"));
        };
        let geometry = live.geometry();
        let info = DiskInfo {
            cdrom: disk.device_type == DeviceType::Cdrom,
            removable: disk.removable,
            read_only: geometry.read_only,
        };
        let disk = BackDisk {
            sectors: geometry.sectors,
            info,
            sector_size: geometry.sector_size,
            physical_sector_size: geometry.physical_sector_size,
            offer: self.features(),
        };
        disk.write(xs, &ends.back)
    }

    fn disconnect(&mut self) -> Poll<()> {
        let stopped = self.stop();
        if stopped.is_ready() {
            (self.negotiated, self.asked) = (None, None);
        }
        stopped
    }

    fn release(&mut self) -> Poll<()> {
        self.server.close()
    }

    fn fault(&mut self) -> Option<Fault> {
        if let Some(fault) = self.failed.take() {
            return Some(fault);
        }
        if self.change.is_some() {
            // Its queues are ending.
            return None;
        }
        let Self { server, running, .. } = self;
        // One queue that cannot go on ends them all.
        running.iter_mut().find_map(|queue| match server.ready(queue) {
            Ok(_) => server.fault(queue).map(|fault| Fault::new(fault.code(), fault)),
            Err(fault) => Some(fault),
        })
    }
}

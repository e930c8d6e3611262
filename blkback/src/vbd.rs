//! The vbd device's backend: from the toolstack's configuration to connected queues.

mod media;
mod serve;
mod session;

pub use crate::config::Config;
use crate::config::abi;
use crate::disk_state::DiskState;
use crate::engine::Geometry;
use crate::pages::PAGES_MOST;
use crate::path::{DataPath, Policy};
use crate::queue::QueueParts;
use crate::stats::Stats;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::task::Poll;
use media::Change;
use pvio_event_channel::{BackendPlatform, Port};
use pvio_grant_table::policy::MappingBudget;
use pvio_grant_table::{Access, DomId, GrantRef};
use pvio_ring::BackRing;
use pvio_xenbus::Xenstore;
use pvio_xenbus::driver::{BackendClass, BackendContext, Fault, Prepared, hotplug};
use pvio_xenbus::handshake::HandshakeError;
use pvio_xenbus::handshake::common::clear_error;
use pvio_xenbus::handshake::vbd::{
    BackDisk, BackOffer, DeviceType, Discard, DiskInfo, FrontRequest, Mode, Negotiated,
    Queue as QueueKeys, ToolstackBack, announce_resize,
};
pub use serve::{Opening, VbdServer};
use session::{Begin, SessionRecord};

/// A virtual disk's backend, to be driven by [`pvio_xenbus::driver::BackendDriver`].
#[derive(Debug)]
pub struct Vbd<P: BackendPlatform, S: VbdServer<P>> {
    platform: P,
    server: S,
    /// The default settings.
    defaults: Config,
    /// The settings of this disk.
    config: Config,
    /// The toolstack's keys and the state of the disk; `None` before it is opened.
    disk: Option<(ToolstackBack, Arc<DiskState>)>,
    /// Whether the error node reports that the image is in use elsewhere.
    busy_reported: bool,
    /// A media change in progress.
    change: Option<Change>,
    /// The fault of a media change that failed.
    failed: Option<Fault>,
    /// Whether the failed flush of the open disk was logged.
    warned: bool,
    /// The features that this session advertised and its frontend requested.
    requested: Option<(BackOffer, FrontRequest)>,
    /// The in-flight record of this session.
    session: Option<SessionRecord<S::Record>>,
    /// The queues of this session; empty without a session.
    running: Vec<S::Running>,
    negotiated: Option<Negotiated>,
    /// Counters of each queue, over all sessions.
    stats: Vec<Arc<Stats>>,
    #[cfg(feature = "std")]
    sessions: Arc<pvio_runtime::LogLimit>,
    #[cfg(feature = "std")]
    resizes: Arc<pvio_runtime::LogLimit>,
}

impl<P: BackendPlatform, S: VbdServer<P>> Vbd<P, S> {
    /// Creates a disk with the default [`Config`], in the initial state.
    pub fn new(platform: P, server: S) -> Self {
        Self::with(platform, server, Config::default())
    }

    /// Creates a disk with these settings, in the initial state.
    pub fn with(platform: P, server: S, config: Config) -> Self {
        Self {
            platform,
            server,
            defaults: config,
            config: config.bounded(),
            disk: None,
            busy_reported: false,
            change: None,
            failed: None,
            warned: false,
            requested: None,
            session: None,
            running: Vec::new(),
            negotiated: None,
            stats: Vec::from([Arc::default()]),
            #[cfg(feature = "std")]
            sessions: Arc::default(),
            #[cfg(feature = "std")]
            resizes: Arc::default(),
        }
    }

    /// Returns the counters of each queue, over all sessions; [`Stats::total`] adds them up.
    pub fn stats(&self) -> &[Arc<Stats>] {
        &self.stats
    }

    /// Returns the rate-limited log events of the disk, by name.
    #[cfg(feature = "std")]
    pub fn events(&self) -> [(&'static str, Arc<pvio_runtime::LogLimit>); 2] {
        [("sessions", Arc::clone(&self.sessions)), ("resizes", Arc::clone(&self.resizes))]
    }

    /// Returns the negotiated features of this session; `None` without a session.
    pub fn negotiated(&self) -> Option<&Negotiated> {
        self.negotiated.as_ref()
    }

    /// Returns the data path of this session; `None` without a session.
    pub fn data_path(&self) -> Option<DataPath> {
        self.negotiated.as_ref().map(|agreed| self.config.policy.path(agreed.persistent))
    }

    /// Returns the server of the queues.
    pub fn server(&self) -> &S {
        &self.server
    }

    /// Returns the disk's current geometry; `None` before it is opened.
    pub fn geometry(&self) -> Option<Geometry> {
        self.disk.as_ref().map(|(_, live)| live.geometry())
    }

    /// Returns the budget of cached mappings of its guest; `None` before the disk is opened.
    pub fn mapping_budget(&self) -> Option<&Arc<MappingBudget>> {
        self.disk.as_ref().map(|(_, live)| live.mapping_budget())
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
            // The older key with the same meaning, for older frontends.
            max_ring_pages: Some(1 << self.config.max_ring_page_order),
        }
    }

    /// Maps the ring of a queue, creates or resumes its record and binds its event channel.
    fn attach(
        &self,
        front: DomId,
        (index, queue): (usize, &QueueKeys),
        agreed: &Negotiated,
        begin: Begin,
    ) -> Result<QueueParts<P, P::Channel, S::Record>, Fault> {
        let (Some((_, disk)), Some(session), Some(stats)) =
            (&self.disk, &self.session, self.stats.get(index))
        else {
            return Err(Fault::new("image-missing", "no image is open"));
        };
        let abi = abi(agreed.protocol);
        let grefs: Vec<GrantRef> = queue.ring_refs.iter().copied().map(GrantRef).collect();
        let mapped = self.platform.map(front, &grefs, Access::ReadWrite).map_err(|status| {
            let what = format!("the ring (grants {grefs:?}) cannot be mapped: {status}");
            Fault::new(status.code(), what)
        })?;
        let mut ring = BackRing::attach(mapped, abi.slot_size())
            .map_err(|fault| Fault::of(fault.reason(), &fault))?;
        let record = session.queue(index, &mut ring, abi, begin)?;
        let port = Port(queue.event_channel);
        let channel = self.platform.bind_interdomain(front, port).map_err(|e| {
            let fault =
                Fault::new(e.code(), format!("event channel {} cannot be bound: {e}", port.0));
            match e.remedy() {
                Some(remedy) => fault.with_remedy(remedy),
                None => fault,
            }
        })?;
        let data_path = self.config.policy.path(agreed.persistent);
        let most = u32::try_from(PAGES_MOST).unwrap_or(u32::MAX);
        Ok(QueueParts {
            frontend: front,
            disk: Arc::clone(disk),
            grants: self.platform.clone(),
            data_path,
            ring,
            channel,
            abi,
            max_indirect_segments: agreed.max_indirect_segments.min(most),
            record,
            stats: Arc::clone(stats),
        })
    }

    /// Opens the disk's image, with the access that the toolstack permits.
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
            self.warned = false;
            let budget = self.server.mapping_budget(disk.frontend_id);
            let live = DiskState::with(geometry, self.server.flush_state(), budget);
            self.disk = Some((disk.clone(), Arc::new(live)));
        }
        Ok(opening)
    }

    /// Attaches every queue that the frontend requests and starts serving them: all of them or
    /// none.
    fn serve(&mut self, context: &BackendContext, begin: Begin) -> Result<(), Fault> {
        let Some((offer, request)) = &self.requested else { return Ok(()) };
        let agreed = Negotiated::new(offer, request);
        if begin != Begin::Again {
            let key = session::key(context.addr, abi(agreed.protocol), request)?;
            self.session = Some(SessionRecord::begin(&mut self.server, context.addr, key, begin)?);
        }
        while self.stats.len() < request.queues.len() {
            self.stats.push(Arc::default());
        }
        // If one fails, the queues attached or started before it are dropped.
        let attached = request.queues.iter().enumerate();
        let attached: Vec<_> = attached
            .map(|queue| self.attach(context.addr.front, queue, &agreed, begin))
            .collect::<Result<_, _>>()?;
        if let (Some(session), Some((_, disk))) = (&self.session, &self.disk) {
            let path = self.config.policy.path(agreed.persistent);
            session.commit(disk.flush_state(), path, begin);
        }
        let disk = format!("vbd-{}-{}", context.addr.front, context.addr.index);
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

    /// Applies the disk size that was looked up last, to all queues immediately. Returns it if it
    /// changed.
    fn measure(&mut self) -> Option<u64> {
        let (_, live) = self.disk.as_ref()?;
        let sectors = self.server.sectors()?;
        live.resize(sectors).then_some(sectors)
    }

    /// Announces the disk size that was looked up last to the frontend, if it changed.
    fn announce_size(
        &mut self,
        xs: &mut dyn Xenstore,
        context: &BackendContext,
    ) -> Result<(), HandshakeError> {
        match self.measure() {
            Some(sectors) if self.negotiated.is_some() => {
                #[cfg(feature = "std")]
                if let Some(unlogged) = self.resizes.admit() {
                    let device = &context.back;
                    tracing::info!(device, sectors, unlogged, "size changed");
                }
                announce_resize(xs, &context.back, sectors)
            }
            _ => Ok(()),
        }
    }

    /// Begins a session with the features that the frontend requests.
    fn begin(&mut self, xs: &mut dyn Xenstore, context: &BackendContext) -> Result<(), Fault> {
        // Read from xenstore, because the features may have been advertised by an earlier process,
        // and the frontend knows only those.
        let mut offer = BackOffer::read(xs, &context.back)?;
        if !context.resumed {
            // It is not known before the disk is opened.
            offer.discard = self.features().discard;
        }
        let request = FrontRequest::read(xs, &context.front, &offer)?;
        self.requested = Some((offer, request));
        self.measure();
        self.serve(context, if context.resumed { Begin::Resumed } else { Begin::New })
    }

    /// Stops all queues in parallel. Ready when all have ended.
    fn stop(&mut self) -> Poll<()> {
        let Self { server, running, .. } = self;
        running.retain_mut(|queue| server.stop(queue).is_pending());
        if running.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl<P: BackendPlatform, S: VbdServer<P>> BackendClass for Vbd<P, S> {
    fn prepare(
        &mut self,
        xs: &mut dyn Xenstore,
        context: &BackendContext,
    ) -> Result<Prepared, Fault> {
        let disk = ToolstackBack::read(xs, &context.back)?;
        self.config = self.server.configure(&disk, self.defaults)?.bounded();
        if hotplug(xs, context, disk.script.as_deref())? == Prepared::AfterOffer {
            return Ok(Prepared::AfterOffer);
        }
        match self.poll_open(&disk)? {
            Opening::Done(_) => {
                if self.busy_reported {
                    clear_error(xs, &context.back)?;
                }
                Ok(Prepared::Yes)
            }
            Opening::Pending => Ok(Prepared::Pending),
            Opening::Busy(fault) => {
                if !core::mem::replace(&mut self.busy_reported, true) {
                    fault.report(xs, &context.back)?;
                }
                Ok(Prepared::AfterOffer)
            }
        }
    }

    fn offer(&self, xs: &mut dyn Xenstore, context: &BackendContext) -> Result<(), HandshakeError> {
        // From the next session on, this process advertises its own features.
        if context.keeps_offer(xs)? && BackOffer::read(xs, &context.back)? != BackOffer::default() {
            return Ok(());
        }
        self.features().write(xs, &context.back)
    }

    fn forget_session(&mut self, context: &BackendContext) {
        self.server.remove_record(&session::device(context.addr));
    }

    fn resumable(&mut self, xs: &mut dyn Xenstore, context: &BackendContext) -> Result<(), Fault> {
        let offer = BackOffer::read(xs, &context.back)?;
        let request = FrontRequest::read(xs, &context.front, &offer)?;
        let key = session::key(context.addr, abi(request.protocol), &request)?;
        let found = SessionRecord::begin(&mut self.server, context.addr, key, Begin::Resumed);
        #[cfg(feature = "std")]
        if let Err(fault) = &found {
            let (device, reason, remedy) = (&context.back, fault.code, fault.remedy.as_deref());
            if context.was_unserved(fault) {
                tracing::info!(device, reason, %fault, remedy, "session not resumed: it had not been served, connecting it");
            } else {
                tracing::warn!(device, reason, %fault, remedy, "session not resumed: the frontend has to reconnect");
            }
        }
        self.server.mapped_before(found?.maps_requests());
        Ok(())
    }

    fn connect(
        &mut self,
        xs: &mut dyn Xenstore,
        context: &BackendContext,
    ) -> Result<Poll<()>, Fault> {
        if self.change.is_some() {
            self.continue_change(xs, context)?;
            if self.change.is_some() {
                return Ok(Poll::Pending);
            }
        }
        if self.negotiated.is_none() {
            self.begin(xs, context)?;
        }
        let Self { server, running, .. } = self;
        for queue in running {
            if server.ready(queue)?.is_pending() {
                return Ok(Poll::Pending);
            }
        }
        Ok(Poll::Ready(()))
    }

    fn is_superseded(&mut self, xs: &mut dyn Xenstore, context: &BackendContext) -> bool {
        let Some((offer, requested)) = &self.requested else { return false };
        // A frontend that removed its keys, as firmware does when it ends, is not a new one.
        FrontRequest::read(xs, &context.front, offer).is_ok_and(|now| now != *requested)
    }

    fn refresh(&mut self, xs: &mut dyn Xenstore, context: &BackendContext) -> Result<(), Fault> {
        let keys = ToolstackBack::read(xs, &context.back)?;
        let Some((disk, _)) = &self.disk else { return Ok(()) };
        if (&keys.params, &keys.kind) == (&disk.params, &disk.kind) {
            self.server.refresh(&keys)?;
            return Ok(self.check_for_changes(xs, context)?);
        }
        if !keys.is_drive() {
            let text = "the media cannot be changed: the disk is not removable";
            let remedy = "detach it and attach another";
            return Err(Fault::new("medium-fixed", text).with_remedy(remedy));
        }
        self.change_media(xs, context, keys)
    }

    fn proceed(&mut self, xs: &mut dyn Xenstore, context: &BackendContext) -> Result<(), Fault> {
        self.continue_change(xs, context)?;
        Ok(self.announce_size(xs, context)?)
    }

    fn check_for_changes(
        &mut self,
        xs: &mut dyn Xenstore,
        context: &BackendContext,
    ) -> Result<(), HandshakeError> {
        self.server.look_up_size();
        self.announce_size(xs, context)
    }

    fn describe(
        &self,
        xs: &mut dyn Xenstore,
        context: &BackendContext,
    ) -> Result<(), HandshakeError> {
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
        disk.write(xs, &context.back)
    }

    fn disconnect(&mut self) -> Poll<()> {
        if self.stop().is_pending() {
            return Poll::Pending;
        }
        if let Some(session) = self.session.take() {
            session.end(&mut self.server);
        }
        (self.negotiated, self.requested) = (None, None);
        Poll::Ready(())
    }

    fn leave(&mut self) -> Poll<()> {
        self.stop()
    }

    fn release(&mut self) -> Poll<()> {
        self.server.close()
    }

    fn fault(&mut self) -> Option<Fault> {
        if let Some(fault) = self.failed.take() {
            return Some(fault);
        }
        if self.change.is_some() {
            // The queues are being stopped.
            return None;
        }
        let Self { server, running, .. } = self;
        // A queue that cannot continue ends all of them.
        running.iter_mut().find_map(|queue| match server.ready(queue) {
            Ok(_) => server.fault(queue).map(|fault| Fault::of(fault.code(), &fault)),
            Err(fault) => Some(fault),
        })
    }

    fn warning(&mut self) -> Option<Fault> {
        let (_, live) = self.disk.as_ref()?;
        if self.warned || !live.flush_state().has_failed() {
            return None;
        }
        self.warned = true;
        let text =
            "a flush failed: data that the guest wrote may be lost, and every further flush fails";
        let remedy = "repair the storage, shut the guest down or detach the disk, attach it again, \
                      and check its file systems";
        Some(Fault::new("flush-failed", text).with_remedy(remedy))
    }
}

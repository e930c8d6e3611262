//! The vbd device's backend: from the toolstack's configuration to a session.

mod media;
mod serve;

pub use crate::config::Config;
use crate::engine::Geometry;
use crate::path::{DataPath, Policy};
use crate::session::{Begin, SessionIdentity, SessionSpec};
use crate::stats::Stats;
use alloc::sync::Arc;
use core::task::Poll;
use media::Change;
use pvio_xenbus::Xenstore;
use pvio_xenbus::driver::{BackendClass, BackendContext, Fault, Prepared, hotplug};
use pvio_xenbus::handshake::HandshakeError;
use pvio_xenbus::handshake::common::clear_error;
use pvio_xenbus::handshake::vbd::{
    BackDisk, BackOffer, DeviceType, Discard, DiskInfo, FrontRequest, Mode, Negotiated,
    ToolstackBack, announce_resize,
};
pub use serve::{Opening, VbdServer};

/// A virtual disk's backend, to be driven by [`pvio_xenbus::driver::BackendDriver`].
#[derive(Debug)]
pub struct Vbd<S: VbdServer> {
    server: S,
    /// The default settings.
    defaults: Config,
    /// The settings of this disk.
    config: Config,
    /// The toolstack's keys and the current geometry of the disk; `None` before it is opened.
    disk: Option<(ToolstackBack, Geometry)>,
    /// Whether the error node reports that the image is in use elsewhere.
    busy_reported: bool,
    /// Whether the error node reports that operations are held.
    pause_reported: bool,
    /// A media change in progress.
    change: Option<Change>,
    /// The fault of a media change that failed.
    failed: Option<Fault>,
    /// Whether the failed flush of the open disk was logged.
    warned: bool,
    /// The features that this session advertised and its frontend requested.
    requested: Option<(BackOffer, FrontRequest)>,
    /// The session that started last, until it ends; also while its queues are stopped.
    spec: Option<SessionSpec>,
    /// The running queues of the session.
    session: Option<S::Session>,
    /// Whether it was logged that the queues are being served.
    announced: bool,
    #[cfg(feature = "std")]
    sessions: Arc<pvio_runtime::LogLimit>,
    #[cfg(feature = "std")]
    resizes: Arc<pvio_runtime::LogLimit>,
    #[cfg(feature = "std")]
    pauses: Arc<pvio_runtime::LogLimit>,
}

impl<S: VbdServer> Vbd<S> {
    /// Creates a disk with the default [`Config`], in the initial state.
    pub fn new(server: S) -> Self {
        Self::with(server, Config::default())
    }

    /// Creates a disk with these settings, in the initial state.
    pub fn with(server: S, config: Config) -> Self {
        Self {
            server,
            defaults: config,
            config: config.bounded(),
            disk: None,
            busy_reported: false,
            pause_reported: false,
            change: None,
            failed: None,
            warned: false,
            requested: None,
            spec: None,
            session: None,
            announced: false,
            #[cfg(feature = "std")]
            sessions: Arc::default(),
            #[cfg(feature = "std")]
            resizes: Arc::default(),
            #[cfg(feature = "std")]
            pauses: Arc::default(),
        }
    }

    /// Returns the counters of each queue, over all sessions; [`Stats::total`] adds them up.
    pub fn stats(&self) -> &[Arc<Stats>] {
        self.server.stats()
    }

    /// Returns the rate-limited log events of the disk, by name.
    #[cfg(feature = "std")]
    pub fn events(&self) -> [(&'static str, Arc<pvio_runtime::LogLimit>); 3] {
        [
            ("sessions", Arc::clone(&self.sessions)),
            ("resizes", Arc::clone(&self.resizes)),
            ("pauses", Arc::clone(&self.pauses)),
        ]
    }

    /// Returns the negotiated features of this session; `None` without a session.
    pub fn negotiated(&self) -> Option<&Negotiated> {
        self.spec.as_ref().map(|spec| &spec.negotiated)
    }

    /// Returns the data path of this session; `None` without a session.
    pub fn data_path(&self) -> Option<DataPath> {
        self.spec.as_ref().map(|spec| spec.data_path)
    }

    /// Returns the server of the disk.
    pub fn server(&self) -> &S {
        &self.server
    }

    /// Returns the disk's current geometry; `None` before it is opened.
    pub fn geometry(&self) -> Option<Geometry> {
        self.disk.as_ref().map(|(_, geometry)| *geometry)
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
            self.disk = Some((disk.clone(), geometry));
        }
        Ok(opening)
    }

    /// Starts the session that the frontend requested, and returns once its queues are starting.
    fn start(&mut self, context: &BackendContext, begin: Begin) -> Result<(), Fault> {
        let (Some((offer, request)), Some((_, geometry))) = (&self.requested, &self.disk) else {
            return Err(Fault::new("image-missing", "no image is open"));
        };
        let negotiated = Negotiated::new(offer, request);
        let spec = SessionSpec {
            identity: SessionIdentity::new(context.addr, request),
            data_path: self.config.policy.path(negotiated.persistent),
            negotiated,
            geometry: *geometry,
        };
        let session = self.server.start(&spec, begin)?;
        (self.session, self.spec, self.announced) = (Some(session), Some(spec), false);
        Ok(())
    }

    /// Returns whether the session's queues are being served; also if they are stopped.
    fn poll_ready(&mut self) -> Result<Poll<()>, Fault> {
        let Self { server, session: Some(session), .. } = self else { return Ok(Poll::Ready(())) };
        let ready = server.ready(session)?;
        if ready.is_ready() && !core::mem::replace(&mut self.announced, true) {
            #[cfg(feature = "std")]
            if let Some(spec) = &self.spec
                && let Some(unlogged) = self.sessions.admit()
            {
                let (disk, data_path, agreed) =
                    (spec.disk_name(), spec.data_path, &spec.negotiated);
                tracing::info!(disk, %data_path, ?agreed, unlogged, "connected");
            }
        }
        Ok(ready)
    }

    /// Applies the disk size that was looked up last, to all queues immediately. Returns it if it
    /// changed.
    fn measure(&mut self) -> Option<u64> {
        let (_, geometry) = self.disk.as_mut()?;
        let sectors = self.server.sectors()?;
        if core::mem::replace(&mut geometry.sectors, sectors) == sectors {
            return None;
        }
        if let Some(session) = &mut self.session {
            self.server.resize(session, sectors);
        }
        Some(sectors)
    }

    /// Announces the disk size that was looked up last to the frontend, if it changed.
    fn announce_size(
        &mut self,
        xs: &mut dyn Xenstore,
        context: &BackendContext,
    ) -> Result<(), HandshakeError> {
        match self.measure() {
            Some(sectors) if self.spec.is_some() => {
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

    /// Reports in the `error` node that operations are held, or that they are not any more.
    fn report_pause(
        &mut self,
        xs: &mut dyn Xenstore,
        context: &BackendContext,
    ) -> Result<(), Fault> {
        let paused = self.server.is_paused();
        if core::mem::replace(&mut self.pause_reported, paused) == paused {
            return Ok(());
        }
        if !paused {
            // A failed flush is reported again.
            self.warned = false;
            return Ok(clear_error(xs, &context.back)?);
        }
        let text = "the storage is full: the disk is paused";
        let remedy = "free space on the file system of its image, or enlarge it: the disk then \
                      resumes";
        let fault = Fault::new("storage-full", text).with_remedy(remedy);
        #[cfg(feature = "std")]
        if let Some(unlogged) = self.pauses.admit() {
            tracing::warn!(device = context.back, %fault, remedy, unlogged, "requests are held");
        }
        Err(fault)
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
        let begin = if context.resumed { Begin::Resumed } else { Begin::New };
        // If it was not started, nothing is left that a later process could resume.
        self.start(context, begin).inspect_err(|_| self.server.end(context.addr))
    }

    /// Stops all queues in parallel. Ready when all have ended.
    fn stop(&mut self) -> Poll<()> {
        if let Some(session) = &mut self.session
            && self.server.stop(session).is_pending()
        {
            return Poll::Pending;
        }
        self.session = None;
        Poll::Ready(())
    }
}

impl<S: VbdServer> BackendClass for Vbd<S> {
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
        self.server.end(context.addr);
    }

    fn resumable(&mut self, xs: &mut dyn Xenstore, context: &BackendContext) -> Result<(), Fault> {
        let offer = BackOffer::read(xs, &context.back)?;
        let request = FrontRequest::read(xs, &context.front, &offer)?;
        let found = self.server.resumable(&SessionIdentity::new(context.addr, &request));
        #[cfg(feature = "std")]
        if let Err(fault) = &found {
            let (device, reason, remedy) = (&context.back, &*fault.code, fault.remedy.as_deref());
            if context.was_unserved(fault) {
                tracing::info!(device, reason, %fault, remedy, "session not resumed: it had not been served, connecting it");
            } else {
                tracing::warn!(device, reason, %fault, remedy, "session not resumed: the frontend has to reconnect");
            }
        }
        found
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
        if self.spec.is_none() {
            self.begin(xs, context)?;
        }
        self.poll_ready()
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
        self.report_pause(xs, context)?;
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
        let Some((disk, geometry)) = &self.disk else {
            return Err(HandshakeError::Unwritable("a disk that was never opened"));
        };
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
        if let Some(session) = &mut self.session {
            self.server.abandon(session);
        }
        if self.stop().is_pending() {
            return Poll::Pending;
        }
        if let Some(spec) = self.spec.take() {
            self.server.end(spec.identity.addr);
        }
        self.requested = None;
        Poll::Ready(())
    }

    fn leave(&mut self) -> Poll<()> {
        if let Some(session) = &mut self.session
            && self.server.leave(session).is_pending()
        {
            return Poll::Pending;
        }
        self.session = None;
        Poll::Ready(())
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
        // A queue that cannot continue ends all of them.
        if let Err(fault) = self.poll_ready() {
            return Some(fault);
        }
        self.session.as_mut().and_then(|session| self.server.fault(session))
    }

    fn warning(&mut self) -> Option<Fault> {
        if self.warned || self.disk.is_none() || !self.server.flush_failed() {
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

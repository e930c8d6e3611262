//! The device: a virtual disk's backend end, from the toolstack's words to served queues.

mod session;

pub use crate::config::Config;
use crate::config::abi;
use crate::engine::{FlushState, Geometry};
use crate::live::Live;
use crate::pages::most_pages;
use crate::path::{DataPath, Policy};
use crate::queue::{QueueFault, QueueParts};
use crate::stats::Stats;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use pvio_event_channel::{EventChannels, Port};
use pvio_grant_table::{Access, DomId, GrantCopier, GrantMapper, GrantRef};
use pvio_ring::BackRing;
use pvio_ring::shm::SharedMemory;
use pvio_xenbus::driver::{BackendClass, Ends, Fault, Prepared, hotplug};
use pvio_xenbus::handshake::HandshakeError;
use pvio_xenbus::handshake::common::read_state;
use pvio_xenbus::handshake::vbd::{
    BackDisk, BackOffer, DeviceType, Discard, DiskInfo, FrontRequest, Mode, Negotiated,
    Queue as QueueKeys, ToolstackBack, announce_resize,
};
use pvio_xenbus::{XenbusState, Xenstore};
use session::{Begin, Session};

/// What a vbd needs of the platform it runs on.
pub trait Platform: GrantMapper + GrantCopier + EventChannels + Clone {}
impl<P: GrantMapper + GrantCopier + EventChannels + Clone> Platform for P {}

/// Opens disks and runs queues: threads, or whatever the platform has.
pub trait Serve<P: Platform> {
    /// A queue that is being served. Dropping it finishes what is under way and lets go of
    /// everything.
    type Running;

    /// Memory for in-flight records.
    type Record: SharedMemory + Clone;

    /// `len` bytes of memory for the in-flight record of a session of a device: new memory, or, to take an
    /// earlier process's session over, what that process left. Where nothing outlives the process it is
    /// [`HeapMemory`](pvio_ring::shm::HeapMemory), and there is nothing to take over.
    ///
    /// # Errors
    /// A [`Fault`]; with `resumed`, the session ends and the frontend starts over.
    fn record(&mut self, device: &str, len: usize, resumed: bool) -> Result<Self::Record, Fault>;

    /// The session of a device is over, and its record of no more use.
    fn remove_record(&mut self, _device: &str) {}

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

    /// Whether a flush of the disk that is open has failed. The same object for as long as it is open.
    fn flush_state(&self) -> Arc<FlushState> {
        Arc::default()
    }

    /// How many sectors of 512 bytes the disk has now, if it may have become larger or smaller since
    /// it was opened. Called now and then while it is served, and cheap.
    fn sectors(&mut self) -> Option<u64> {
        None
    }

    /// Begins to serve a queue from it.
    ///
    /// # Errors
    /// A [`Fault`] when the system has not what that takes.
    fn start(
        &mut self,
        name: &str,
        parts: QueueParts<P, P::Channel, Self::Record>,
    ) -> Result<Self::Running, Fault>;

    /// Why a queue ended by itself, if it did.
    fn fault(&mut self, running: &mut Self::Running) -> Option<QueueFault>;
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
    /// What became of a change of media that could not be carried through.
    failed: Option<Fault>,
    /// The operator was told that a flush of the open disk has failed.
    warned: bool,
    /// What this session's frontend was offered, and asked for.
    asked: Option<(BackOffer, FrontRequest)>,
    /// What this session's queues have in flight.
    session: Option<Session<S::Record>>,
    /// The queues of this session; none when there is no session.
    running: Vec<S::Running>,
    negotiated: Option<Negotiated>,
    /// Of each queue, over all sessions.
    stats: Vec<Arc<Stats>>,
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
            failed: None,
            warned: false,
            asked: None,
            session: None,
            running: Vec::new(),
            negotiated: None,
            stats: Vec::from([Arc::default()]),
        }
    }

    /// What each of its queues has done, over all sessions; [`Stats::total`] adds them up.
    pub fn stats(&self) -> &[Arc<Stats>] {
        &self.stats
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

    /// Maps the ring of a queue, goes on with its record and binds its event channel.
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
            .map_err(|fault| Fault::new(fault.reason(), fault))?;
        let record = session.queue(index, &mut ring, abi, begin)?;
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
            record,
            stats: Arc::clone(stats),
        })
    }

    /// Opens what backs the disk, as the toolstack lets it be used.
    fn open(&mut self, disk: ToolstackBack) -> Result<(), Fault> {
        self.disk = None;
        let mut geometry = self.server.open(&disk)?;
        geometry.read_only |= disk.mode == Mode::ReadOnly;
        if !disk.discard_enable || geometry.read_only {
            geometry.discard = None;
        }
        if geometry.copied {
            self.config.policy = Policy::Copy;
        }
        self.warned = false;
        self.disk = Some((disk, Arc::new(Live::with(geometry, self.server.flush_state()))));
        Ok(())
    }

    /// Attaches every queue the frontend asks for and begins to serve them: all of them or none.
    fn serve(&mut self, ends: &Ends, begin: Begin) -> Result<(), Fault> {
        let Some((offer, request)) = &self.asked else { return Ok(()) };
        let agreed = Negotiated::new(offer, request);
        if begin != Begin::Again {
            let key = session::key(ends.addr, abi(agreed.protocol), request)?;
            self.session = Some(Session::begin(&mut self.server, ends.addr, key, begin)?);
        }
        while self.stats.len() < request.queues.len() {
            self.stats.push(Arc::default());
        }
        // What was attached or started when one fails is dropped.
        let attached = request.queues.iter().enumerate();
        let attached: Vec<_> = attached
            .map(|queue| self.attach(ends.addr.front, queue, &agreed, begin))
            .collect::<Result<_, _>>()?;
        if let (Some(session), Some((_, disk))) = (&self.session, &self.disk) {
            session.commit(disk.flush_state(), begin);
        }
        let disk = format!("vbd-{}-{}", ends.addr.front, ends.addr.index);
        let several = attached.len() > 1;
        let mut running = Vec::with_capacity(attached.len());
        for (n, parts) in attached.into_iter().enumerate() {
            let name: String = if several { format!("{disk}-q{n}") } else { disk.clone() };
            running.push(self.server.start(&name, parts)?);
        }
        #[cfg(feature = "std")]
        {
            let data_path = self.config.policy.path(agreed.persistent);
            tracing::info!(disk, %data_path, ?agreed, "connected");
        }
        self.running = running;
        self.negotiated = Some(agreed);
        Ok(())
    }

    /// Looks how large the disk is; whether it was another size before. Queues know it at once.
    fn measure(&mut self) -> Option<u64> {
        let (_, live) = self.disk.as_ref()?;
        let sectors = self.server.sectors()?;
        live.resize(sectors).then_some(sectors)
    }

    /// The toolstack has put another medium into the drive, or none. The frontend sees the drive
    /// empty, then what is in it, as a disk that changes its size: there is no other word for it.
    /// Its rings stay, and requests that come meanwhile wait there.
    fn change_medium(
        &mut self,
        xs: &mut dyn Xenstore,
        ends: &Ends,
        mut told: ToolstackBack,
    ) -> Result<(), Fault> {
        let before = self.disk.as_ref().map(|(disk, live)| (disk.clone(), live.geometry()));
        if let Some((before, _)) = &before
            && before.physical_device_path == told.physical_device_path
        {
            // That was made for the medium before.
            told.physical_device_path = None;
        }
        // Every request taken is answered before the medium goes.
        self.running.clear();
        announce_resize(xs, &ends.back, 0)?;
        let empty = ToolstackBack { params: String::new(), ..told.clone() };
        let mut opened = self.open(told.clone());
        if let (Ok(()), Some((_, before)), Some(now)) = (&opened, before, self.geometry())
            && now.sectors > 0
            && self.negotiated.is_some()
            && now.sector_size != before.sector_size
        {
            let text = format!(
                "the medium has sectors of {} bytes, and the frontend was told of {}",
                now.sector_size, before.sector_size
            );
            opened = Err(Fault::new("medium-sectors", text));
        }
        if opened.is_err() {
            self.open(empty)?;
            if let Some((disk, _)) = &mut self.disk {
                // It is not tried again before something else is asked for.
                *disk = told;
            }
        }
        if self.negotiated.is_some() {
            self.serve(ends, Begin::Again)?;
            if let Some(geometry) = self.geometry() {
                announce_resize(xs, &ends.back, geometry.sectors)?;
            }
        }
        opened
    }
}

impl<P: Platform, S: Serve<P>> BackendClass for Vbd<P, S> {
    fn prepare(&mut self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<Prepared, Fault> {
        let disk = ToolstackBack::read(xs, &ends.back)?;
        self.config = self.server.configure(&disk, self.usual)?.bounded();
        if hotplug(xs, ends, disk.script.as_deref())? == Prepared::AwaitsScript {
            return Ok(Prepared::AwaitsScript);
        }
        self.open(disk)?;
        Ok(Prepared::Yes)
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

    fn resumable(&mut self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<(), Fault> {
        let offer = BackOffer::read(xs, &ends.back)?;
        let request = FrontRequest::read(xs, &ends.front, &offer)?;
        let key = session::key(ends.addr, abi(request.protocol), &request)?;
        let found = Session::begin(&mut self.server, ends.addr, key, Begin::Resumed);
        #[cfg(feature = "std")]
        if let Err(fault) = &found {
            let (device, reason) = (&ends.back, fault.code);
            tracing::warn!(device, reason, %fault, "session not resumed; the frontend has to reconnect");
        }
        found.map(drop)
    }

    fn connect(&mut self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<(), Fault> {
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
        self.serve(ends, if ends.resumed { Begin::Resumed } else { Begin::New })
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
        let changed = self.change_medium(xs, ends, told);
        if let Err(fault) = &changed
            && self.running.is_empty()
            && self.negotiated.is_some()
        {
            self.failed = Some(fault.clone());
        }
        changed
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

    fn disconnect(&mut self) {
        self.running.clear();
        if let Some(session) = self.session.take() {
            session.end(&mut self.server);
        }
        (self.negotiated, self.asked) = (None, None);
    }

    fn fault(&mut self) -> Option<Fault> {
        if let Some(fault) = self.failed.take() {
            return Some(fault);
        }
        let Self { server, running, .. } = self;
        // One queue that cannot go on ends them all.
        let fault = running.iter_mut().find_map(|queue| server.fault(queue))?;
        Some(Fault::new(fault.code(), fault))
    }

    fn warning(&mut self) -> Option<Fault> {
        let (_, live) = self.disk.as_ref()?;
        if self.warned || !live.flush_state().has_failed() {
            return None;
        }
        self.warned = true;
        let text = "a flush failed, so data that the guest wrote may be lost; every flush fails from now \
                    on. Repair the storage, shut the guest down or detach the disk, attach it again, and \
                    check its file systems";
        Some(Fault::new("flush-failed", text))
    }
}

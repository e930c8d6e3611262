//! The device: the backend of a virtual NIC, from the toolstack's configuration to a running queue.

mod serve;
mod session;

use crate::fault::{AttachError, QueueError};
use crate::queue::{
    ControlRefs, EventPorts, Features, Headroom, Queue, QueueRefs, QueueSet, RateLimit,
};
use crate::stats::Stats;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::task::Poll;
use pvio_event_channel::{BackendPlatform, EventChannel, Port};
use pvio_grant_table::GrantRef;
use pvio_xenbus::Xenstore;
use pvio_xenbus::driver::{BackendClass, BackendContext, Fault, HotplugMode, Prepared, hotplug};
use pvio_xenbus::handshake::HandshakeError;
use pvio_xenbus::handshake::common::{Hotplug, read_hotplug, write_hotplug};
use pvio_xenbus::handshake::vif::{
    BackOffer, EventChannels as Events, FrontRequest, MAX_QUEUES, Negotiated, Queue as QueueKeys,
    ToolstackBack, VifRate, multicast_request_path, read_multicast_request, read_rate,
    read_xdp_headroom, write_carrier,
};
pub use serve::VifServer;
use session::{Rings, SessionRecord};

/// What attaches the host's interface of a vif to a network.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Attach {
    /// The backend: it adds the interface to the bridge and brings it up, under its final name.
    Here,
    /// The toolstack's hotplug script, which expects an interface `vif<domain>.<handle>` that is
    /// down, and may rename it.
    ByScript,
}

/// Configuration of a guest's session, from connect to disconnect.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SessionConfig {
    /// Number of queues.
    pub queues: usize,
    /// Negotiated features.
    pub features: Features,
}

/// Backend of a virtual NIC, driven by [`pvio_xenbus::driver::BackendDriver`].
pub struct Vif<P: BackendPlatform, S: VifServer<P>> {
    platform: P,
    server: S,
    /// Whether the port exists.
    opened: bool,
    /// What attaches the port; `None` until it is known.
    attach: Option<Attach>,
    /// One element for each queue; empty without a session.
    running: Vec<S::Running>,
    negotiated: Option<Negotiated>,
    /// Limit of all queues together.
    limit: Arc<RateLimit>,
    headroom: Arc<Headroom>,
    /// In-flight record of the session, with the guest's configuration.
    session: Option<SessionRecord<S::Record>>,
    stats: Vec<Arc<Stats>>,
}

impl<P: BackendPlatform, S: VifServer<P>> Vif<P, S> {
    /// Returns a vif without a port and without a session.
    #[must_use]
    pub fn new(platform: P, server: S) -> Self {
        let queues = queues_offered(&server);
        let stats = (0..queues).map(|_| Arc::default()).collect();
        Self {
            platform,
            server,
            opened: false,
            attach: None,
            running: Vec::new(),
            negotiated: None,
            limit: Arc::default(),
            headroom: Arc::default(),
            session: None,
            stats,
        }
    }

    /// Returns the counters of each possible queue, over all sessions.
    #[must_use]
    pub fn stats(&self) -> &[Arc<Stats>] {
        &self.stats
    }

    /// Sets the guest's transmit rate limit for all queues together. Each session starts with the
    /// value in xenstore (`rate`).
    pub fn set_rate(&self, rate: Option<VifRate>) {
        self.limit.set(rate);
    }

    /// Sets whether the guest receives only the multicast groups that it selected, until the
    /// session ends. Each session starts with the negotiated value.
    pub fn filter_groups(&self, chosen: bool) {
        self.session.iter().for_each(|session| session.groups.set_filter(chosen));
    }

    /// Returns the negotiated features of the session; `None` without a session.
    #[must_use]
    pub fn negotiated(&self) -> Option<&Negotiated> {
        self.negotiated.as_ref()
    }

    /// Returns the server, which runs the queues.
    #[must_use]
    pub fn server(&self) -> &S {
        &self.server
    }

    /// Returns the server and the running queues, for a server without threads.
    pub fn running(&mut self) -> (&mut S, &mut [S::Running]) {
        (&mut self.server, &mut self.running)
    }

    fn attach(
        &self,
        context: &BackendContext,
        (index, refs): (usize, &QueueRefs),
        features: Features,
        session: &SessionRecord<S::Record>,
    ) -> Result<Queue<P, S::Buf, S::Record>, Fault>
    where
        P: Clone,
    {
        let stats = self.stats.get(index).map(Arc::clone).unwrap_or_default();
        let peer = context.addr.front;
        let platform = self.platform.clone();
        let part = (&session.record, index, &session.groups);
        let mut queue = Queue::attach_recorded(platform, peer, refs, features, stats, part)?;
        queue.set_policy(self.server.policy());
        Ok(queue)
    }
}

fn queues_offered<P: BackendPlatform, S: VifServer<P>>(server: &S) -> u32 {
    server.max_queues().clamp(1, MAX_QUEUES)
}

/// Features that this backend supports.
fn features_offered(queues: u32) -> BackOffer {
    BackOffer {
        max_queues: Some(queues),
        rx_copy: true,
        sg: true,
        gso_tcpv4: true,
        gso_tcpv6: true,
        ipv6_csum_offload: true,
        multicast_control: true,
        dynamic_multicast_control: true,
        ctrl_ring: true,
        xdp_headroom: true,
        split_event_channels: true,
        ..BackOffer::default()
    }
}

impl<P: BackendPlatform, S: VifServer<P>> BackendClass for Vif<P, S> {
    fn prepare(
        &mut self,
        xs: &mut dyn Xenstore,
        context: &BackendContext,
    ) -> Result<Prepared, Fault> {
        let vif = ToolstackBack::read(xs, &context.back)?;
        let attach = match self.attach {
            Some(attach) => attach,
            None => *self.attach.insert(attach_by(xs, context, &vif)?),
        };
        if attach == Attach::ByScript {
            // The script attaches the interface; the backend only creates it.
            if !self.opened && self.server.poll_open(&vif, Attach::ByScript)?.is_pending() {
                return Ok(Prepared::Pending);
            }
            self.opened = true;
            return hotplug(xs, context, vif.script.as_deref());
        }
        let opened = match self.server.poll_open(&vif, Attach::Here) {
            Ok(Poll::Pending) => return Ok(Prepared::Pending),
            Ok(Poll::Ready(())) => Ok(()),
            Err(fault) => Err(fault),
        };
        self.opened |= opened.is_ok();
        let status = match &opened {
            Ok(()) => Hotplug::Connected,
            Err(fault) => Hotplug::Failed(fault.node_text().into()),
        };
        // The process that creates the interface reports its state; toolstacks wait for this key.
        write_hotplug(xs, &context.back, &status)?;
        opened.map(|()| Prepared::Yes)
    }

    fn offer(&self, xs: &mut dyn Xenstore, context: &BackendContext) -> Result<(), HandshakeError> {
        // The offer of an earlier process stays until its session ends; later sessions get this
        // one.
        if context.keeps_offer(xs)? && BackOffer::read(xs, &context.back)? != BackOffer::default() {
            return Ok(());
        }
        features_offered(queues_offered(&self.server)).write(xs, &context.back)
    }

    fn forget_session(&mut self, context: &BackendContext) {
        self.server.remove_record(&session::device(context.addr));
    }

    fn resumable(&mut self, xs: &mut dyn Xenstore, context: &BackendContext) -> Result<(), Fault> {
        let (request, negotiated) = request(xs, context)?;
        self.server.expect_queues(request.queues.len());
        let rings = Rings::new(context, &request, &negotiated);
        let found = SessionRecord::begin(&mut self.server, &rings, true);
        #[cfg(feature = "std")]
        if let Err(fault) = &found {
            let (device, reason, remedy) = (&context.back, fault.code, fault.remedy.as_deref());
            if context.was_unserved(fault) {
                tracing::info!(device, reason, %fault, remedy, "session not resumed: it had not been served, connecting it");
            } else {
                tracing::warn!(device, reason, %fault, remedy, "session not resumed: the frontend has to reconnect");
            }
        }
        found.map(drop)
    }

    fn connect(
        &mut self,
        xs: &mut dyn Xenstore,
        context: &BackendContext,
    ) -> Result<Poll<()>, Fault> {
        if self.negotiated.is_none() {
            self.begin(xs, context)?;
        }
        let Self { server, running, .. } = self;
        for queue in running {
            if server.ready(queue)?.is_pending() {
                return Ok(Poll::Pending);
            }
        }
        self.server.started();
        Ok(Poll::Ready(()))
    }

    fn describe(
        &self,
        xs: &mut dyn Xenstore,
        context: &BackendContext,
    ) -> Result<(), HandshakeError> {
        write_carrier(xs, &context.back, true)
    }

    fn refresh(&mut self, xs: &mut dyn Xenstore, context: &BackendContext) -> Result<(), Fault> {
        self.set_rate(read_rate(xs, &context.back)?);
        if !self.opened {
            return Ok(());
        }
        let vif = ToolstackBack::read(xs, &context.back)?;
        self.server.refresh(&vif)
    }

    fn watches(&self, context: &BackendContext) -> Vec<String> {
        Vec::from([multicast_request_path(&context.front)])
    }

    fn reread_keys(
        &mut self,
        xs: &mut dyn Xenstore,
        context: &BackendContext,
    ) -> Result<(), HandshakeError> {
        if self.negotiated.as_ref().is_some_and(|negotiated| negotiated.dynamic_multicast) {
            self.filter_groups(read_multicast_request(xs, &context.front)?);
        }
        Ok(())
    }

    fn reconfigures(&self) -> bool {
        true
    }

    fn reconfigure(
        &mut self,
        xs: &mut dyn Xenstore,
        context: &BackendContext,
    ) -> Result<(), Fault> {
        let bytes = read_xdp_headroom(xs, &context.front)?;
        self.headroom.set(u16::try_from(bytes).unwrap_or(u16::MAX));
        Ok(())
    }

    fn disconnect(&mut self) -> Poll<()> {
        if self.leave().is_pending() {
            return Poll::Pending;
        }
        if let Some(session) = self.session.take() {
            session.end(&mut self.server);
        }
        Poll::Ready(())
    }

    fn leave(&mut self) -> Poll<()> {
        let Self { server, running, .. } = self;
        // Requests every queue to stop before the first wait.
        running.retain_mut(|queue| server.stop(queue).is_pending());
        if !running.is_empty() {
            return Poll::Pending;
        }
        if self.negotiated.take().is_some() {
            self.server.stopped();
        }
        Poll::Ready(())
    }

    fn release(&mut self) -> Poll<()> {
        self.server.close()
    }

    fn fault(&mut self) -> Option<Fault> {
        let Self { server, running, .. } = self;
        running.iter_mut().find_map(|running| server.fault(running))
    }
}

impl<P: BackendPlatform, S: VifServer<P>> Vif<P, S> {
    /// Starts a session with the features and queues that the frontend requested.
    fn begin(&mut self, xs: &mut dyn Xenstore, context: &BackendContext) -> Result<(), Fault> {
        let (request, negotiated) = request(xs, context)?;
        // An earlier process may have offered more queues.
        self.stats.resize_with(request.queues.len().max(self.stats.len()), Arc::default);
        let features = features(&negotiated);
        let rings = Rings::new(context, &request, &negotiated);
        let session = SessionRecord::begin(&mut self.server, &rings, context.resumed)?;
        // Every ring is mapped before the first packet: either all are served or none.
        let refs = rings.queues.iter().enumerate();
        let queues = refs.map(|queue| self.attach(context, queue, features, &session));
        let mut queues = queues.collect::<Result<Vec<_>, Fault>>()?;
        self.headroom = Arc::default();
        self.headroom.set(u16::try_from(negotiated.xdp_headroom).unwrap_or(u16::MAX));
        queues.iter_mut().for_each(|queue| queue.share_headroom(&self.headroom));
        if let Some(control) = &rings.control {
            self.serve_control(&mut queues, control, &session)?;
        }
        session.groups.set_filter(negotiated.multicast_control);
        queues.iter_mut().for_each(|queue| queue.share_limit(&self.limit));
        self.set_rate(read_rate(xs, &context.back)?);
        if context.resumed {
            #[cfg(feature = "std")]
            {
                let given_up =
                    queues.iter().fold(0, |sum: u64, q| sum.saturating_add(q.given_up()));
                tracing::info!(
                    device = context.back,
                    queues = queues.len(),
                    given_up,
                    "session resumed"
                );
            }
            // The earlier process may have published responses and ended before it notified the
            // guest.
            for channel in queues.iter().flat_map(Queue::channels) {
                channel.notify().map_err(|e| Fault::of(e.code(), &QueueError::Event(e)))?;
            }
        } else {
            session.record.commit();
        }
        (self.negotiated, self.session) = (Some(negotiated), Some(session));
        self.start(context, features, queues)
    }

    fn serve_control(
        &mut self,
        queues: &mut [Queue<P, S::Buf, S::Record>],
        refs: &ControlRefs,
        session: &SessionRecord<S::Record>,
    ) -> Result<(), Fault> {
        let set = QueueSet::new(self.server.wakers(queues.len())?);
        for (index, queue) in queues.iter_mut().enumerate() {
            queue.join(&set, index);
        }
        let count = queues.len();
        let Some(first) = queues.first_mut() else { return Ok(()) };
        first.serve_control_recorded(refs, self.server.stages(), &session.record)?;
        let staged: Vec<_> = (0..count).map(|index| first.staged_before(index)).collect();
        for (queue, list) in queues.iter_mut().zip(staged) {
            queue.restage(&list)?;
        }
        Ok(())
    }

    fn start(
        &mut self,
        context: &BackendContext,
        features: Features,
        queues: Vec<Queue<P, S::Buf, S::Record>>,
    ) -> Result<(), Fault> {
        self.server.begin(&SessionConfig { queues: queues.len(), features })?;
        let device = format!("vif-{}-{}", context.addr.front, context.addr.index);
        for (index, queue) in queues.into_iter().enumerate() {
            let name = if index == 0 { device.clone() } else { format!("{device}-q{index}") };
            let running = self.server.start(index, &name, queue)?;
            self.running.push(running);
        }
        Ok(())
    }
}

/// Returns what attaches a port. The hotplug script runs once per device: it does not run again for
/// a session taken over from an earlier process.
fn attach_by(
    xs: &mut dyn Xenstore,
    context: &BackendContext,
    vif: &ToolstackBack,
) -> Result<Attach, HandshakeError> {
    let scripts = context.hotplug_mode == HotplugMode::Scripts && vif.script.is_some();
    let by_script =
        scripts && !context.resumed && read_hotplug(xs, &context.back)? != Some(Hotplug::Connected);
    Ok(if by_script { Attach::ByScript } else { Attach::Here })
}

/// Returns what the frontend requested and the resulting features. The offer is the one in
/// xenstore, which an earlier process may have written.
fn request(
    xs: &mut dyn Xenstore,
    context: &BackendContext,
) -> Result<(FrontRequest, Negotiated), HandshakeError> {
    let offer = BackOffer::read(xs, &context.back)?;
    let request = FrontRequest::read(xs, &context.front, &offer)?;
    let negotiated = Negotiated::new(&offer, &request);
    Ok((request, negotiated))
}

/// Returns the negotiated features that a queue needs.
fn features(negotiated: &Negotiated) -> Features {
    let (to_front, to_back) = (&negotiated.to_front, &negotiated.to_back);
    Features {
        sg: to_front.sg,
        checksum_v4: to_front.csum_v4,
        checksum_v6: to_front.csum_v6,
        gso_v4: to_front.gso_v4,
        gso_v6: to_front.gso_v6,
        gso_prefix_v4: negotiated.gso_prefix_v4,
        gso_prefix_v6: negotiated.gso_prefix_v6,
        sends_gso_v4: to_back.gso_v4,
        sends_gso_v6: to_back.gso_v6,
        names_groups: true,
        rx_notify: negotiated.rx_notify,
    }
}

fn refs(keys: &QueueKeys) -> QueueRefs {
    QueueRefs {
        tx_ring: GrantRef(keys.tx_ring_ref),
        rx_ring: GrantRef(keys.rx_ring_ref),
        events: match keys.events {
            Events::Shared(port) => EventPorts::Shared(Port(port)),
            Events::Split { tx, rx } => EventPorts::Split { tx: Port(tx), rx: Port(rx) },
        },
    }
}

impl From<AttachError> for Fault {
    fn from(error: AttachError) -> Self {
        Self::of(error.code(), &error)
    }
}

impl<P: BackendPlatform, S: VifServer<P>> fmt::Debug for Vif<P, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let running = self.running.len();
        f.debug_struct("Vif").field("running", &running).finish_non_exhaustive()
    }
}

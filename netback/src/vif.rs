//! The device: the backend of a virtual NIC, from the toolstack's configuration to a running queue.

mod serve;

use crate::session::{Begin, SessionSpec};
use crate::stats::Stats;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::task::Poll;
use pvio_xenbus::Xenstore;
use pvio_xenbus::driver::{BackendClass, BackendContext, Fault, HotplugMode, Prepared, hotplug};
use pvio_xenbus::handshake::HandshakeError;
use pvio_xenbus::handshake::common::{DeviceAddr, Hotplug, read_hotplug, write_hotplug};
use pvio_xenbus::handshake::vif::{
    BackOffer, FrontRequest, MAX_QUEUES, Negotiated, ToolstackBack, multicast_request_path,
    read_multicast_request, read_rate, read_xdp_headroom, write_carrier,
};
pub use serve::VifServer;

/// What attaches the host's interface of a vif to a network.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Attach {
    /// The backend: it adds the interface to the bridge and brings it up, under its final name.
    Here,
    /// The toolstack's hotplug script, which expects an interface `vif<domain>.<handle>` that is
    /// down, and may rename it.
    ByScript,
}

/// Backend of a virtual NIC, driven by [`pvio_xenbus::driver::BackendDriver`]. It handles xenstore
/// and the toolstack; its server has access to the guest.
pub struct Vif<S: VifServer> {
    server: S,
    /// Whether the port exists.
    opened: bool,
    /// What attaches the port; `None` until it is known.
    attach: Option<Attach>,
    session: Option<S::Session>,
    /// Negotiated features of the session.
    negotiated: Option<Negotiated>,
    /// Device whose session has an in-flight record.
    recorded: Option<DeviceAddr>,
}

impl<S: VifServer> Vif<S> {
    /// Returns a vif without a port and without a session.
    #[must_use]
    pub fn new(server: S) -> Self {
        Self {
            server,
            opened: false,
            attach: None,
            session: None,
            negotiated: None,
            recorded: None,
        }
    }

    /// Returns the counters of each possible queue, over all sessions.
    #[must_use]
    pub fn stats(&self) -> &[Arc<Stats>] {
        self.server.stats()
    }

    /// Returns the negotiated features of the session; `None` without a session.
    #[must_use]
    pub fn negotiated(&self) -> Option<&Negotiated> {
        self.negotiated.as_ref()
    }

    /// Returns the server, which opens the port and runs the sessions.
    #[must_use]
    pub fn server(&self) -> &S {
        &self.server
    }

    /// Returns the server and the session, for a server without threads.
    pub fn session(&mut self) -> (&mut S, Option<&mut S::Session>) {
        (&mut self.server, self.session.as_mut())
    }
}

fn queues_offered(server: &impl VifServer) -> u32 {
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

impl<S: VifServer> BackendClass for Vif<S> {
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
        self.server.end(context.addr);
    }

    fn resumable(&mut self, xs: &mut dyn Xenstore, context: &BackendContext) -> Result<(), Fault> {
        let (request, negotiated) = request(xs, context)?;
        self.server.expect_queues(request.queues.len());
        let policy = self.server.policy();
        let spec = SessionSpec::new(context.addr, &request, &negotiated, policy);
        let found = self.server.resumable(&spec);
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
        if self.negotiated.is_none() {
            self.begin(xs, context)?;
        }
        let Self { server, session, .. } = self;
        session.as_mut().map_or(Ok(Poll::Pending), |session| server.ready(session))
    }

    fn describe(
        &self,
        xs: &mut dyn Xenstore,
        context: &BackendContext,
    ) -> Result<(), HandshakeError> {
        write_carrier(xs, &context.back, true)
    }

    fn refresh(&mut self, xs: &mut dyn Xenstore, context: &BackendContext) -> Result<(), Fault> {
        let rate = read_rate(xs, &context.back)?;
        if let Some(session) = &mut self.session {
            self.server.set_rate(session, rate);
        }
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
            let chosen = read_multicast_request(xs, &context.front)?;
            if let Some(session) = &mut self.session {
                self.server.filter_groups(session, chosen);
            }
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
        if let Some(session) = &mut self.session {
            self.server.set_headroom(session, u16::try_from(bytes).unwrap_or(u16::MAX));
        }
        Ok(())
    }

    fn disconnect(&mut self) -> Poll<()> {
        let Self { server, session, .. } = self;
        if session.as_mut().is_some_and(|session| server.stop(session).is_pending()) {
            return Poll::Pending;
        }
        (self.session, self.negotiated) = (None, None);
        if let Some(device) = self.recorded.take() {
            self.server.end(device);
        }
        Poll::Ready(())
    }

    fn leave(&mut self) -> Poll<()> {
        let Self { server, session, .. } = self;
        if session.as_mut().is_some_and(|session| server.leave(session).is_pending()) {
            return Poll::Pending;
        }
        (self.session, self.negotiated) = (None, None);
        Poll::Ready(())
    }

    fn release(&mut self) -> Poll<()> {
        self.server.close()
    }

    fn fault(&mut self) -> Option<Fault> {
        let Self { server, session, .. } = self;
        session.as_mut().and_then(|session| server.fault(session))
    }
}

impl<S: VifServer> Vif<S> {
    /// Starts a session with the features and queues that the frontend requested.
    fn begin(&mut self, xs: &mut dyn Xenstore, context: &BackendContext) -> Result<(), Fault> {
        let (request, negotiated) = request(xs, context)?;
        let policy = self.server.policy();
        let mut spec = SessionSpec::new(context.addr, &request, &negotiated, policy);
        spec.rate = read_rate(xs, &context.back)?;
        let begin = if context.resumed { Begin::Resumed } else { Begin::New };
        self.session = Some(self.server.start(&spec, begin)?);
        (self.negotiated, self.recorded) = (Some(negotiated), Some(context.addr));
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

impl<S: VifServer> fmt::Debug for Vif<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vif").field("negotiated", &self.negotiated).finish_non_exhaustive()
    }
}

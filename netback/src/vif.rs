//! The device: a virtual NIC's backend end, from the toolstack's words to a served queue.

use crate::Platform;
use crate::fault::AttachError;
use crate::port::PacketBuf;
use crate::queue::{EventPorts, Features, Queue, QueueRefs};
use crate::stats::Stats;
use alloc::format;
use alloc::string::ToString;
use alloc::sync::Arc;
use core::fmt;
use pvio_event_channel::Port;
use pvio_grant_table::GrantRef;
use pvio_xenbus::Xenstore;
use pvio_xenbus::driver::{BackendClass, Ends, Fault, Prepared, Surroundings, hotplug};
use pvio_xenbus::handshake::HandshakeError;
use pvio_xenbus::handshake::common::{Hotplug, write_hotplug};
use pvio_xenbus::handshake::vif::{
    BackOffer, EventChannels as Events, FrontRequest, Negotiated, Queue as QueueKeys, ToolstackBack,
};

/// Who attaches the host's end of a vif to what it leads to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Attach {
    /// The server: it joins the bridge and brings the interface up, under its final name.
    Here,
    /// The toolstack's hotplug script, which expects an interface `vif<domain>.<handle>` that is
    /// down, and may rename it.
    ByScript,
}

/// Opens ports and runs queues: taps and threads, or whatever the platform has.
pub trait Serve<P: Platform> {
    /// Memory of the ports.
    type Buf: PacketBuf;
    /// A queue that is being served. Dropping it stops that and lets go of everything.
    type Running;

    /// Makes what the vif's packets go to. Done once; it lives as long as the device, so that
    /// what is attached to it stays across reconnections of the guest.
    ///
    /// # Errors
    /// A [`Fault`] that tells the operator what to do.
    fn open(&mut self, vif: &ToolstackBack, attach: Attach) -> Result<(), Fault>;

    /// Begins to serve a queue.
    ///
    /// # Errors
    /// A [`Fault`] when the system has not what that takes.
    fn start(&mut self, name: &str, queue: Queue<P, Self::Buf>) -> Result<Self::Running, Fault>;

    /// No guest is there any more; what [`start`](Self::start) gave is dropped already.
    fn stopped(&mut self);

    /// Why a queue ended by itself, if it did; told once.
    fn fault(&mut self, running: &mut Self::Running) -> Option<Fault>;
}

/// A virtual NIC's backend, to be driven by [`pvio_xenbus::driver::BackendDriver`].
pub struct Vif<P: Platform, S: Serve<P>> {
    platform: P,
    server: S,
    /// The port is there already.
    opened: bool,
    running: Option<S::Running>,
    negotiated: Option<Negotiated>,
    stats: Arc<Stats>,
}

impl<P: Platform, S: Serve<P>> Vif<P, S> {
    /// A vif that nobody has asked for yet.
    #[must_use]
    pub fn new(platform: P, server: S) -> Self {
        Self {
            platform,
            server,
            opened: false,
            running: None,
            negotiated: None,
            stats: Arc::default(),
        }
    }

    /// What it has done, over all its sessions.
    #[must_use]
    pub fn stats(&self) -> &Arc<Stats> {
        &self.stats
    }

    /// What this session may use; `None` when there is none.
    #[must_use]
    pub fn negotiated(&self) -> Option<&Negotiated> {
        self.negotiated.as_ref()
    }

    /// How queues are served.
    #[must_use]
    pub fn server(&self) -> &S {
        &self.server
    }

    /// The queue that is served, for a server that has no thread of its own.
    pub fn running(&mut self) -> Option<(&mut S, &mut S::Running)> {
        Some((&mut self.server, self.running.as_mut()?))
    }
}

/// What this backend can do.
fn features_offered() -> BackOffer {
    BackOffer {
        max_queues: Some(1),
        rx_copy: true,
        sg: true,
        ipv6_csum_offload: true,
        split_event_channels: true,
        ..BackOffer::default()
    }
}

impl<P: Platform + Clone, S: Serve<P>> BackendClass for Vif<P, S> {
    fn prepare(&mut self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<Prepared, Fault> {
        let vif = ToolstackBack::read(xs, &ends.back)?;
        let scripts = ends.surroundings == Surroundings::Scripts;
        if scripts && vif.script.is_some() {
            // The script attaches it: it must be there, and nothing more.
            if !core::mem::replace(&mut self.opened, true) {
                self.server.open(&vif, Attach::ByScript)?;
            }
            return hotplug(xs, ends, vif.script.as_deref());
        }
        let opened = self.server.open(&vif, Attach::Here);
        let status = match &opened {
            Ok(()) => Hotplug::Connected,
            Err(fault) => Hotplug::Failed(fault.to_string().into()),
        };
        // Whoever makes what the packets go to says so; toolstacks wait for it.
        write_hotplug(xs, &ends.back, &status)?;
        opened.map(|()| Prepared::Yes)
    }

    fn offer(&self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<(), HandshakeError> {
        features_offered().write(xs, &ends.back)
    }

    fn connect(&mut self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<(), Fault> {
        let offer = features_offered();
        let request = FrontRequest::read(xs, &ends.front, &offer)?;
        let [keys] = request.queues.as_slice() else {
            return Err(Fault::new("queue-count", "the frontend asks for more than one queue"));
        };
        let negotiated = Negotiated::new(&offer, &request);
        let (peer, features, refs) = (ends.addr.front, features(&negotiated), refs(keys));
        let stats = Arc::clone(&self.stats);
        let queue = Queue::attach(self.platform.clone(), peer, &refs, features, stats)?;
        let name = format!("vif-{}-{}", peer, ends.addr.index);
        self.running = Some(self.server.start(&name, queue)?);
        self.negotiated = Some(negotiated);
        Ok(())
    }

    fn describe(&self, _xs: &mut dyn Xenstore, _ends: &Ends) -> Result<(), HandshakeError> {
        Ok(())
    }

    fn disconnect(&mut self) {
        self.negotiated = None;
        if self.running.take().is_some() {
            self.server.stopped();
        }
    }

    fn fault(&mut self) -> Option<Fault> {
        self.server.fault(self.running.as_mut()?)
    }
}

/// The part of what was negotiated that a queue goes by.
fn features(negotiated: &Negotiated) -> Features {
    let (to_front, to_back) = (&negotiated.to_front, &negotiated.to_back);
    Features {
        sg: to_front.sg,
        checksum_v4: to_front.csum_v4,
        checksum_v6: to_front.csum_v6,
        gso_v4: to_front.gso_v4 && to_back.gso_v4,
        gso_v6: to_front.gso_v6 && to_back.gso_v6,
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
        Self::new(error.code(), error)
    }
}

impl<P: Platform, S: Serve<P>> fmt::Debug for Vif<P, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let running = self.running.is_some();
        f.debug_struct("Vif").field("running", &running).finish_non_exhaustive()
    }
}

//! The device: what xenstore says of a vif, made into a tap and a worker.
//!
//! The tap lives from the first offer until the device is gone, so that what the host attached to
//! it stays across reconnections of the guest; its carrier says whether a guest is there.
#![forbid(unsafe_code)]

use crate::Platform;
use crate::fault::AttachError;
use crate::port::tap::{Tap, TapConfig, TapError};
use crate::queue::{EventPorts, Features, Queue, QueueRefs};
use crate::stats::Stats;
use crate::worker::{Worker, WorkerError};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use core::fmt;
use core::net::Ipv4Addr;
use pvio_event_channel::Port;
use pvio_grant_table::{DomId, GrantRef};
use pvio_xenbus::Xenstore;
use pvio_xenbus::driver::{BackendClass, Ends, Fault};
use pvio_xenbus::handshake::HandshakeError;
use pvio_xenbus::handshake::common::{Hotplug, write_hotplug};
use pvio_xenbus::handshake::vif::{
    BackOffer, EventChannels as Events, FrontRequest, Negotiated, ToolstackBack,
};
use std::os::fd::AsFd;

/// What the driver domain adds to what the toolstack says.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct VifOptions {
    /// The tap's name, if the toolstack gives none; else `vif<domain>.<handle>`, as Linux has it.
    pub name: Option<String>,
    /// The bridge to join, if the toolstack names none.
    pub bridge: Option<String>,
    /// An address of the driver domain on this link, and its prefix length.
    pub address: Option<(Ipv4Addr, u8)>,
}

/// The backend of one network interface.
pub struct Vif<P> {
    platform: P,
    options: VifOptions,
    /// Called by a worker that ended by itself.
    ended: Arc<dyn Fn() + Send + Sync>,
    tap: Option<Tap>,
    worker: Option<Worker>,
    stats: Arc<Stats>,
}

impl<P> Vif<P> {
    /// A vif that nobody has asked for yet. `ended` is called, by another thread, when there is a
    /// fault to be asked for: have the driver step then.
    #[must_use]
    pub fn new(platform: P, options: VifOptions, ended: impl Fn() + Send + Sync + 'static) -> Self {
        let ended = Arc::new(ended);
        Self { platform, options, ended, tap: None, worker: None, stats: Arc::default() }
    }

    /// The vif's counters, which go on across reconnections.
    #[must_use]
    pub fn stats(&self) -> &Arc<Stats> {
        &self.stats
    }

    /// The tap's name, once there is one.
    #[must_use]
    pub fn tap_name(&self) -> Option<&str> {
        self.tap.as_ref().map(Tap::name)
    }

    /// Whether a guest is served.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.worker.is_some()
    }

    fn carrier(&self, on: bool) {
        if let Some(tap) = &self.tap
            && let Err(error) = tap.set_carrier(on)
        {
            // Older kernels cannot; the host then believes that somebody is always there.
            tracing::debug!(tap = tap.name(), %error, "carrier not set");
        }
    }

    fn tap_config(&self, toolstack: &ToolstackBack) -> TapConfig {
        let name = toolstack.vifname.clone().or_else(|| self.options.name.clone());
        let name =
            name.unwrap_or_else(|| format!("vif{}.{}", toolstack.frontend_id, toolstack.handle));
        let mut config = TapConfig::new(name);
        config.mtu = toolstack.mtu.unwrap_or(config.mtu);
        config.bridge = toolstack.bridge.clone().or_else(|| self.options.bridge.clone());
        config.address = self.options.address;
        config
    }
}

/// What this backend can do.
fn offer() -> BackOffer {
    BackOffer {
        max_queues: Some(1),
        rx_copy: true,
        sg: true,
        ipv6_csum_offload: true,
        split_event_channels: true,
        ..BackOffer::default()
    }
}

impl<P> BackendClass for Vif<P>
where
    P: Platform + Clone + Send + 'static,
    P::Channel: AsFd,
{
    fn prepare(&mut self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<(), Fault> {
        let toolstack = ToolstackBack::read(xs, &ends.back)?;
        match Tap::create(&self.tap_config(&toolstack)) {
            Ok(tap) => self.tap = Some(tap),
            Err(error) => {
                write_hotplug(xs, &ends.back, &Hotplug::Failed(error.to_string().into()))?;
                return Err(error.into());
            }
        }
        self.carrier(false);
        Ok(write_hotplug(xs, &ends.back, &Hotplug::Connected)?)
    }

    fn offer(&self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<(), HandshakeError> {
        offer().write(xs, &ends.back)
    }

    fn connect(&mut self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<(), Fault> {
        let offer = offer();
        let request = FrontRequest::read(xs, &ends.front, &offer)?;
        let features = features(&Negotiated::new(&offer, &request));
        let no_tap = || Fault::new("vif-no-tap", "there is no tap to connect to");
        let tap = self.tap.as_ref().ok_or_else(no_tap)?.try_clone()?;
        let no_queue = || Fault::new("vif-no-queue", "the frontend set up no queue");
        let refs = refs(request.queues.first().ok_or_else(no_queue)?);
        let peer: DomId = ends.addr.front;
        let stats = Arc::clone(&self.stats);
        let queue = Queue::attach(self.platform.clone(), peer, &refs, features, stats)?;
        let ended = Arc::clone(&self.ended);
        let name = format!("{}-q0", tap.name());
        let worker = Worker::start(&name, queue, tap, move || ended());
        self.worker = Some(worker.map_err(|e| Fault::new("vif-worker", e))?);
        self.carrier(true);
        Ok(())
    }

    fn describe(&self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<(), HandshakeError> {
        write_hotplug(xs, &ends.back, &Hotplug::Connected)
    }

    fn disconnect(&mut self) {
        self.carrier(false);
        self.worker = None;
    }

    fn fault(&mut self) -> Option<Fault> {
        let error = self.worker.as_ref()?.error()?;
        Some(error.into())
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

fn refs(queue: &pvio_xenbus::handshake::vif::Queue) -> QueueRefs {
    QueueRefs {
        tx_ring: GrantRef(queue.tx_ring_ref),
        rx_ring: GrantRef(queue.rx_ring_ref),
        events: match queue.events {
            Events::Shared(port) => EventPorts::Shared(Port(port)),
            Events::Split { tx, rx } => EventPorts::Split { tx: Port(tx), rx: Port(rx) },
        },
    }
}

impl From<TapError> for Fault {
    fn from(error: TapError) -> Self {
        Self::new(error.code(), error)
    }
}

impl From<AttachError> for Fault {
    fn from(error: AttachError) -> Self {
        Self::new(error.code(), error)
    }
}

impl From<WorkerError> for Fault {
    fn from(error: WorkerError) -> Self {
        Self::new(error.code(), error)
    }
}

impl<P> fmt::Debug for Vif<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vif").field("tap", &self.tap).field("worker", &self.worker).finish()
    }
}

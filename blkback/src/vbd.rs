//! The device: a virtual disk's backend end, from the toolstack's words to served queues.

use crate::engine::Geometry;
use crate::path::{DataPath, Policy};
use crate::queue::{QueueFault, QueueParts};
use crate::stats::Stats;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use pvio_event_channel::{EventChannel, EventChannels, Port};
use pvio_grant_table::{Access, GrantCopier, GrantMapper, GrantRef};
use pvio_ring::BackRing;
use pvio_ring::proto::blkif::Abi;
use pvio_xenbus::Xenstore;
use pvio_xenbus::driver::{BackendClass, Ends, Fault, Prepared, hotplug};
use pvio_xenbus::handshake::HandshakeError;
use pvio_xenbus::handshake::vbd::{
    BackDisk, BackOffer, Discard, DiskInfo, FrontRequest, Mode, Negotiated, Protocol, ToolstackBack,
};

/// What a vbd needs of the platform it runs on.
pub trait Platform: GrantMapper + GrantCopier + EventChannels + Clone {}
impl<P: GrantMapper + GrantCopier + EventChannels + Clone> Platform for P {}

/// What is decided for a disk beyond what the toolstack says of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Config {
    /// How its data reaches the guest.
    pub policy: Policy,
}

/// Opens disks and runs queues: threads, or whatever the platform has.
pub trait Serve<P: Platform> {
    /// A queue that is being served. Dropping it finishes what is under way and lets go of
    /// everything.
    type Running;

    /// Opens what backs the disk.
    ///
    /// # Errors
    /// A [`Fault`] that tells the operator what to do.
    fn open(&mut self, disk: &ToolstackBack) -> Result<Geometry, Fault>;

    /// Begins to serve a queue from it.
    ///
    /// # Errors
    /// A [`Fault`] when the system has not what that takes.
    fn start(
        &mut self,
        name: &str,
        parts: QueueParts<P, P::Channel>,
    ) -> Result<Self::Running, Fault>;

    /// Why a queue ended by itself, if it did.
    fn fault(&mut self, running: &mut Self::Running) -> Option<QueueFault>;
}

/// A virtual disk's backend, to be driven by [`pvio_xenbus::driver::BackendDriver`].
#[derive(Debug)]
pub struct Vbd<P: Platform, S: Serve<P>> {
    platform: P,
    server: S,
    config: Config,
    geometry: Option<Geometry>,
    removable: bool,
    running: Option<S::Running>,
    negotiated: Option<Negotiated>,
    stats: Arc<Stats>,
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
            config,
            geometry: None,
            removable: false,
            running: None,
            negotiated: None,
            stats: Arc::default(),
        }
    }

    /// What it has done, over all its sessions.
    pub fn stats(&self) -> &Arc<Stats> {
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

    fn features(&self) -> BackOffer {
        let discard = self.geometry.and_then(|g| g.discard).map(|d| Discard {
            granularity: Some(d.granularity),
            alignment: Some(d.alignment),
            secure: false,
        });
        BackOffer {
            flush: true,
            barrier: true,
            discard,
            persistent: self.config.policy.offers_persistent(),
            ..BackOffer::default()
        }
    }
}

impl<P: Platform, S: Serve<P>> BackendClass for Vbd<P, S> {
    fn prepare(&mut self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<Prepared, Fault> {
        let disk = ToolstackBack::read(xs, &ends.back)?;
        if hotplug(xs, ends, disk.script.as_deref())? == Prepared::AwaitsScript {
            return Ok(Prepared::AwaitsScript);
        }
        let mut geometry = self.server.open(&disk)?;
        if disk.mode == Mode::ReadOnly {
            geometry.read_only = true;
        }
        if !disk.discard_enable || geometry.read_only {
            geometry.discard = None;
        }
        self.removable = disk.removable;
        self.geometry = Some(geometry);
        Ok(Prepared::Yes)
    }

    fn offer(&self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<(), HandshakeError> {
        self.features().write(xs, &ends.back)
    }

    fn connect(&mut self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<(), Fault> {
        let offer = self.features();
        let request = FrontRequest::read(xs, &ends.front, &offer)?;
        let [queue] = request.queues.as_slice() else {
            return Err(Fault::new("queue-count", "the frontend asks for more than one queue"));
        };
        let front = ends.addr.front;
        let grefs: alloc::vec::Vec<GrantRef> =
            queue.ring_refs.iter().copied().map(GrantRef).collect();
        let abi = match request.protocol {
            Some(Protocol::X86_32) => Abi::X86_32,
            // Without the key a frontend has our own layout, as QEMU, NetBSD and tapback take it.
            None | Some(Protocol::X86_64 | Protocol::Arm) => Abi::X86_64,
        };
        let mapped = self.platform.map(front, &grefs, Access::ReadWrite).map_err(|status| {
            Fault::new(
                status.code(),
                format!("the ring page (grant {grefs:?}) cannot be mapped: {status}"),
            )
        })?;
        let ring = BackRing::attach(mapped, abi.slot_size())
            .map_err(|fault| Fault::new(fault.reason(), fault))?;
        let channel =
            self.platform.bind_interdomain(front, Port(queue.event_channel)).map_err(|e| {
                Fault::new(
                    e.code(),
                    format!("event channel {} cannot be bound: {e}", queue.event_channel),
                )
            })?;
        if ends.resumed {
            // The last answers may have been published by one who died before telling.
            channel.notify().map_err(|e| Fault::new(e.code(), e))?;
        }
        let agreed = Negotiated::new(&offer, &request);
        let parts = QueueParts {
            frontend: front,
            grants: self.platform.clone(),
            data_path: self.config.policy.path(agreed.persistent),
            ring,
            channel,
            abi,
            stats: Arc::clone(&self.stats),
        };
        let name: String = format!("vbd-{}-{}", front, ends.addr.index);
        #[cfg(feature = "std")]
        tracing::info!(disk = name, data_path = parts.data_path.as_str(), ?agreed, "connected");
        self.running = Some(self.server.start(&name, parts)?);
        self.negotiated = Some(agreed);
        Ok(())
    }

    fn describe(&self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<(), HandshakeError> {
        let Some(geometry) = self.geometry else {
            return Err(HandshakeError::Unwritable("a disk that was never opened"));
        };
        let info =
            DiskInfo { cdrom: false, removable: self.removable, read_only: geometry.read_only };
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
        self.running = None;
        self.negotiated = None;
    }

    fn fault(&mut self) -> Option<Fault> {
        let fault = self.server.fault(self.running.as_mut()?)?;
        Some(Fault::new(fault.code(), fault))
    }
}

//! The device: a virtual NIC's frontend end, from the toolstack's words to a usable queue.

use crate::fault::SetupError;
use crate::queue::{Features, Queue};
use alloc::vec::Vec;
use core::fmt;
use pvio_event_channel::{EventChannel, EventChannels};
use pvio_grant_table::Granter;
use pvio_xenbus::Xenstore;
use pvio_xenbus::driver::{Ends, Fault, FrontendClass};
use pvio_xenbus::handshake::HandshakeError;
use pvio_xenbus::handshake::vif::{
    BackOffer, EventChannels as Events, FrontRequest, Mac, Negotiated, Queue as QueueKeys,
    ToolstackFront,
};

/// The MTU of an interface whose toolstack names none, in bytes (`netif.h`).
pub(crate) const DEFAULT_MTU: u32 = 1500;

/// How many earlier sessions' queues may wait for the backend to let go of them. One is the rule
/// when a backend is restarted; a backend that starts over and over and unmaps nothing would take
/// all of the guest's memory.
const MAX_OLD: usize = 2;

/// A virtual NIC's frontend, to be driven by [`pvio_xenbus::driver::FrontendDriver`].
pub struct Nic<P: Granter + EventChannels + Clone> {
    platform: P,
    queue: Option<Queue<P>>,
    /// Whether the queue may be used.
    connected: bool,
    mac: Option<Mac>,
    mtu: u32,
    /// Queues of earlier sessions that the backend still had mapped.
    old: Vec<Queue<P>>,
    sessions: u32,
    /// Whether TCP may come unsegmented.
    takes_gso: bool,
}

impl<P: Granter + EventChannels + Clone> Nic<P> {
    /// A NIC that is not attached yet.
    #[must_use]
    pub fn new(platform: P) -> Self {
        let (queue, mac, old) = (None, None, Vec::new());
        let (mtu, sessions) = (DEFAULT_MTU, 0);
        Self { platform, queue, connected: false, mac, mtu, old, sessions, takes_gso: false }
    }

    /// The same NIC, which also takes TCP that is not segmented yet: fewer and larger packets, up
    /// to 64 KiB. Whoever passes them on has to [segment](Queue::receive_with_gso) them.
    #[must_use]
    pub fn taking_gso(mut self) -> Self {
        self.takes_gso = true;
        self
    }

    /// The queue, while the NIC is connected. Another one after the backend was restarted: what
    /// was in flight then is lost, as on any network.
    pub fn queue(&mut self) -> Option<&mut Queue<P>> {
        self.queue.as_mut().filter(|_| self.connected)
    }

    /// The queue of this session or of the last one.
    #[cfg(feature = "smoltcp")]
    pub(crate) fn any_queue(&self) -> Option<&Queue<P>> {
        self.queue.as_ref()
    }

    /// The guest's address. Known once the backend has made its offer.
    #[must_use]
    pub fn mac(&self) -> Option<Mac> {
        self.mac
    }

    /// Bytes of the largest packet, without the Ethernet header.
    #[must_use]
    pub fn mtu(&self) -> u32 {
        self.mtu
    }

    /// Whether packets can be sent now.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.connected
    }

    /// How often it was connected: more than once after the backend was restarted.
    #[must_use]
    pub fn sessions(&self) -> u32 {
        self.sessions
    }

    /// What is asked of the backend with this queue.
    fn wanted(&self, queue: &Queue<P>) -> FrontRequest {
        let keys = QueueKeys {
            tx_ring_ref: queue.tx_gref().0,
            rx_ring_ref: queue.rx_gref().0,
            events: Events::Shared(queue.channel().port().0),
        };
        FrontRequest {
            queues: Vec::from([keys]),
            rx_notify: true,
            sg: true,
            ipv6_csum_offload: true,
            gso_tcpv4: self.takes_gso,
            gso_tcpv6: self.takes_gso,
            ..FrontRequest::default()
        }
    }
}

impl<P: Granter + EventChannels + Clone> FrontendClass for Nic<P> {
    fn prepare(&mut self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<(), Fault> {
        let toolstack = ToolstackFront::read(xs, &ends.front)?;
        self.mac = Some(toolstack.mac);
        self.mtu = toolstack.mtu.unwrap_or(DEFAULT_MTU);
        self.release();
        if self.old.len() >= MAX_OLD {
            let text =
                "the backend starts over and over, and keeps the rings of earlier sessions mapped";
            return Err(Fault::new("front-rings-kept", text));
        }
        if let Some(last) = self.queue.take() {
            self.old.extend(last.dismantle().err());
        }
        let offer = BackOffer::read(xs, &ends.back)?;
        let queue = Queue::new(&self.platform, toolstack.backend_id);
        let mut queue = queue.map_err(|error: SetupError| Fault::new("front-setup", error))?;
        let agreed = Negotiated::new(&offer, &self.wanted(&queue));
        queue.set_features(Features {
            sg: agreed.to_back.sg,
            checksum_v4: agreed.to_back.csum_v4,
            checksum_v6: agreed.to_back.csum_v6,
            gso_v4: agreed.to_back.gso_v4,
            gso_v6: agreed.to_back.gso_v6,
            takes_gso_v4: agreed.to_front.gso_v4,
            takes_gso_v6: agreed.to_front.gso_v6,
        });
        #[cfg(feature = "smoltcp")]
        queue.set_mtu(self.mtu);
        self.queue = Some(queue);
        Ok(())
    }

    fn request(&self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<(), HandshakeError> {
        let no_rings = HandshakeError::Unwritable("rings that were never made");
        let queue = self.queue.as_ref().ok_or(no_rings)?;
        self.wanted(queue).write(xs, &ends.front)
    }

    fn connect(&mut self, _xs: &mut dyn Xenstore, _ends: &Ends) -> Result<(), Fault> {
        if !core::mem::replace(&mut self.connected, true) {
            self.sessions = self.sessions.saturating_add(1);
            if let Some(queue) = &mut self.queue {
                queue.publish().map_err(|fault| Fault::new(fault.code(), fault))?;
            }
        }
        Ok(())
    }

    fn disconnect(&mut self) {
        self.connected = false;
    }

    fn release(&mut self) {
        if !self.connected {
            let still = core::mem::take(&mut self.old);
            self.old.extend(still.into_iter().filter_map(|queue| queue.dismantle().err()));
        }
    }
}

impl<P: Granter + EventChannels + Clone> fmt::Debug for Nic<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nic")
            .field("connected", &self.connected)
            .field("mac", &self.mac)
            .field("queue", &self.queue)
            .finish_non_exhaustive()
    }
}

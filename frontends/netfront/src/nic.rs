//! The device: a virtual NIC's frontend end, from the toolstack's words to a usable queue.

use crate::control::Control;
use crate::fault::{BackendFault, SetupError};
use crate::queue::{Features, Queue};
use crate::session::Session;
use alloc::vec::Vec;
use core::fmt;
use pvio_event_channel::{EventChannel, EventChannels};
use pvio_grant_table::{DomId, Granter};
use pvio_xenbus::Xenstore;
use pvio_xenbus::driver::{Ends, Fault, FrontendClass};
use pvio_xenbus::handshake::HandshakeError;
use pvio_xenbus::handshake::vif::{
    BackOffer, ControlRing, EventChannels as Events, FrontLimits, FrontRequest, Mac, Negotiated,
    Queue as QueueKeys, ToolstackFront,
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
    session: Option<Session<P>>,
    /// Whether the queues may be used.
    connected: bool,
    mac: Option<Mac>,
    mtu: u32,
    /// What earlier sessions left that the backend still had mapped.
    old: Vec<Session<P>>,
    sessions: u32,
    /// Whether TCP may come unsegmented.
    takes_gso: bool,
    /// Queues at most.
    max_queues: u32,
    /// An event channel for each ring, where the backend takes that.
    splits: bool,
    /// Whether the backend is asked to keep pages mapped.
    stages: bool,
}

impl<P: Granter + EventChannels + Clone> Nic<P> {
    /// A NIC that is not attached yet.
    #[must_use]
    pub fn new(platform: P) -> Self {
        Self {
            platform,
            session: None,
            connected: false,
            mac: None,
            mtu: DEFAULT_MTU,
            old: Vec::new(),
            sessions: 0,
            takes_gso: false,
            max_queues: 1,
            splits: false,
            stages: true,
        }
    }

    /// The same NIC with as many [queues](Self::queues) as the backend offers, `most` at most: one for
    /// each processor of the guest's, say. Packets come on all of them.
    #[must_use]
    pub fn with_queues(mut self, most: u32) -> Self {
        self.max_queues = most.max(1);
        self
    }

    /// The same NIC with an event channel for each ring, where the backend takes that.
    #[must_use]
    pub fn splitting_channels(mut self) -> Self {
        self.splits = true;
        self
    }

    /// The same NIC, which does not ask the backend to keep its pages mapped (staging grants).
    #[must_use]
    pub fn without_staging(mut self) -> Self {
        self.stages = false;
        self
    }

    /// The same NIC, which also takes TCP that is not segmented yet: fewer and larger packets, up
    /// to 64 KiB. Whoever passes them on has to [segment](Queue::receive_with_gso) them.
    #[must_use]
    pub fn taking_gso(mut self) -> Self {
        self.takes_gso = true;
        self
    }

    /// The first queue, while the NIC is connected. Another one after the backend was restarted: what
    /// was in flight then is lost, as on any network.
    pub fn queue(&mut self) -> Option<&mut Queue<P>> {
        self.queues().first_mut()
    }

    /// Every queue, while the NIC is connected: as [`queue`](Self::queue). What the backend broke on the
    /// control ring is found here, too: see [`fault`](Self::fault).
    pub fn queues(&mut self) -> &mut [Queue<P>] {
        match &mut self.session {
            Some(Session { queues, control }) if self.connected => {
                let broken = match control {
                    Some(control) if !control.is_done() => control.step(queues).is_err(),
                    Some(control) => control.fault().is_some(),
                    None => false,
                };
                if broken { &mut [] } else { queues }
            }
            _ => &mut [],
        }
    }

    /// What the backend did, if it broke the rules on any queue or on the control ring. Close the device
    /// then.
    #[must_use]
    pub fn fault(&self) -> Option<BackendFault> {
        let Session { queues, control } = self.session.as_ref()?;
        let control = control.as_ref().and_then(Control::fault);
        control.or_else(|| queues.iter().find_map(Queue::fault))
    }

    /// Pages that the backend keeps mapped, by its word.
    #[must_use]
    pub fn staged(&self) -> usize {
        let control = self.session.as_ref().and_then(|session| session.control.as_ref());
        control.map_or(0, Control::staged)
    }

    /// The first queue of this session or of the last one.
    #[cfg(feature = "smoltcp")]
    pub(crate) fn any_queue(&self) -> Option<&Queue<P>> {
        self.session.as_ref()?.queues.first()
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

    /// What is asked of the backend with these queues.
    fn wanted(&self, session: &Session<P>) -> FrontRequest {
        let events = |queue: &Queue<P>| {
            let tx = queue.channel().port().0;
            match queue.rx_channel() {
                Some(rx) => Events::Split { tx, rx: rx.port().0 },
                None => Events::Shared(tx),
            }
        };
        let keys = |queue: &Queue<P>| QueueKeys {
            tx_ring_ref: queue.tx_gref().0,
            rx_ring_ref: queue.rx_gref().0,
            events: events(queue),
        };
        let ctrl = session.control.as_ref().map(|control| ControlRing {
            ring_ref: control.ring_gref().0,
            event_channel: control.channel().port().0,
        });
        FrontRequest {
            queues: session.queues.iter().map(keys).collect(),
            ctrl,
            rx_notify: true,
            sg: true,
            ipv6_csum_offload: true,
            gso_tcpv4: self.takes_gso,
            gso_tcpv6: self.takes_gso,
            ..FrontRequest::default()
        }
    }

    /// Sets up what an offer has room for.
    fn set_up(&self, offer: &BackOffer, backend: DomId) -> Result<Session<P>, SetupError> {
        let count = offer.plan(FrontLimits { max_queues: self.max_queues });
        let split = self.splits && offer.split_event_channels;
        let queue = |_| Queue::with_channels(&self.platform, backend, split);
        let queues = (0..count).map(queue).collect::<Result<_, _>>()?;
        let control = (self.stages && offer.ctrl_ring)
            .then(|| Control::new(&self.platform, backend))
            .transpose()?;
        Ok(Session { queues, control })
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
        if let Some(last) = self.session.take() {
            self.old.extend(last.dismantle().err());
        }
        let offer = BackOffer::read(xs, &ends.back)?;
        let session = self.set_up(&offer, toolstack.backend_id);
        let mut session = session.map_err(|error| Fault::new("front-setup", error))?;
        let agreed = Negotiated::new(&offer, &self.wanted(&session));
        for queue in &mut session.queues {
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
        }
        self.session = Some(session);
        Ok(())
    }

    fn request(&self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<(), HandshakeError> {
        let no_rings = HandshakeError::Unwritable("rings that were never made");
        let session = self.session.as_ref().ok_or(no_rings)?;
        self.wanted(session).write(xs, &ends.front)
    }

    fn connect(&mut self, _xs: &mut dyn Xenstore, _ends: &Ends) -> Result<(), Fault> {
        if !core::mem::replace(&mut self.connected, true) {
            self.sessions = self.sessions.saturating_add(1);
            for queue in self.queues() {
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
            self.old.extend(still.into_iter().filter_map(|session| session.dismantle().err()));
        }
    }
}

impl<P: Granter + EventChannels + Clone> fmt::Debug for Nic<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nic")
            .field("connected", &self.connected)
            .field("mac", &self.mac)
            .field("queues", &self.session.as_ref().map(|session| &session.queues))
            .finish_non_exhaustive()
    }
}

//! The NIC as a device class of the driver: sessions, one after another.

use super::{MAX_OLD, Nic};
use crate::control::Control;
use crate::fault::SetupError;
use crate::packet::{DEFAULT_MTU, Features};
use crate::queue::Queue;
use crate::shared_rings::SharedRings;
use pvio_event_channel::{EventChannel, EventChannels};
use pvio_grant_table::{DomId, Granter};
use pvio_xenbus::Xenstore;
use pvio_xenbus::driver::{Fault, FrontendClass, FrontendContext};
use pvio_xenbus::handshake::HandshakeError;
use pvio_xenbus::handshake::vif::{
    BackOffer, ControlRing, EventChannels as Events, FrontLimits, FrontRequest, Negotiated,
    Queue as QueueKeys, ToolstackFront, read_carrier, write_multicast_request, write_xdp_headroom,
};

impl<P: Granter + EventChannels + Clone> FrontendClass for Nic<P> {
    fn prepare(&mut self, xs: &mut dyn Xenstore, context: &FrontendContext) -> Result<(), Fault> {
        let toolstack = ToolstackFront::read(xs, &context.front)?;
        self.mac = Some(toolstack.mac);
        self.mtu = toolstack.mtu.unwrap_or(DEFAULT_MTU);
        self.speed = toolstack.speed;
        self.release();
        if self.old.len() >= MAX_OLD {
            let text =
                "the backend restarts repeatedly without unmapping the rings of earlier sessions";
            return Err(Fault::new("front-rings-kept", text));
        }
        if let Some(last) = self.session.take() {
            self.old.extend(last.dismantle().err());
        }
        self.offer = BackOffer::read(xs, &context.back)?;
        self.begin();
        let session = self.set_up(&self.offer, toolstack.backend_id);
        let mut session = session.map_err(|error| Fault::of("front-setup", &error))?;
        let agreed = Negotiated::new(&self.offer, &self.wanted(&session));
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
        self.steer_queues();
        self.expect_headroom();
        Ok(())
    }

    fn is_outdated(&mut self, xs: &mut dyn Xenstore, context: &FrontendContext) -> bool {
        BackOffer::read(xs, &context.back).is_ok_and(|now| now != self.offer)
    }

    fn request(
        &self,
        xs: &mut dyn Xenstore,
        context: &FrontendContext,
    ) -> Result<(), HandshakeError> {
        let no_rings = HandshakeError::Unwritable("rings that were never made");
        let session = self.session.as_ref().ok_or(no_rings)?;
        self.wanted(session).write(xs, &context.front)
    }

    fn connect(&mut self, xs: &mut dyn Xenstore, context: &FrontendContext) -> Result<(), Fault> {
        self.carrier = read_carrier(xs, &context.back)?;
        if !core::mem::replace(&mut self.connected, true) {
            self.sessions = self.sessions.saturating_add(1);
            for queue in self.queues() {
                queue.publish().map_err(|fault| Fault::of(fault.code(), &fault))?;
            }
        }
        Ok(())
    }

    fn write_changed_keys(
        &mut self,
        xs: &mut dyn Xenstore,
        context: &FrontendContext,
    ) -> Result<(), HandshakeError> {
        let chooses = self.is_choosing();
        if self.offer.dynamic_multicast_control && self.written.chooses != chooses {
            write_multicast_request(xs, &context.front, chooses)?;
            self.written.chooses = chooses;
        }
        Ok(())
    }

    fn reconfigures(&self) -> bool {
        self.offer.xdp_headroom && self.written.headroom != self.headroom
    }

    fn reconfigure(
        &self,
        xs: &mut dyn Xenstore,
        context: &FrontendContext,
    ) -> Result<(), HandshakeError> {
        write_xdp_headroom(xs, &context.front, self.headroom.into())
    }

    fn reconfigured(&mut self, taken: bool) {
        if taken {
            self.written.taken = self.written.headroom;
        } else {
            self.written.headroom = self.headroom;
        }
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

impl<P: Granter + EventChannels + Clone> Nic<P> {
    /// Returns the keys that request the backend's features for these queues.
    fn wanted(&self, session: &SharedRings<P>) -> FrontRequest {
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
            multicast_control: self.written.chooses,
            xdp_headroom: self.written.headroom.into(),
            ..FrontRequest::default()
        }
    }

    /// Makes the queues and the control ring that an offer permits.
    fn set_up(&self, offer: &BackOffer, backend: DomId) -> Result<SharedRings<P>, SetupError> {
        let count = offer.plan(FrontLimits { max_queues: self.max_queues });
        let split = self.splits && offer.split_event_channels;
        let queue = |_| Queue::with_channels(&self.platform, backend, split);
        let queues = (0..count).map(queue).collect::<Result<_, _>>()?;
        let control = (offer.ctrl_ring && (self.stages || self.steering.is_some()))
            .then(|| Control::new(&self.platform, backend))
            .transpose()?;
        let control = if self.stages { control } else { control.map(Control::without_staging) };
        Ok(SharedRings { queues, control })
    }
}

//! The frontend of a virtual NIC, from the toolstack's configuration to connected queues.

mod class;
mod live;

use crate::control::Control;
use crate::fault::BackendFault;
use crate::groups::Groups;
use crate::packet::DEFAULT_MTU;
use crate::queue::Queue;
use crate::shared_rings::SharedRings;
use crate::steering::Steering;
use alloc::vec::Vec;
use core::fmt;
use pvio_event_channel::EventChannels;
use pvio_grant_table::Granter;
use pvio_xenbus::handshake::vif::{BackOffer, Mac};

/// Maximum number of earlier sessions that wait for the backend to unmap their queues. A backend
/// restart leaves one. A backend that restarts again and again and unmaps nothing would otherwise
/// exhaust the guest's memory.
const MAX_OLD: usize = 2;

/// Frontend of a virtual NIC, driven by [`pvio_xenbus::driver::FrontendDriver`].
///
/// ```
/// use pvio_netfront::{Hearing, Nic, Steering, SteeringState, group_of};
/// use pvio_ring::proto::netif::HashTypes;
/// # let platform = pvio_sim::LocalMachine::new().domain(pvio_grant_table::DomId(1));
/// # let random_key = [0x5a; 40];
///
/// let mut nic = Nic::new(platform)
///     .with_queues(4)
///     .steered_by(Steering::new(HashTypes::all(), &random_key)?)
///     .choosing_groups()
///     .with_headroom(256);
/// nic.join(group_of("224.0.0.251".parse()?).expect("a group of IP's"))?;
/// // A backend that has any of it not leaves it out.
/// assert_eq!((nic.steering(), nic.hearing()), (SteeringState::Off, Hearing::All));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// All of these settings can also be [changed](Self::steer) while the NIC is connected, and persist
/// over sessions.
pub struct Nic<P: Granter + EventChannels + Clone> {
    platform: P,
    session: Option<SharedRings<P>>,
    /// Whether the queues may be used.
    connected: bool,
    mac: Option<Mac>,
    mtu: u32,
    speed: Option<u64>,
    carrier: bool,
    /// Earlier sessions whose pages the backend had still mapped.
    old: Vec<SharedRings<P>>,
    sessions: u32,
    /// Whether GSO packets are accepted.
    takes_gso: bool,
    /// Maximum number of queues.
    max_queues: u32,
    /// Whether to use one event channel per ring, if the backend supports it.
    splits: bool,
    /// Whether staging grants are requested.
    stages: bool,
    steering: Option<Steering>,
    groups: Groups,
    /// Whether only joined groups are received.
    chooses: bool,
    /// Requested headroom before received data, in bytes.
    headroom: u16,
    /// What this session's backend advertises.
    offer: BackOffer,
    written: WrittenKeys,
}

/// Values in xenstore of the settings that may change while the NIC is connected.
#[derive(Clone, Copy, Default)]
struct WrittenKeys {
    chooses: bool,
    headroom: u16,
    /// Headroom that the backend has accepted, in bytes.
    taken: u16,
}

impl<P: Granter + EventChannels + Clone> Nic<P> {
    /// Creates a NIC that is not attached.
    #[must_use]
    pub fn new(platform: P) -> Self {
        Self {
            platform,
            session: None,
            connected: false,
            mac: None,
            mtu: DEFAULT_MTU,
            speed: None,
            carrier: true,
            old: Vec::new(),
            sessions: 0,
            takes_gso: false,
            max_queues: 1,
            splits: false,
            stages: true,
            steering: None,
            groups: Groups::default(),
            chooses: false,
            headroom: 0,
            offer: BackOffer::default(),
            written: WrittenKeys::default(),
        }
    }

    /// Sets the maximum number of [queues](Self::queues), for example one per processor of the
    /// guest. The NIC has as many as the backend supports. Packets are received on all of them.
    #[must_use]
    pub fn with_queues(mut self, most: u32) -> Self {
        self.max_queues = most.max(1);
        self
    }

    /// Uses one event channel per ring, if the backend supports it.
    #[must_use]
    pub fn splitting_channels(mut self) -> Self {
        self.splits = true;
        self
    }

    /// Disables staging grants: the backend is not requested to keep pages mapped.
    #[must_use]
    pub fn without_staging(mut self) -> Self {
        self.stages = false;
        self
    }

    /// Accepts GSO packets: fewer and larger packets, of up to 64 KiB. A program that forwards them
    /// has to [segment](Queue::receive_with_gso) them.
    #[must_use]
    pub fn taking_gso(mut self) -> Self {
        self.takes_gso = true;
        self
    }

    /// Requests [steering](Self::steer) of received packets, which takes effect if there are
    /// several queues and a control ring.
    #[must_use]
    pub fn steered_by(mut self, steering: Steering) -> Self {
        self.steering = Some(steering);
        self
    }

    /// Receives only multicast groups that it [joins](Self::join).
    #[must_use]
    pub fn choosing_groups(mut self) -> Self {
        self.chooses = true;
        self
    }

    /// Requests [headroom](Self::ask_headroom) before received data, in bytes.
    #[must_use]
    pub fn with_headroom(mut self, bytes: u16) -> Self {
        self.ask_headroom(bytes);
        self
    }

    /// Returns the first queue, while the NIC is connected. After a backend restart it is another
    /// queue; packets that were in flight are lost.
    pub fn queue(&mut self) -> Option<&mut Queue<P>> {
        self.queues().first_mut()
    }

    /// Returns every queue, while the NIC is connected, as [`queue`](Self::queue) does. Also steps
    /// the control ring and the multicast groups. A protocol violation found there is returned by
    /// [`fault`](Self::fault).
    pub fn queues(&mut self) -> &mut [Queue<P>] {
        match &mut self.session {
            Some(SharedRings { queues, control }) if self.connected => {
                let broken = match control {
                    Some(control) if !control.is_done() => control.step(queues).is_err(),
                    Some(control) => control.fault().is_some(),
                    None => false,
                };
                if let Some(first) = queues.first_mut()
                    && self.offer.multicast_control
                    && !self.groups.are_sent()
                {
                    // The queue stores its fault.
                    let _ = self.groups.step(first);
                }
                if broken { &mut [] } else { queues }
            }
            _ => &mut [],
        }
    }

    /// Returns the backend's protocol violation on any queue or on the control ring, if there was
    /// one. Close the device in that case.
    #[must_use]
    pub fn fault(&self) -> Option<BackendFault> {
        let SharedRings { queues, control } = self.session.as_ref()?;
        let control = control.as_ref().and_then(Control::fault);
        control.or_else(|| queues.iter().find_map(Queue::fault))
    }

    /// Returns the first queue of this session or of the last one.
    #[cfg(feature = "smoltcp")]
    pub(crate) fn any_queue(&self) -> Option<&Queue<P>> {
        self.session.as_ref()?.queues.first()
    }

    /// Returns the guest's MAC address. Known once the backend has written its offer.
    #[must_use]
    pub fn mac(&self) -> Option<Mac> {
        self.mac
    }

    /// Returns the size of the largest packet, without the Ethernet header, in bytes.
    #[must_use]
    pub fn mtu(&self) -> u32 {
        self.mtu
    }

    /// Returns the link's speed in bits per second, if the toolstack configures one: informative
    /// only.
    #[must_use]
    pub fn speed(&self) -> Option<u64> {
        self.speed
    }

    /// Returns the link state (`carrier`) as of the backend's last change of xenbus state.
    #[must_use]
    pub fn carrier(&self) -> bool {
        self.carrier
    }

    /// Returns whether packets can be sent now.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.connected
    }

    /// Returns how often the NIC was connected: more than once if the backend was restarted.
    #[must_use]
    pub fn sessions(&self) -> u32 {
        self.sessions
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

//! The device: a virtual NIC's frontend end, from the toolstack's words to a usable queue.

mod class;
mod live;

use crate::control::Control;
use crate::fault::BackendFault;
use crate::groups::Groups;
use crate::packet::DEFAULT_MTU;
use crate::queue::Queue;
use crate::session::Session;
use crate::steering::Steering;
use alloc::vec::Vec;
use core::fmt;
use pvio_event_channel::EventChannels;
use pvio_grant_table::Granter;
use pvio_xenbus::handshake::vif::{BackOffer, Mac};

/// How many earlier sessions' queues may wait for the backend to let go of them. One is the rule
/// when a backend is restarted; a backend that starts over and over and unmaps nothing would take
/// all of the guest's memory.
const MAX_OLD: usize = 2;

/// A virtual NIC's frontend, to be driven by [`pvio_xenbus::driver::FrontendDriver`].
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
/// All of that may be [changed](Self::steer) while it is connected, too, and holds for every session after.
pub struct Nic<P: Granter + EventChannels + Clone> {
    platform: P,
    session: Option<Session<P>>,
    /// Whether the queues may be used.
    connected: bool,
    mac: Option<Mac>,
    mtu: u32,
    speed: Option<u64>,
    carrier: bool,
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
    steering: Option<Steering>,
    groups: Groups,
    /// Whether only groups that are joined are to be heard.
    chooses: bool,
    /// Room wanted before received data, in bytes.
    headroom: u16,
    /// What the backend of this session offers, and has been told through xenstore.
    offer: BackOffer,
    told: WrittenKeys,
}

/// What stands in xenstore of what may change while the NIC is connected.
#[derive(Clone, Copy, Default)]
struct WrittenKeys {
    chooses: bool,
    headroom: u16,
    /// The room that the backend has taken over.
    taken: u16,
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
            told: WrittenKeys::default(),
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

    /// The same NIC, whose received packets are to be [spread](Self::steer) so over its queues, where there
    /// are several, and a control ring.
    #[must_use]
    pub fn steered_by(mut self, steering: Steering) -> Self {
        self.steering = Some(steering);
        self
    }

    /// The same NIC, which is to hear only multicast groups that it [joins](Self::join).
    #[must_use]
    pub fn choosing_groups(mut self) -> Self {
        self.chooses = true;
        self
    }

    /// The same NIC, with so much [room](Self::ask_headroom) before received data.
    #[must_use]
    pub fn with_headroom(mut self, bytes: u16) -> Self {
        self.ask_headroom(bytes);
        self
    }

    /// The first queue, while the NIC is connected. Another one after the backend was restarted: what
    /// was in flight then is lost, as on any network.
    pub fn queue(&mut self) -> Option<&mut Queue<P>> {
        self.queues().first_mut()
    }

    /// Every queue, while the NIC is connected: as [`queue`](Self::queue). What is under way on the control
    /// ring, and with multicast groups, goes on here; so what the backend broke there is found here, too: see
    /// [`fault`](Self::fault).
    pub fn queues(&mut self) -> &mut [Queue<P>] {
        match &mut self.session {
            Some(Session { queues, control }) if self.connected => {
                let broken = match control {
                    Some(control) if !control.is_done() => control.step(queues).is_err(),
                    Some(control) => control.fault().is_some(),
                    None => false,
                };
                if let Some(first) = queues.first_mut()
                    && self.offer.multicast_control
                    && !self.groups.are_told()
                {
                    // The queue keeps its fault.
                    let _ = self.groups.step(first);
                }
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

    /// The link's speed in bits a second, if the toolstack names one: for show.
    #[must_use]
    pub fn speed(&self) -> Option<u64> {
        self.speed
    }

    /// Whether the backend says that its link is up (`carrier`), as of its last change of state.
    #[must_use]
    pub fn carrier(&self) -> bool {
        self.carrier
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

//! The data path of a virtual NIC: packets out, packets in.
//!
//! ```
//! # fn run<P>(queue: &mut pvio_netfront::Queue<P>) -> Result<(), Box<dyn std::error::Error>>
//! # where P: pvio_grant_table::Granter + pvio_event_channel::EventChannels + Clone {
//! use pvio_event_channel::EventChannel;
//! use pvio_netfront::Checksum;
//!
//! queue.send(&[0xff; 60], Checksum::Unknown)?;
//! loop {
//!     while let Some(len) = queue.receive(|frame, _checksum| frame.len())? {
//!         println!("{len} bytes came in");
//!     }
//!     queue.publish()?;
//!     // Asks to be woken, and looks once more; only then may one wait for `queue.channel()`.
//!     if !queue.final_check()? {
//!         break;
//!     }
//! }
//! # Ok(())
//! # }
//! ```

use crate::fault::{BackendFault, SendError, SetupError};
use crate::packet::{Checksum, Counters, Features, Group, Gso};
use crate::received::Incoming;
use crate::rx::{Received, Rx};
use crate::tx::Tx;
use core::fmt;
use pvio_event_channel::{EventChannel, EventChannels};
use pvio_grant_table::{DomId, GrantRef, Granter};
use pvio_ring::proto::netif::{ExtraKind, GrefEntry, HashTypes};

/// One queue of a virtual NIC, frontend side.
pub struct Queue<P: Granter + EventChannels> {
    tx: Tx<P>,
    rx: Rx<P>,
    features: Features,
    counters: Counters,
    channel: P::Channel,
    /// `None` when the rings share a channel.
    rx_channel: Option<P::Channel>,
    failed: Option<BackendFault>,
    #[cfg(feature = "smoltcp")]
    pub(crate) phy: crate::scratch::Scratch,
}

impl<P: Granter + EventChannels + Clone> Queue<P> {
    /// Allocates and grants both rings and a page for each of their slots, posts the receive
    /// ones, and makes an event channel for the backend to bind to.
    ///
    /// # Errors
    /// [`SetupError`]; everything made so far is taken back.
    pub fn new(platform: &P, backend: DomId) -> Result<Self, SetupError> {
        Self::with_channels(platform, backend, false)
    }

    /// The same, with an event channel for each ring if `split`.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_channels(platform: &P, backend: DomId, split: bool) -> Result<Self, SetupError> {
        let rx_channel = split.then(|| platform.alloc_unbound(backend)).transpose()?;
        Ok(Self {
            tx: Tx::new(platform, backend)?,
            rx: Rx::new(platform, backend)?,
            features: Features::default(),
            counters: Counters::default(),
            channel: platform.alloc_unbound(backend)?,
            rx_channel,
            failed: None,
            #[cfg(feature = "smoltcp")]
            phy: crate::scratch::Scratch::new(),
        })
    }
}

impl<P: Granter + EventChannels> Queue<P> {
    /// The transmit ring's page, for the handshake.
    #[must_use]
    pub fn tx_gref(&self) -> GrantRef {
        self.tx.ring_page().gref(0)
    }

    /// The receive ring's page, for the handshake.
    #[must_use]
    pub fn rx_gref(&self) -> GrantRef {
        self.rx.ring_page().gref(0)
    }

    /// Our end of the event channel: for both rings, or, if there are two, for the transmit ring.
    #[must_use]
    pub fn channel(&self) -> &P::Channel {
        &self.channel
    }

    /// Our end of the receive ring's event channel, if it has one of its own.
    #[must_use]
    pub fn rx_channel(&self) -> Option<&P::Channel> {
        self.rx_channel.as_ref()
    }

    /// Every event channel that wakes this queue.
    pub fn channels(&self) -> impl Iterator<Item = &P::Channel> {
        core::iter::once(&self.channel).chain(&self.rx_channel)
    }

    /// Its pages, as a backend is asked to keep them mapped: none of them is ever taken back before
    /// the queue is. One of each ring by turns.
    pub fn staging_list(&self) -> impl Iterator<Item = GrefEntry> {
        let entry = |gref: GrantRef, read_only| GrefEntry { gref, read_only, status: 0 };
        let tx = self.tx.data_grefs().iter().map(move |gref| entry(*gref, true));
        let rx = self.rx.data_grefs().iter().map(move |gref| entry(*gref, false));
        tx.zip(rx).flat_map(|(tx, rx)| [tx, rx])
    }

    /// What was agreed with the backend.
    #[must_use]
    pub const fn features(&self) -> Features {
        self.features
    }

    /// What was agreed with the backend. Until then, packets of one page with their checksums
    /// can be sent.
    pub const fn set_features(&mut self, features: Features) {
        self.features = features;
        self.rx.take_gso(features.takes_gso_v4, features.takes_gso_v6);
    }

    /// The backend was asked to tell the hashes of packets of these kinds. Until then, and of any other
    /// kind, [`Incoming::hash`] tells none.
    pub const fn take_hashes(&mut self, types: HashTypes) {
        self.rx.take_hashes(types);
    }

    /// The backend was asked to leave so many bytes free before received data,
    /// [`HEADROOM_MAX`](crate::HEADROOM_MAX) at most. Until then, [`Incoming::headroom`] is 0.
    pub fn take_headroom(&mut self, bytes: u16) {
        self.rx.take_headroom(bytes);
    }

    /// Names a multicast group to the backend, in a request of its own that carries no packet, or takes it
    /// back. The answer is found by [`group_answer`](Self::group_answer).
    ///
    /// # Errors
    /// [`SendError::Full`] when there is no room, or the last one is not answered; a fault.
    pub fn tell_group(&mut self, group: Group, joins: bool) -> Result<(), SendError> {
        if let Some(fault) = self.failed {
            return Err(fault.into());
        }
        let kind = if joins { ExtraKind::McastAdd(group) } else { ExtraKind::McastDel(group) };
        self.tx.tell_group(kind, &mut self.counters).inspect_err(|error| {
            if let SendError::Fault(fault) = error {
                self.failed = Some(*fault);
            }
        })
    }

    /// Whether the backend has done what it was last [told](Self::tell_group); `None` while it has not
    /// answered, and once that was asked.
    ///
    /// # Errors
    /// A [`BackendFault`], now and for ever.
    pub fn group_answer(&mut self) -> Result<Option<bool>, BackendFault> {
        self.guarded(|queue| queue.tx.group_answer(&mut queue.counters))
    }

    /// The queue's counters.
    #[must_use]
    pub const fn counters(&self) -> &Counters {
        &self.counters
    }

    /// What the backend did, if the queue has failed.
    #[must_use]
    pub const fn fault(&self) -> Option<BackendFault> {
        self.failed
    }

    /// Sends an Ethernet frame (14 to 65,535 bytes, without FCS). The backend sees it after
    /// [`publish`](Self::publish).
    ///
    /// # Errors
    /// A [`SendError`]; nothing was sent.
    pub fn send(&mut self, frame: &[u8], checksum: Checksum) -> Result<(), SendError> {
        let Self { tx, features, counters, failed, .. } = self;
        Sender { tx, features: *features, counters, failed }.send(frame, checksum, None)
    }

    /// Sends a frame of TCP, its checksum [blank](Checksum::Blank), for the backend to cut into
    /// segments of `gso.size` bytes of payload.
    ///
    /// # Errors
    /// A [`SendError`]; nothing was sent.
    pub fn send_gso(&mut self, frame: &[u8], gso: Gso) -> Result<(), SendError> {
        let Self { tx, features, counters, failed, .. } = self;
        let mut sender = Sender { tx, features: *features, counters, failed };
        sender.send(frame, Checksum::Blank, Some(gso))
    }

    /// Whether a frame of so many pages can be sent now. If not,
    /// [`final_check`](Self::final_check) asks to be woken when some can.
    ///
    /// # Errors
    /// A [`BackendFault`], now and for ever.
    pub fn has_room(&mut self, pages: usize) -> Result<bool, BackendFault> {
        self.guarded(|queue| queue.tx.has_room(pages, &mut queue.counters))
    }

    /// Calls `each` with the next frame that came in, if there is one. The frame is a private
    /// copy; its buffer went back to the backend, which sees that after
    /// [`publish`](Self::publish) (or after enough others).
    ///
    /// # Errors
    /// A [`BackendFault`], now and for ever.
    pub fn receive<T>(
        &mut self,
        each: impl FnOnce(&[u8], Checksum) -> T,
    ) -> Result<Option<T>, BackendFault> {
        self.receive_with_gso(|frame, checksum, _| each(frame, checksum))
    }

    /// As [`receive`](Self::receive), and also says whether the frame has still to be segmented,
    /// which matters to whoever passes it on.
    ///
    /// # Errors
    /// A [`BackendFault`], now and for ever.
    pub fn receive_with_gso<T>(
        &mut self,
        each: impl FnOnce(&[u8], Checksum, Option<Gso>) -> T,
    ) -> Result<Option<T>, BackendFault> {
        self.receive_packet(|packet| each(packet.frame(), packet.checksum, packet.gso))
    }

    /// As [`receive`](Self::receive), with all that the backend says of the packet: its hash and the room
    /// before it, too.
    ///
    /// # Errors
    /// A [`BackendFault`], now and for ever.
    pub fn receive_packet<T>(
        &mut self,
        each: impl FnOnce(Incoming<'_>) -> T,
    ) -> Result<Option<T>, BackendFault> {
        let next = self.next_frame()?;
        Ok(next.map(|got| each(self.rx.incoming(&got))))
    }

    /// Shows the backend everything that was sent and given back, and wakes it if it asked to be.
    ///
    /// # Errors
    /// A [`BackendFault`], now and for ever.
    pub fn publish(&mut self) -> Result<(), BackendFault> {
        self.guarded(|queue| {
            let (tx, rx) = (queue.tx.publish(), queue.rx.publish());
            if tx || (rx && queue.rx_channel.is_none()) {
                queue.channel.notify()?;
            }
            if let Some(channel) = queue.rx_channel.as_ref().filter(|_| rx) {
                channel.notify()?;
            }
            Ok(())
        })
    }

    /// To be called before waiting for an event: asks to be woken for the next packet (and, if
    /// there was no room to send, for room) and looks once more. Wait only if it says `false`. That
    /// there may be room now is said once: try again to send, or leave it.
    ///
    /// # Errors
    /// A [`BackendFault`], now and for ever.
    pub fn final_check(&mut self) -> Result<bool, BackendFault> {
        // Both, for each asks for its own wake-up.
        self.guarded(|queue| {
            let received = queue.rx.final_check()?;
            Ok(queue.tx.final_check(&mut queue.counters)? | received)
        })
    }

    /// Whether there is something to do, by a look at shared memory that asks for nothing.
    ///
    /// # Errors
    /// A [`BackendFault`], now and for ever.
    pub fn has_work(&mut self) -> Result<bool, BackendFault> {
        self.guarded(|queue| Ok(queue.rx.has_work()? || queue.tx.has_work(&mut queue.counters)?))
    }

    /// Takes every grant back and frees the memory.
    ///
    /// # Errors
    /// The queue, if the backend has some of it mapped still; try again when it says that it has
    /// let go.
    #[expect(clippy::result_large_err, reason = "the queue itself, moved at the end of a session")]
    pub fn dismantle(mut self) -> Result<(), Self> {
        let tx = self.tx.revoke();
        if self.rx.revoke() && tx { Ok(()) } else { Err(self) }
    }

    /// Puts the next frame together.
    pub(crate) fn next_frame(&mut self) -> Result<Option<Received>, BackendFault> {
        self.guarded(|queue| {
            if queue.rx.should_publish() && queue.rx.publish() {
                queue.rx_channel.as_ref().unwrap_or(&queue.channel).notify()?;
            }
            queue.rx.next(&mut queue.counters)
        })
    }

    /// The receiving half, whose frame can be looked at while the other half sends.
    #[cfg(feature = "smoltcp")]
    pub(crate) fn split(&mut self) -> (&Rx<P>, Sender<'_, P>, &mut crate::scratch::Scratch) {
        let Self { tx, rx, features, counters, failed, phy, .. } = self;
        (rx, Sender { tx, features: *features, counters, failed }, phy)
    }

    /// Runs `work` unless the queue has failed, and remembers if it fails.
    fn guarded<T>(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<T, BackendFault>,
    ) -> Result<T, BackendFault> {
        if let Some(fault) = self.failed {
            return Err(fault);
        }
        work(self).inspect_err(|fault| self.failed = Some(*fault))
    }
}

/// The sending half of a queue.
pub(crate) struct Sender<'a, P: Granter> {
    tx: &'a mut Tx<P>,
    pub features: Features,
    counters: &'a mut Counters,
    failed: &'a mut Option<BackendFault>,
}

impl<P: Granter> Sender<'_, P> {
    pub fn send(
        &mut self,
        frame: &[u8],
        checksum: Checksum,
        gso: Option<Gso>,
    ) -> Result<(), SendError> {
        if let Some(fault) = *self.failed {
            return Err(fault.into());
        }
        self.tx.send(frame, checksum, gso, &self.features, self.counters).inspect_err(|error| {
            if let SendError::Fault(fault) = error {
                *self.failed = Some(*fault);
            }
        })
    }
}

impl<P: Granter + EventChannels> fmt::Debug for Queue<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue")
            .field("features", &self.features)
            .field("counters", &self.counters)
            .field("failed", &self.failed)
            .finish_non_exhaustive()
    }
}

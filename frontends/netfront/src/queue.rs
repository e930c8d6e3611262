//! The data path of a virtual NIC: transmitted and received packets.
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
//!     // Requests a notification and checks again; only then may one wait for `queue.channel()`.
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
    /// `None` if both rings share one channel.
    rx_channel: Option<P::Channel>,
    failed: Option<BackendFault>,
    #[cfg(feature = "smoltcp")]
    pub(crate) phy: crate::scratch::Scratch,
}

impl<P: Granter + EventChannels + Clone> Queue<P> {
    /// Allocates and grants both rings and a page for each of their slots, posts the receive
    /// buffers, and makes an event channel that the backend binds to.
    ///
    /// # Errors
    /// [`SetupError`]; everything made so far is released.
    pub fn new(platform: &P, backend: DomId) -> Result<Self, SetupError> {
        Self::with_channels(platform, backend, false)
    }

    /// Makes a queue as [`new`](Self::new) does, with one event channel per ring if `split`.
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
    /// Returns the grant reference of the transmit ring's page, for the handshake.
    #[must_use]
    pub fn tx_gref(&self) -> GrantRef {
        self.tx.ring_page().gref(0)
    }

    /// Returns the grant reference of the receive ring's page, for the handshake.
    #[must_use]
    pub fn rx_gref(&self) -> GrantRef {
        self.rx.ring_page().gref(0)
    }

    /// Returns this side's event channel: for both rings, or, if there are two channels, for the
    /// transmit ring.
    #[must_use]
    pub fn channel(&self) -> &P::Channel {
        &self.channel
    }

    /// Returns this side's event channel of the receive ring, if it has a separate one.
    #[must_use]
    pub fn rx_channel(&self) -> Option<&P::Channel> {
        self.rx_channel.as_ref()
    }

    /// Returns every event channel that wakes this queue.
    pub fn channels(&self) -> impl Iterator<Item = &P::Channel> {
        core::iter::once(&self.channel).chain(&self.rx_channel)
    }

    /// Returns the queue's pages as entries of a staging grant list, alternating between the two
    /// rings. None of them is revoked before the queue is released.
    pub fn staging_list(&self) -> impl Iterator<Item = GrefEntry> {
        let entry = |gref: GrantRef, read_only| GrefEntry { gref, read_only, status: 0 };
        let tx = self.tx.data_grefs().iter().map(move |gref| entry(*gref, true));
        let rx = self.rx.data_grefs().iter().map(move |gref| entry(*gref, false));
        tx.zip(rx).flat_map(|(tx, rx)| [tx, rx])
    }

    /// Returns the negotiated features.
    #[must_use]
    pub const fn features(&self) -> Features {
        self.features
    }

    /// Sets the negotiated features. By default, only packets of at most one page with complete
    /// checksums can be sent.
    pub const fn set_features(&mut self, features: Features) {
        self.features = features;
        self.rx.take_gso(features.takes_gso_v4, features.takes_gso_v6);
    }

    /// Sets the kinds of packets for which the backend was configured to report hashes. For other
    /// kinds, and by default, [`Incoming::hash`] is `None`.
    pub const fn take_hashes(&mut self, types: HashTypes) {
        self.rx.take_hashes(types);
    }

    /// Sets the headroom that was requested from the backend, in bytes, at most
    /// [`HEADROOM_MAX`](crate::HEADROOM_MAX). By default, [`Incoming::headroom`] is 0.
    pub fn take_headroom(&mut self, bytes: u16) {
        self.rx.take_headroom(bytes);
    }

    /// Sends a request without a packet that adds a multicast group to the backend's filter, or
    /// removes it. [`group_answer`](Self::group_answer) returns the outcome.
    ///
    /// # Errors
    /// [`SendError::Full`] if there is no room, or if the previous such request is outstanding; a
    /// fault.
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

    /// Returns whether the last [group request](Self::tell_group) succeeded; `None` if it is
    /// outstanding, or if the outcome was returned before.
    ///
    /// # Errors
    /// A [`BackendFault`], which is permanent.
    pub fn group_answer(&mut self) -> Result<Option<bool>, BackendFault> {
        self.guarded(|queue| queue.tx.group_answer(&mut queue.counters))
    }

    /// Returns the queue's counters.
    #[must_use]
    pub const fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Returns the backend's fault, if the queue has failed.
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

    /// Sends a TCP frame with [blank](Checksum::Blank) checksum that the backend divides into
    /// segments of `gso.size` bytes of payload.
    ///
    /// # Errors
    /// A [`SendError`]; nothing was sent.
    pub fn send_gso(&mut self, frame: &[u8], gso: Gso) -> Result<(), SendError> {
        let Self { tx, features, counters, failed, .. } = self;
        let mut sender = Sender { tx, features: *features, counters, failed };
        sender.send(frame, Checksum::Blank, Some(gso))
    }

    /// Returns whether a frame of `pages` pages can be sent now. If not,
    /// [`final_check`](Self::final_check) arms a notification for free slots.
    ///
    /// # Errors
    /// A [`BackendFault`], which is permanent.
    pub fn has_room(&mut self, pages: usize) -> Result<bool, BackendFault> {
        self.guarded(|queue| queue.tx.has_room(pages, &mut queue.counters))
    }

    /// Calls `each` with the next received frame, if there is one. The frame is a private copy. Its
    /// buffer is posted to the backend again, which sees that after [`publish`](Self::publish), or
    /// after a batch of buffers was posted.
    ///
    /// # Errors
    /// A [`BackendFault`], which is permanent.
    pub fn receive<T>(
        &mut self,
        each: impl FnOnce(&[u8], Checksum) -> T,
    ) -> Result<Option<T>, BackendFault> {
        self.receive_with_gso(|frame, checksum, _| each(frame, checksum))
    }

    /// Receives as [`receive`](Self::receive) does, and also passes the GSO metadata, which a
    /// caller that forwards the frame needs.
    ///
    /// # Errors
    /// A [`BackendFault`], which is permanent.
    pub fn receive_with_gso<T>(
        &mut self,
        each: impl FnOnce(&[u8], Checksum, Option<Gso>) -> T,
    ) -> Result<Option<T>, BackendFault> {
        self.receive_packet(|packet| each(packet.frame(), packet.checksum, packet.gso))
    }

    /// Receives as [`receive`](Self::receive) does, with all metadata of the packet: GSO, hash and
    /// headroom.
    ///
    /// # Errors
    /// A [`BackendFault`], which is permanent.
    pub fn receive_packet<T>(
        &mut self,
        each: impl FnOnce(Incoming<'_>) -> T,
    ) -> Result<Option<T>, BackendFault> {
        let next = self.next_frame()?;
        Ok(next.map(|got| each(self.rx.incoming(&got))))
    }

    /// Publishes all requests and posted buffers, and notifies the backend if it requested a
    /// notification.
    ///
    /// # Errors
    /// A [`BackendFault`], which is permanent.
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

    /// Arms notifications for the next packet (and, if there was no room to send, for free slots),
    /// and checks again for both. To be called before waiting for an event; wait only if it returns
    /// `false`. Free slots are reported once: the caller then sends again, or drops the packet.
    ///
    /// # Errors
    /// A [`BackendFault`], which is permanent.
    pub fn final_check(&mut self) -> Result<bool, BackendFault> {
        // Both are evaluated, because each arms the notification of its ring.
        self.guarded(|queue| {
            let received = queue.rx.final_check()?;
            Ok(queue.tx.final_check(&mut queue.counters)? | received)
        })
    }

    /// Returns whether there are events to handle. Reads shared memory only; does not arm a
    /// notification.
    ///
    /// # Errors
    /// A [`BackendFault`], which is permanent.
    pub fn has_work(&mut self) -> Result<bool, BackendFault> {
        self.guarded(|queue| Ok(queue.rx.has_work()? || queue.tx.has_work(&mut queue.counters)?))
    }

    /// Revokes all grants and frees the memory.
    ///
    /// # Errors
    /// The queue, if the backend has still mapped some of it; retry when the backend reports that
    /// it has unmapped everything.
    #[expect(clippy::result_large_err, reason = "the queue itself, moved at the end of a session")]
    pub fn dismantle(mut self) -> Result<(), Self> {
        let tx = self.tx.revoke();
        if self.rx.revoke() && tx { Ok(()) } else { Err(self) }
    }

    /// Assembles the next frame.
    pub(crate) fn next_frame(&mut self) -> Result<Option<Received>, BackendFault> {
        self.guarded(|queue| {
            if queue.rx.should_publish() && queue.rx.publish() {
                queue.rx_channel.as_ref().unwrap_or(&queue.channel).notify()?;
            }
            queue.rx.next(&mut queue.counters)
        })
    }

    /// Returns the last frame and the transmit half of the queue, so that the frame can be read
    /// while sending.
    #[cfg(feature = "smoltcp")]
    pub(crate) fn split(&mut self) -> (&Rx<P>, Sender<'_, P>, &mut crate::scratch::Scratch) {
        let Self { tx, rx, features, counters, failed, phy, .. } = self;
        (rx, Sender { tx, features: *features, counters, failed }, phy)
    }

    /// Runs `work` unless the queue has failed, and stores a fault that it returns.
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

/// The transmit half of a queue.
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

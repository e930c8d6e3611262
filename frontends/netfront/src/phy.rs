//! A queue as a device of smoltcp's.
//!
//! # Who looks after checksums
//! smoltcp is told to leave TCP and UDP checksums alone, both ways; all others (IPv4 headers,
//! ICMP) are its own, as usual.
//!
//! - **Out**: the checksum is left blank if the backend completes it, else it is filled in here.
//!   Fragments are sent as smoltcp made them: UDP over IPv4 without a checksum, which is allowed.
//! - **In**: a packet whose checksum is [blank or validated](Checksum) is taken as it is. Any other
//!   is verified here, and dropped if it is wrong. An IP fragment that nobody validated is
//!   dropped as well, for its checksum covers what is in other fragments, and smoltcp would not
//!   look at it after putting them together; so is a malformed IP packet.
//!   [`Phy::unverified`] counts both.
//!
//! A backend's faults cannot be told through smoltcp: the device falls silent, and
//! [`Queue::fault`] says why.

use crate::queue::{Checksum, Queue, Sender};
use alloc::boxed::Box;
use core::fmt;
use pvio_event_channel::EventChannels;
use pvio_grant_table::Granter;
use pvio_ring::proto::checksum::{ETHERNET_HEADER, IpVersion, NoTransport, Transport};
use pvio_ring::proto::netif::MAX_PACKET;
use pvio_ring::shm::PAGE_SIZE;
use smoltcp::phy::{self, Device, DeviceCapabilities, Medium};
use smoltcp::time::Instant;

/// A queue and what belongs to it for smoltcp.
pub struct Phy<P: Granter + EventChannels> {
    queue: Queue<P>,
    frame_max: usize,
    scratch: Box<[u8]>,
    unverified: u64,
}

impl<P: Granter + EventChannels> Phy<P> {
    /// A device that sends packets of up to `mtu` bytes, the Ethernet header not counted.
    #[must_use]
    pub fn new(queue: Queue<P>, mtu: u32) -> Self {
        let most = if queue.features().sg { MAX_PACKET } else { PAGE_SIZE };
        let frame_max = usize::try_from(mtu).unwrap_or(most).saturating_add(ETHERNET_HEADER);
        let frame_max = frame_max.min(most);
        let scratch = alloc::vec![0; frame_max].into_boxed_slice();
        Self { queue, frame_max, scratch, unverified: 0 }
    }

    /// The queue. Publish it after smoltcp was polled.
    pub const fn queue(&mut self) -> &mut Queue<P> {
        &mut self.queue
    }

    /// Packets that were dropped because their checksum was wrong or could not be verified.
    #[must_use]
    pub const fn unverified(&self) -> u64 {
        self.unverified
    }

    /// Gives the queue back.
    #[must_use]
    pub fn into_queue(self) -> Queue<P> {
        self.queue
    }
}

impl<P: Granter + EventChannels> Device for Phy<P> {
    type RxToken<'a>
        = RxToken<'a>
    where
        P: 'a;
    type TxToken<'a>
        = TxToken<'a, P>
    where
        P: 'a;

    fn receive(&mut self, _timestamp: Instant) -> Option<(RxToken<'_>, TxToken<'_, P>)> {
        // Whoever takes a packet may answer it.
        if !self.has_room() {
            return None;
        }
        let len = self.next_trusted()?;
        let (rx, sender) = self.queue.split();
        Some((RxToken(rx.frame(len)), TxToken { sender, scratch: &mut self.scratch }))
    }

    fn transmit(&mut self, _timestamp: Instant) -> Option<TxToken<'_, P>> {
        if !self.has_room() {
            return None;
        }
        let (_, sender) = self.queue.split();
        Some(TxToken { sender, scratch: &mut self.scratch })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = self.frame_max;
        capabilities.checksum.tcp = phy::Checksum::None;
        capabilities.checksum.udp = phy::Checksum::None;
        capabilities
    }
}

impl<P: Granter + EventChannels> Phy<P> {
    /// Whether a frame of the largest size can be sent.
    fn has_room(&mut self) -> bool {
        let slots = self.frame_max.div_ceil(PAGE_SIZE);
        self.queue.has_room(slots).unwrap_or(false)
    }

    /// Takes the next packet that need not be looked at further; returns its length.
    fn next_trusted(&mut self) -> Option<usize> {
        loop {
            let (len, checksum) = self.queue.next_frame().ok()??;
            if trusted(self.queue.split().0.frame(len), checksum) {
                return Some(len);
            }
            self.unverified = self.unverified.wrapping_add(1);
        }
    }
}

/// A received frame.
#[derive(Debug)]
pub struct RxToken<'a>(&'a [u8]);

impl phy::RxToken for RxToken<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

/// The right to send one frame.
pub struct TxToken<'a, P: Granter> {
    sender: Sender<'a, P>,
    scratch: &'a mut [u8],
}

impl<P: Granter> phy::TxToken for TxToken<'_, P> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let Self { mut sender, scratch } = self;
        let Some(frame) = scratch.get_mut(..len) else {
            // Longer than smoltcp was told: it is given memory, and nothing is sent.
            return f(&mut alloc::vec![0; len]);
        };
        // What stood there was another packet's.
        frame.fill(0);
        let done = f(frame);
        send(&mut sender, frame);
        done
    }
}

/// Sees to a frame's checksum and sends it.
fn send<P: Granter>(sender: &mut Sender<'_, P>, frame: &mut [u8]) {
    let mut checksum = Checksum::Validated;
    if let Ok(transport) = Transport::of(frame) {
        let completed = match transport.version {
            IpVersion::V4 => sender.features.checksum_v4,
            IpVersion::V6 => sender.features.checksum_v6,
        };
        if completed {
            transport.blank(frame);
            checksum = Checksum::Blank;
        } else {
            transport.fill(frame);
        }
    }
    // There was room for the largest frame; what is left is a fault, which the queue keeps.
    let _ = sender.send(frame, checksum);
}

/// Whether a frame can be handed to somebody who does not verify TCP and UDP checksums.
fn trusted(frame: &[u8], checksum: Checksum) -> bool {
    if checksum != Checksum::Unknown {
        return true;
    }
    match Transport::of(frame) {
        Ok(transport) => transport.verify(frame),
        Err(NoTransport::NotIp | NoTransport::OtherProtocol) => true,
        Err(NoTransport::Fragment | NoTransport::Malformed) => false,
    }
}

impl<P: Granter + EventChannels> fmt::Debug for Phy<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Phy").field("queue", &self.queue).finish_non_exhaustive()
    }
}

impl<P: Granter> fmt::Debug for TxToken<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TxToken")
    }
}

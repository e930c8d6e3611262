//! A queue, or the NIC it belongs to, as a device of smoltcp's. Publish the queue after smoltcp was
//! polled.
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
//!   [`Queue::unverified`] counts both.
//!
//! A backend's faults cannot be told through smoltcp: the device falls silent, and
//! [`Queue::fault`] says why.

use crate::nic::Nic;
use crate::packet::Checksum;
use crate::queue::{Queue, Sender};
use crate::rx::Received;
use crate::scratch::Scratch;
use core::fmt;
use pvio_event_channel::EventChannels;
use pvio_grant_table::Granter;
use pvio_ring::proto::checksum::{IpVersion, NoTransport, Transport};
use pvio_ring::shm::PAGE_SIZE;
use smoltcp::phy::{self, Device, DeviceCapabilities, Medium};
use smoltcp::time::Instant;

impl<P: Granter + EventChannels> Queue<P> {
    /// How large packets smoltcp may send, in bytes without the Ethernet header; at first 1500.
    /// Without [scatter-gather](crate::Features::sg) no frame is larger than a page all the same.
    pub fn set_mtu(&mut self, mtu: u32) {
        self.phy.set_mtu(mtu);
    }

    /// Packets that smoltcp did not get because their checksum was wrong or could not be verified.
    #[must_use]
    pub const fn unverified(&self) -> u64 {
        self.phy.unverified
    }

    fn frame_max(&self) -> usize {
        if self.features().sg { self.phy.frame_max } else { self.phy.frame_max.min(PAGE_SIZE) }
    }

    /// Whether a frame of the largest size can be sent.
    fn has_room_for_any(&mut self) -> bool {
        let pages = self.frame_max().div_ceil(PAGE_SIZE);
        self.has_room(pages).unwrap_or(false)
    }

    /// Takes the next packet that need not be looked at further.
    fn next_trusted(&mut self) -> Option<Received> {
        loop {
            let got = self.next_frame().ok()??;
            if trusted(self.split().0.frame(&got), got.checksum) {
                return Some(got);
            }
            self.phy.unverified = self.phy.unverified.wrapping_add(1);
        }
    }
}

impl<P: Granter + EventChannels> Device for Queue<P> {
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
        if !self.has_room_for_any() {
            return None;
        }
        let got = self.next_trusted()?;
        let most = self.frame_max();
        let (rx, sender, phy) = self.split();
        let scratch = phy.scratch.get_mut(..most).unwrap_or_default();
        Some((RxToken(rx.frame(&got)), TxToken { sender, scratch }))
    }

    fn transmit(&mut self, _timestamp: Instant) -> Option<TxToken<'_, P>> {
        if !self.has_room_for_any() {
            return None;
        }
        let most = self.frame_max();
        let (_, sender, phy) = self.split();
        let scratch = phy.scratch.get_mut(..most).unwrap_or_default();
        Some(TxToken { sender, scratch })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        capabilities(self.frame_max())
    }
}

/// While the NIC is not connected, nothing is received and nothing can be sent.
impl<P: Granter + EventChannels + Clone> Device for Nic<P> {
    type RxToken<'a>
        = RxToken<'a>
    where
        P: 'a;
    type TxToken<'a>
        = TxToken<'a, P>
    where
        P: 'a;

    fn receive(&mut self, timestamp: Instant) -> Option<(RxToken<'_>, TxToken<'_, P>)> {
        // Packets come on all queues, and are answered on the one they came on.
        self.queues().iter_mut().find_map(|queue| Device::receive(queue, timestamp))
    }

    fn transmit(&mut self, timestamp: Instant) -> Option<TxToken<'_, P>> {
        self.queues().iter_mut().find_map(|queue| Device::transmit(queue, timestamp))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        match self.any_queue() {
            Some(queue) => queue.capabilities(),
            None => capabilities(Scratch::new().frame_max),
        }
    }
}

fn capabilities(frame_max: usize) -> DeviceCapabilities {
    let mut capabilities = DeviceCapabilities::default();
    capabilities.medium = Medium::Ethernet;
    capabilities.max_transmission_unit = frame_max;
    capabilities.checksum.tcp = phy::Checksum::None;
    capabilities.checksum.udp = phy::Checksum::None;
    capabilities
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
    let _ = sender.send(frame, checksum, None);
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

impl<P: Granter> fmt::Debug for TxToken<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TxToken")
    }
}

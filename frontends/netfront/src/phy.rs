//! A queue, or its NIC, as a device of smoltcp. Publish the queue after polling smoltcp.
//!
//! # Checksums
//! smoltcp is configured neither to verify nor to fill in TCP and UDP checksums. It handles all
//! others (IPv4 headers, ICMP) as usual.
//!
//! - **Out**: the checksum is left blank if the backend completes it; otherwise this module fills
//!   it in. Fragments are sent as smoltcp made them: UDP over IPv4 without a checksum, which is
//!   allowed.
//! - **In**: a packet whose checksum is [blank or validated](Checksum) is accepted without
//!   verification. Any other is verified here, and dropped if it is wrong. An IP fragment that was
//!   not validated is dropped as well: its checksum covers data in other fragments, and smoltcp
//!   does not verify it after reassembly. Malformed IP packets are dropped, too.
//!   [`Queue::unverified`] counts these packets.
//!
//! smoltcp's interface cannot report a backend's faults: the device neither sends nor receives any
//! more, and [`Queue::fault`] returns the reason.

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
    /// Sets the size of the largest packet that smoltcp may send, in bytes without the Ethernet
    /// header; the default is 1500. Without [scatter-gather](crate::Features::sg), frames are
    /// limited to a page regardless of this setting.
    pub fn set_mtu(&mut self, mtu: u32) {
        self.phy.set_mtu(mtu);
    }

    /// Returns the number of packets dropped because their checksum was wrong or could not be
    /// verified.
    #[must_use]
    pub const fn unverified(&self) -> u64 {
        self.phy.unverified
    }

    fn frame_max(&self) -> usize {
        if self.features().sg { self.phy.frame_max } else { self.phy.frame_max.min(PAGE_SIZE) }
    }

    /// Returns whether a frame of the maximum size can be sent.
    fn has_room_for_any(&mut self) -> bool {
        let pages = self.frame_max().div_ceil(PAGE_SIZE);
        self.has_room(pages).unwrap_or(false)
    }

    /// Returns the next packet that needs no further verification.
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
        // smoltcp requires that every received packet can be replied to.
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

/// Receives and sends nothing while the NIC is not connected.
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
        // Packets arrive on all queues; a reply is sent on the queue on which the packet arrived.
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

/// Permission to send one frame.
pub struct TxToken<'a, P: Granter> {
    sender: Sender<'a, P>,
    scratch: &'a mut [u8],
}

impl<P: Granter> phy::TxToken for TxToken<'_, P> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let Self { mut sender, scratch } = self;
        let Some(frame) = scratch.get_mut(..len) else {
            // Longer than the limit given to smoltcp: the frame is built in temporary memory and
            // not sent.
            return f(&mut alloc::vec![0; len]);
        };
        // The buffer holds data of an earlier packet.
        frame.fill(0);
        let done = f(frame);
        send(&mut sender, frame);
        done
    }
}

/// Completes a frame's checksum, or leaves it blank, and sends the frame.
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
    // Room was checked before; any other error is a fault, which the queue stores.
    let _ = sender.send(frame, checksum, None);
}

/// Returns whether a frame can be passed to a stack that does not verify TCP and UDP checksums.
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

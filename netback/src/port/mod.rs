//! Source and destination of a queue's packets.
//!
//! # Architecture
//! A port owns the packet memory; a queue owns none. The queue [reserves](NetPort::reserve) a buffer,
//! fills it from the guest's pages and [sends](NetPort::send) it. It [receives](NetPort::receive) a
//! filled buffer, copies it into the guest's pages and [recycles](NetPort::recycle) it. Data is copied
//! once in each direction, and nothing is allocated for a packet.
//!
//! # I/O model
//! No method blocks. A port may delay sent packets until [`flush`](NetPort::flush), which the queue
//! calls once per batch.
//!
//! # Errors
//! [`WouldBlock`] is back-pressure: the caller retries later, and nothing is lost. A [`PortError`]
//! concerns one packet, which was dropped.
//!
//! The ports in `memory` (feature `test-utils`) connect to another port in the same process, or to themselves. Ports for a
//! tap, an AF_XDP socket, a switch or a file, and wrappers around any port, are in `pvio-ports`.

#[cfg(feature = "test-utils")]
pub mod memory;

use crate::fault::DropReason;
use core::time::Duration;
use pvio_ring::proto::checksum::ETHERNET_HEADER;
use pvio_ring::proto::netif::{GsoKind, MAX_PACKET};

/// Size of the largest frame in bytes: the largest IP packet, an Ethernet header and a VLAN tag. A
/// guest sends at most [`MAX_PACKET`]; a host's kernel may send this size.
pub const FRAME_MAX: usize = MAX_PACKET + ETHERNET_HEADER + 4;

/// Source and destination of packets.
pub trait NetPort {
    /// Memory for one packet.
    type Buf: PacketBuf;

    /// Bytes before every frame to be sent that are reserved for a header of the port. The frame may
    /// start after them.
    const HEADROOM: usize;

    /// Returns a buffer for a packet to be sent.
    ///
    /// # Errors
    /// [`WouldBlock`] while every buffer is in flight.
    fn reserve(&mut self) -> Result<Self::Buf, WouldBlock>;

    /// Exchanges a reserved buffer for one that is large enough for a frame of `len` bytes, so that a
    /// port that has few large buffers can use a small one. Called once for each packet to be sent.
    fn fit(&mut self, buf: Self::Buf, len: usize) -> Self::Buf {
        let _ = len;
        buf
    }

    /// Returns a reserved buffer unused.
    fn unreserve(&mut self, buf: Self::Buf);

    /// Queues a packet in a reserved buffer for sending. It may be sent only at
    /// [`flush`](NetPort::flush).
    ///
    /// # Errors
    /// The port cannot send the packet; its buffer is free again.
    fn send(&mut self, packet: Packet<Self::Buf>) -> Result<(), PortError>;

    /// Returns the next received packet, if there is one. Packets that are not received here wait in
    /// the port. A port whose buffers are all in use reads no more packets from its source.
    fn receive(&mut self) -> Option<Packet<Self::Buf>>;

    /// Returns a received packet's buffer to the port.
    fn recycle(&mut self, buf: Self::Buf);

    /// Sends all queued packets.
    fn flush(&mut self);

    /// Sets the time, from a monotonic clock with any origin. Called once per round, before other
    /// methods.
    fn set_clock(&mut self, now: Duration) {
        let _ = now;
    }

    /// Time at which [`set_clock`](NetPort::set_clock) has to be called even without an event; later than the
    /// time of the last call. `None` if no timer is armed.
    fn deadline(&self) -> Option<Duration> {
        None
    }
}

/// Private memory for one packet: as large as the packet, or, before the size is known
/// ([`NetPort::fit`]), as large as [`FRAME_MAX`] and the port's headroom.
pub trait PacketBuf: Send + 'static {
    /// Returns the bytes.
    fn bytes(&self) -> &[u8];

    /// Returns the bytes as a mutable slice.
    fn bytes_mut(&mut self) -> &mut [u8];
}

impl PacketBuf for alloc::boxed::Box<[u8]> {
    fn bytes(&self) -> &[u8] {
        self
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        self
    }
}

#[cfg(feature = "std")]
impl PacketBuf for pvio_runtime::PrivateBuf {
    fn bytes(&self) -> &[u8] {
        self.as_slice()
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        self.as_mut_slice()
    }
}

/// Packet in a buffer.
#[derive(Debug)]
pub struct Packet<B> {
    /// Buffer that holds the frame.
    pub buf: B,
    /// Offset of the Ethernet frame in the buffer, in bytes.
    pub start: usize,
    /// Length of the frame in bytes, without FCS.
    pub len: usize,
    /// Offloads that are still to be done.
    pub offload: Offload,
}

impl<B: PacketBuf> Packet<B> {
    /// Returns the Ethernet frame, or an empty slice if it is outside its buffer.
    #[must_use]
    pub fn frame(&self) -> &[u8] {
        let end = self.start.saturating_add(self.len);
        self.buf.bytes().get(self.start..end).unwrap_or_default()
    }

    /// Returns the Ethernet frame as a mutable slice, empty if it is outside its buffer.
    pub fn frame_mut(&mut self) -> &mut [u8] {
        let end = self.start.saturating_add(self.len);
        self.buf.bytes_mut().get_mut(self.start..end).unwrap_or_default()
    }
}

/// Offloads that the next recipient of a packet has to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Offload {
    /// State of the transport checksum.
    pub checksum: Checksum,
    /// Segmentation, if the packet is to be segmented.
    pub gso: Option<Gso>,
}

/// State of a packet's transport checksum.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Checksum {
    /// Present, and not validated.
    #[default]
    Unknown,
    /// Present and correct, or the data never left this machine.
    Validated,
    /// Blank: the field holds only the sum of the pseudo-header, and has to be completed.
    Partial {
        /// Start of the summed data, in bytes from the start of the frame.
        start: u16,
        /// Position of the checksum field, in bytes from `start`.
        offset: u16,
    },
}

/// Segmentation of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gso {
    /// Bytes of payload in each segment.
    pub size: u16,
    /// Protocol of the packet.
    pub kind: GsoKind,
}

/// No buffer or packet can be accepted now; the caller retries later.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the port can take nothing just now")]
pub struct WouldBlock;

/// Reason why the port could not send a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PortError {
    /// The peer of the port no longer exists.
    #[error("the port's other side is gone")]
    Gone,
    /// The port does not support such a packet.
    #[error("the port cannot carry such a packet")]
    Unsuited,
    /// A filter rejected the packet.
    #[error("the packet is not let through: {}", .0.code())]
    Refused(DropReason),
}

impl PortError {
    /// Returns the reason under which the drop is counted.
    #[must_use]
    pub const fn reason(self) -> DropReason {
        match self {
            Self::Gone | Self::Unsuited => DropReason::TxPort,
            Self::Refused(reason) => reason,
        }
    }
}

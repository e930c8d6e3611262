//! Where packets go to and come from.
//!
//! # Architecture
//! A queue owns no packet memory: the port does. The queue [reserves](NetPort::reserve) a buffer,
//! fills it from the guest's pages and [sends](NetPort::send) it; it [receives](NetPort::receive)
//! a filled buffer, copies it into the guest's pages and [recycles](NetPort::recycle) it. So data
//! is copied once in each direction, and nothing is allocated for a packet.
//!
//! # I/O model
//! No method waits. A port may hold back what was sent until [`flush`](NetPort::flush), which the
//! queue calls once a batch.
//!
//! # Errors
//! [`WouldBlock`] is back-pressure: try again later, nothing was lost. A [`PortError`] is about
//! one packet, which was dropped.
//!
//! [`memory`] leads to another port in the same process, or back to itself. Ports that lead to a tap, an
//! AF_XDP socket, a switch or a file, and wrappers around any port, are in `pvio-ports`.

pub mod memory;

use crate::fault::DropReason;
use core::time::Duration;
use pvio_ring::proto::checksum::ETHERNET_HEADER;
use pvio_ring::proto::netif::{GsoKind, MAX_PACKET};

/// Bytes of the largest frame: the largest IP packet, an Ethernet header and a VLAN tag. A guest sends
/// [`MAX_PACKET`] at most, a host's kernel as much as this.
pub const FRAME_MAX: usize = MAX_PACKET + ETHERNET_HEADER + 4;

/// Where packets go to and come from.
pub trait NetPort {
    /// Memory for one packet.
    type Buf: PacketBuf;

    /// Bytes before every frame to be sent that belong to the port (a header it puts there). The
    /// frame may begin later.
    const HEADROOM: usize;

    /// Space for a packet to be sent.
    ///
    /// # Errors
    /// [`WouldBlock`] while every buffer is on its way out.
    fn reserve(&mut self) -> Result<Self::Buf, WouldBlock>;

    /// Exchanges reserved space for as much as a frame of `len` bytes needs: a port that has few
    /// large buffers gives a small one for it. Called once for each packet that is to be sent.
    fn fit(&mut self, buf: Self::Buf, len: usize) -> Self::Buf {
        let _ = len;
        buf
    }

    /// Gives reserved space back unused.
    fn unreserve(&mut self, buf: Self::Buf);

    /// Takes a packet to send, in reserved space. It may leave only with
    /// [`flush`](NetPort::flush).
    ///
    /// # Errors
    /// The port cannot send it; its buffer went back.
    fn send(&mut self, packet: Packet<Self::Buf>) -> Result<(), PortError>;

    /// The next packet that came in, if there is one. Those that are not asked for wait; a port
    /// whose buffers are all taken takes no more from wherever packets come from.
    fn receive(&mut self) -> Option<Packet<Self::Buf>>;

    /// Gives a received packet's buffer back.
    fn recycle(&mut self, buf: Self::Buf);

    /// Lets everything sent so far go.
    fn flush(&mut self);

    /// Tells the port the time, counted from any moment and never backwards: once a round, before
    /// anything else is asked of it.
    fn turn(&mut self, now: Duration) {
        let _ = now;
    }

    /// When [`turn`](NetPort::turn) is to be called though nothing happens; later than the last
    /// turn. `None` while nothing waits for its time.
    fn deadline(&self) -> Option<Duration> {
        None
    }
}

/// Memory of our own for one packet: as large as the packet, or, in the hand of a port that knows
/// nothing of it yet, as [`FRAME_MAX`] and the port's headroom.
pub trait PacketBuf: Send + 'static {
    /// The bytes.
    fn bytes(&self) -> &[u8];

    /// The bytes, to be changed.
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
impl PacketBuf for pvio_uring::PrivateBuf {
    fn bytes(&self) -> &[u8] {
        self.as_slice()
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        self.as_mut_slice()
    }
}

/// A packet in a buffer.
#[derive(Debug)]
pub struct Packet<B> {
    /// The memory.
    pub buf: B,
    /// Where the Ethernet frame begins, in bytes.
    pub start: usize,
    /// The frame's length in bytes, without FCS.
    pub len: usize,
    /// What is still to be done to it.
    pub offload: Offload,
}

impl<B: PacketBuf> Packet<B> {
    /// The Ethernet frame; empty when it does not lie in its buffer.
    #[must_use]
    pub fn frame(&self) -> &[u8] {
        let end = self.start.saturating_add(self.len);
        self.buf.bytes().get(self.start..end).unwrap_or_default()
    }

    /// The Ethernet frame, to be changed; empty when it does not lie in its buffer.
    pub fn frame_mut(&mut self) -> &mut [u8] {
        let end = self.start.saturating_add(self.len);
        self.buf.bytes_mut().get_mut(self.start..end).unwrap_or_default()
    }
}

/// What was left to whoever handles a packet next.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Offload {
    /// How far its transport checksum can be relied on.
    pub checksum: Checksum,
    /// How it is to be cut into segments, if it is.
    pub gso: Option<Gso>,
}

/// How far a packet's transport checksum can be relied on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Checksum {
    /// It is there, and nobody has looked at it.
    #[default]
    Unknown,
    /// It is there and right, or the data never left this machine.
    Validated,
    /// It holds the pseudo-header's sum only, to be completed.
    Partial {
        /// Where the sum begins, in bytes from the start of the frame.
        start: u16,
        /// Where the checksum stands, in bytes from `start`.
        offset: u16,
    },
}

/// How a packet is to be cut into segments.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gso {
    /// Bytes of payload in each.
    pub size: u16,
    /// What it is.
    pub kind: GsoKind,
}

/// Nothing can be taken just now; try again later.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the port can take nothing just now")]
pub struct WouldBlock;

/// The port could not send a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PortError {
    /// There is nobody at the other side.
    #[error("the port's other side is gone")]
    Gone,
    /// The packet is not one the port can carry.
    #[error("the port cannot carry such a packet")]
    Unsuited,
    /// The packet is not let through.
    #[error("the packet is not let through: {}", .0.code())]
    Refused(DropReason),
}

impl PortError {
    /// The reason by which the loss is counted.
    #[must_use]
    pub const fn reason(self) -> DropReason {
        match self {
            Self::Gone | Self::Unsuited => DropReason::TxPort,
            Self::Refused(reason) => reason,
        }
    }
}

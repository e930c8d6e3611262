//! Properties of packets, and what a frontend and a backend negotiated about them.

use pvio_ring::proto::netif::GsoKind;

/// The MTU of an interface whose toolstack names none, in bytes (`netif.h`).
pub(crate) const DEFAULT_MTU: u32 = 1500;

/// What was agreed with the backend. Nothing that is not in here is sent, and nothing else taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a feature of the protocol by itself")]
pub struct Features {
    /// The backend takes packets of several slots, so of more than 4096 bytes.
    pub sg: bool,
    /// It takes blank checksums over IPv4.
    pub checksum_v4: bool,
    /// It takes blank checksums over IPv6.
    pub checksum_v6: bool,
    /// It takes TCP over IPv4 to be segmented ([`Queue::send_gso`](crate::Queue::send_gso)).
    pub gso_v4: bool,
    /// It takes TCP over IPv6 to be segmented.
    pub gso_v6: bool,
    /// It may send TCP over IPv4 that is not segmented.
    pub takes_gso_v4: bool,
    /// It may send TCP over IPv6 that is not segmented.
    pub takes_gso_v6: bool,
}

/// How far a packet's transport checksum can be relied on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Checksum {
    /// It is there, and nobody has looked at it.
    #[default]
    Unknown,
    /// It is there and right, by the word of whoever sent the packet here.
    Validated,
    /// It holds the pseudo-header's sum only; the data never left this machine.
    Blank,
}

/// How a packet of TCP is, or would have been, cut into segments.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gso {
    /// Bytes of payload in each.
    pub size: u16,
    /// What it is.
    pub kind: GsoKind,
}

/// Counters of one queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// Packets sent.
    pub tx_packets: u64,
    /// Bytes of those.
    pub tx_bytes: u64,
    /// Slots that the backend answered with an error.
    pub tx_errors: u64,
    /// Packets received.
    pub rx_packets: u64,
    /// Bytes of those.
    pub rx_bytes: u64,
    /// Packets that the backend marked as broken, and were dropped.
    pub rx_errors: u64,
}

/// A group's station address.
pub type Group = [u8; 6];

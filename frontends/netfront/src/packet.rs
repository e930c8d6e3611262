//! Properties of packets, and what a frontend and a backend negotiated about them.

use pvio_ring::proto::netif::GsoKind;

/// MTU of an interface whose toolstack configures none, in bytes (`netif.h`).
pub(crate) const DEFAULT_MTU: u32 = 1500;

/// Negotiated features. A packet that needs a feature not listed here is neither sent nor accepted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a separate feature of the protocol")]
pub struct Features {
    /// The backend supports packets of several slots, that is, of more than 4096 bytes.
    pub sg: bool,
    /// The backend completes blank checksums over IPv4.
    pub checksum_v4: bool,
    /// The backend completes blank checksums over IPv6.
    pub checksum_v6: bool,
    /// The backend supports GSO for TCP over IPv4 ([`Queue::send_gso`](crate::Queue::send_gso)).
    pub gso_v4: bool,
    /// The backend supports GSO for TCP over IPv6.
    pub gso_v6: bool,
    /// The backend may send GSO packets of TCP over IPv4.
    pub takes_gso_v4: bool,
    /// The backend may send GSO packets of TCP over IPv6.
    pub takes_gso_v6: bool,
}

/// State of a packet's transport checksum.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Checksum {
    /// The checksum is present and was not verified.
    #[default]
    Unknown,
    /// The checksum is present, and the backend reports that it is valid.
    Validated,
    /// The checksum field holds only the sum of the pseudo-header; the data never left this
    /// machine.
    Blank,
}

/// How a TCP packet is to be, or was before it was merged, divided into segments.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gso {
    /// Payload of each segment, in bytes.
    pub size: u16,
    /// Protocols of the packet.
    pub kind: GsoKind,
}

/// Counters of one queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// Packets sent.
    pub tx_packets: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Slots that the backend completed with an error.
    pub tx_errors: u64,
    /// Packets received.
    pub rx_packets: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Packets that the backend marked as failed, and that were dropped.
    pub rx_errors: u64,
}

/// Multicast station address of a group.
pub type Group = [u8; 6];

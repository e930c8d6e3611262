//! Headers of packets, in network byte order, for private copies of frames.
//!
//! | header | source |
//! |---|---|
//! | [`Ethernet`], [`VlanTag`] | IEEE 802.3, IEEE 802.1Q |
//! | [`Arp`] | RFC 826, with the addresses of Ethernet and IPv4 |
//! | [`Ipv4`] | RFC 791 |
//! | [`Ipv6`], [`Ipv6Extension`] | RFC 8200 |
//! | [`Tcp`], [`Udp`] | RFC 9293, RFC 768 |
#![expect(missing_docs, reason = "the fields are those of the standards")]

use core::mem::offset_of;
use zerocopy::big_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Start of a frame. The payload, or tags, follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub struct Ethernet {
    pub destination: [u8; 6],
    pub source: [u8; 6],
    /// One of [`ether_type`].
    pub ether_type: U16,
}

/// Values of [`Ethernet::ether_type`].
pub mod ether_type {
    pub const IPV4: u16 = 0x0800;
    pub const ARP: u16 = 0x0806;
    pub const IPV6: u16 = 0x86dd;
    /// A [`VlanTag`](super::VlanTag) follows: of a customer, or of a service provider.
    pub const VLAN: [u16; 2] = [0x8100, 0x88a8];
}

/// The rest of a VLAN tag, after its type.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub struct VlanTag {
    pub control: U16,
    pub ether_type: U16,
}

/// An ARP packet.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub struct Arp {
    pub hardware_type: U16,
    pub protocol_type: U16,
    pub hardware_len: u8,
    pub protocol_len: u8,
    pub operation: U16,
    pub sender_hardware: [u8; 6],
    pub sender_protocol: [u8; 4],
    pub target_hardware: [u8; 6],
    pub target_protocol: [u8; 4],
}

impl Arp {
    /// Returns whether it has the addresses of Ethernet and IPv4, of 6 and 4 bytes: the only valid
    /// combination.
    #[must_use]
    pub fn is_ipv4_over_ethernet(&self) -> bool {
        (self.hardware_type.get(), self.protocol_type.get()) == (1, ether_type::IPV4)
            && (self.hardware_len, self.protocol_len) == (6, 4)
    }
}

/// The header of an IPv4 packet without options.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub struct Ipv4 {
    pub version_ihl: u8,
    pub type_of_service: u8,
    pub total_len: U16,
    pub id: U16,
    pub fragment: U16,
    pub time_to_live: u8,
    pub protocol: u8,
    pub checksum: U16,
    pub source: [u8; 4],
    pub destination: [u8; 4],
}

impl Ipv4 {
    /// Returns the size of the header with its options, in bytes.
    #[must_use]
    pub fn header_len(&self) -> usize {
        usize::from(self.version_ihl & 15).saturating_mul(4)
    }

    /// Returns whether the packet is a fragment: more follow, or it is not the first.
    #[must_use]
    pub fn is_fragment(&self) -> bool {
        self.fragment.get() & 0x3fff != 0
    }

    /// Returns both addresses, source first.
    #[must_use]
    pub fn addresses(&self) -> &[u8] {
        self.as_bytes().get(offset_of!(Self, source)..).unwrap_or_default()
    }
}

/// The fixed header of an IPv6 packet.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub struct Ipv6 {
    pub version_class_flow: U32,
    pub payload_len: U16,
    pub next_header: u8,
    pub hop_limit: u8,
    pub source: [u8; 16],
    pub destination: [u8; 16],
}

impl Ipv6 {
    /// Returns both addresses, source first.
    #[must_use]
    pub fn addresses(&self) -> &[u8] {
        self.as_bytes().get(offset_of!(Self, source)..).unwrap_or_default()
    }
}

/// The first bytes of an extension header of IPv6.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub struct Ipv6Extension {
    pub next_header: u8,
    /// Length after the first 8 bytes, in units of the header's kind.
    pub len: u8,
}

/// The header of a TCP segment without options.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub struct Tcp {
    pub source_port: U16,
    pub destination_port: U16,
    pub sequence: U32,
    pub acknowledgment: U32,
    pub data_offset: u8,
    pub flags: u8,
    pub window: U16,
    pub checksum: U16,
    pub urgent_pointer: U16,
}

impl Tcp {
    /// Returns the size of the header with its options, in bytes.
    #[must_use]
    pub fn header_len(&self) -> usize {
        usize::from(self.data_offset >> 4).saturating_mul(4)
    }

    /// Returns both ports, source first.
    #[must_use]
    pub fn ports(&self) -> [u8; 4] {
        let ([s0, s1], [d0, d1]) = (self.source_port.to_bytes(), self.destination_port.to_bytes());
        [s0, s1, d0, d1]
    }
}

/// The header of a UDP datagram.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub struct Udp {
    pub source_port: U16,
    pub destination_port: U16,
    pub len: U16,
    pub checksum: U16,
}

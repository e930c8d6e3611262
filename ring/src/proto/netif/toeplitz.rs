//! The hash that steers received packets to a guest's queues (`io/netif.h`, "Hash types", "Hash
//! algorithms"): Microsoft's Toeplitz hash of receive-side scaling.

use super::HashTypes;
use crate::proto::checksum::{IpVersion, Transport};
use crate::proto::headers::{Ipv4, Ipv6, Tcp};
use zerocopy::FromBytes;

/// Maximum length of a key, in bytes: enough for the longest input, and Linux's limit.
pub const HASH_KEY_MAX: usize = 40;

/// Which fields of a packet were hashed (`_XEN_NETIF_CTRL_HASH_TYPE_*`: the bit's number, as in an
/// [extra segment](super::ExtraKind::Hash)).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum HashKind {
    /// The addresses of IPv4.
    V4 = 0,
    /// The addresses and ports of TCP over IPv4.
    V4Tcp = 1,
    /// The addresses of IPv6.
    V6 = 2,
    /// The addresses and ports of TCP over IPv6.
    V6Tcp = 3,
}

/// Returns the Toeplitz hash of `data`; a key that is too short is padded with zeroes.
#[must_use]
pub fn toeplitz(key: &[u8; HASH_KEY_MAX], data: &[u8]) -> u32 {
    // The upper half is the part of the key that is aligned with the next input bits.
    let (first, rest) = key.split_at(8);
    let mut window = first.iter().fold(0_u64, |window, byte| window << 8 | u64::from(*byte));
    let mut rest = rest.iter();
    let mut hash = 0_u64;
    for byte in data {
        for bit in (0..8).rev() {
            if byte >> bit & 1 == 1 {
                hash ^= window;
            }
            window <<= 1;
        }
        window |= rest.next().copied().map_or(0, u64::from);
    }
    (hash >> 32) as u32
}

/// Returns the hash of an Ethernet frame, over as many of its fields as `types` permits; `None` if
/// no kind in `types` applies. Fragments have no ports.
#[must_use]
pub fn hash_frame(
    frame: &[u8],
    types: HashTypes,
    key: &[u8; HASH_KEY_MAX],
) -> Option<(HashKind, u32)> {
    let (version, ip) = IpVersion::of(frame)?;
    let packet = frame.get(ip..)?;
    let (addresses, plain, tcp) = match version {
        IpVersion::V4 => {
            let (header, _) = Ipv4::ref_from_prefix(packet).ok()?;
            (header.addresses(), HashTypes::IPV4, HashTypes::IPV4_TCP)
        }
        IpVersion::V6 => {
            let (header, _) = Ipv6::ref_from_prefix(packet).ok()?;
            (header.addresses(), HashTypes::IPV6, HashTypes::IPV6_TCP)
        }
    };
    let ports = if types.contains(tcp) { tcp_ports(frame) } else { None };
    if ports.is_none() && !types.contains(plain) {
        return None;
    }
    let kind = match (version, ports.is_some()) {
        (IpVersion::V4, false) => HashKind::V4,
        (IpVersion::V4, true) => HashKind::V4Tcp,
        (IpVersion::V6, false) => HashKind::V6,
        (IpVersion::V6, true) => HashKind::V6Tcp,
    };
    let mut input = [0; 36];
    let len = addresses.len();
    input.get_mut(..len)?.copy_from_slice(addresses);
    let mut end = len;
    if let Some(ports) = ports {
        end = len.saturating_add(ports.len());
        input.get_mut(len..end)?.copy_from_slice(&ports);
    }
    Some((kind, toeplitz(key, input.get(..end)?)))
}

/// Returns the TCP ports, source first.
fn tcp_ports(frame: &[u8]) -> Option<[u8; 4]> {
    let transport = Transport::of(frame).ok().filter(|transport| !transport.udp)?;
    let (tcp, _) = Tcp::ref_from_prefix(frame.get(transport.start..)?).ok()?;
    Some(tcp.ports())
}

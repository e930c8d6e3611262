//! Location, computation and verification of a frame's transport checksum (RFC 1071).
//!
//! netif's flags tell only *that* a TCP or UDP checksum is left blank (`csum_blank`: the field
//! holds the sum of the pseudo-header, and the receiver must complete it), not *where* it is. This
//! module finds the field, in a private copy of the frame.

use super::headers::{Ethernet, Ipv4, Ipv6, Ipv6Extension, Tcp, Udp, VlanTag, ether_type};
use core::mem::offset_of;
use zerocopy::FromBytes;

/// Size of an Ethernet header, in bytes (`ETH_HLEN`).
pub const ETHERNET_HEADER: usize = size_of::<Ethernet>();

const MAX_VLAN_TAGS: usize = 2;
/// Maximum number of extension headers that are parsed; valid packets have a few.
const MAX_EXTENSIONS: usize = 8;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// IP version; offload is negotiated per version.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IpVersion {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl IpVersion {
    /// Returns the IP version of an Ethernet frame, by its type, and the offset of the IP header;
    /// `None` for any other frame.
    #[must_use]
    pub fn of(frame: &[u8]) -> Option<(Self, usize)> {
        let (head, mut rest) = Ethernet::ref_from_prefix(frame).ok()?;
        let (mut kind, mut ip) = (head.ether_type.get(), size_of::<Ethernet>());
        for _ in 0..MAX_VLAN_TAGS {
            if ether_type::VLAN.contains(&kind) {
                let (tag, after) = VlanTag::ref_from_prefix(rest).ok()?;
                (kind, rest) = (tag.ether_type.get(), after);
                ip = ip.saturating_add(size_of::<VlanTag>());
            }
        }
        match kind {
            ether_type::IPV4 => Some((Self::V4, ip)),
            ether_type::IPV6 => Some((Self::V6, ip)),
            _ => None,
        }
    }
}

/// Why a frame has no transport checksum that can be offloaded.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NoTransport {
    /// Not IP.
    #[error("not an IP packet")]
    NotIp,
    /// IP, but neither TCP nor UDP.
    #[error("neither TCP nor UDP")]
    OtherProtocol,
    /// A fragment: its checksum covers data in other fragments.
    #[error("an IP fragment")]
    Fragment,
    /// A length that is out of bounds, a truncated header, or too many headers.
    #[error("malformed IP packet")]
    Malformed,
}

/// The transport header of one frame. All offsets are in bytes from the start of the frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Transport {
    /// IPv4 or IPv6.
    pub version: IpVersion,
    /// Whether the protocol is UDP, where a checksum of 0 means none; otherwise it is TCP.
    pub udp: bool,
    /// Offset of the transport header, where the checksummed range begins.
    pub start: usize,
    /// Offset of the checksum field, relative to `start`.
    pub offset: usize,
    /// End of the transport's data: less than the frame's length if that is padded.
    pub end: usize,
    /// The sum of the pseudo-header, folded.
    pub pseudo_sum: u16,
}

impl Transport {
    /// Finds the transport header of an Ethernet frame.
    ///
    /// # Errors
    /// A [`NoTransport`] with the reason.
    pub fn of(frame: &[u8]) -> Result<Self, NoTransport> {
        match IpVersion::of(frame) {
            Some((IpVersion::V4, ip)) => Self::of_ipv4(frame, ip),
            Some((IpVersion::V6, ip)) => Self::of_ipv6(frame, ip),
            None => Err(NoTransport::NotIp),
        }
    }

    /// Makes the checksum blank: writes the pseudo-header's sum into the field.
    ///
    /// `frame` must be the frame that was parsed.
    pub fn blank(&self, frame: &mut [u8]) {
        self.store(frame, self.pseudo_sum);
    }

    /// Computes the checksum and writes it into the field.
    ///
    /// `frame` must be the frame that was parsed.
    pub fn fill(&self, frame: &mut [u8]) {
        self.store(frame, 0);
        let sum = sum(frame.get(self.start..self.end).unwrap_or_default());
        let checksum = !fold(sum.wrapping_add(u64::from(self.pseudo_sum)));
        self.store(frame, if checksum == 0 { 0xffff } else { checksum });
    }

    /// Returns whether the checksum is valid.
    ///
    /// `frame` must be the frame that was parsed.
    #[must_use]
    pub fn verify(&self, frame: &[u8]) -> bool {
        if self.udp && u16_at(frame, self.start.saturating_add(self.offset)) == Some(0) {
            // A UDP checksum of 0 is allowed over IPv4 only (RFC 8200, 8.1).
            return self.version == IpVersion::V4;
        }
        let sum = sum(frame.get(self.start..self.end).unwrap_or_default());
        fold(sum.wrapping_add(u64::from(self.pseudo_sum))) == 0xffff
    }

    fn store(&self, frame: &mut [u8], value: u16) {
        let at = self.start.saturating_add(self.offset);
        if let Some(field) = frame.get_mut(at..at.saturating_add(2)) {
            field.copy_from_slice(&value.to_be_bytes());
        }
    }

    fn of_ipv4(frame: &[u8], ip: usize) -> Result<Self, NoTransport> {
        let bad = NoTransport::Malformed;
        let header = frame.get(ip..).and_then(|rest| Ipv4::ref_from_prefix(rest).ok());
        let (header, _) = header.ok_or(bad)?;
        let header_len = header.header_len();
        let total = usize::from(header.total_len.get());
        let end = ip.saturating_add(total);
        let version = header.version_ihl >> 4;
        if version != 4 || header_len < 20 || total < header_len || end > frame.len() {
            return Err(bad);
        }
        if header.is_fragment() {
            return Err(NoTransport::Fragment);
        }
        let start = ip.saturating_add(header_len);
        Self::with(IpVersion::V4, header.protocol, start, end, header.addresses())
    }

    fn of_ipv6(frame: &[u8], ip: usize) -> Result<Self, NoTransport> {
        const HOP_BY_HOP: u8 = 0;
        const ROUTING: u8 = 43;
        const FRAGMENT: u8 = 44;
        const AUTHENTICATION: u8 = 51;
        const DESTINATION: u8 = 60;

        let bad = NoTransport::Malformed;
        let header = frame.get(ip..).and_then(|rest| Ipv6::ref_from_prefix(rest).ok());
        let (header, _) = header.ok_or(bad)?;
        let mut next = header.next_header;
        let mut start = ip.saturating_add(size_of::<Ipv6>());
        let end = start.saturating_add(usize::from(header.payload_len.get()));
        if header.version_class_flow.get() >> 28 != 6 || end > frame.len() {
            return Err(bad);
        }
        for _ in 0..MAX_EXTENSIONS {
            let unit = match next {
                HOP_BY_HOP | DESTINATION => 8_usize,
                // The pseudo-header contains the final destination, which is in the IPv6 header
                // only if no segments are left (RFC 8200, 8.1).
                ROUTING if frame.get(start.saturating_add(3)) == Some(&0) => 8,
                ROUTING => return Err(bad),
                AUTHENTICATION => 4,
                FRAGMENT => return Err(NoTransport::Fragment),
                _ => return Self::with(IpVersion::V6, next, start, end, header.addresses()),
            };
            let rest = frame.get(start..end).ok_or(bad)?;
            let (extension, _) = Ipv6Extension::ref_from_prefix(rest).map_err(|_| bad)?;
            // The length does not include the first 8 bytes, whatever its unit.
            let units = usize::from(extension.len).saturating_mul(unit);
            start = start.saturating_add(8).saturating_add(units);
            next = extension.next_header;
        }
        Err(bad)
    }

    fn with(
        version: IpVersion,
        protocol: u8,
        start: usize,
        end: usize,
        addresses: &[u8],
    ) -> Result<Self, NoTransport> {
        let (offset, header_len) = match protocol {
            TCP => (offset_of!(Tcp, checksum), size_of::<Tcp>()),
            UDP => (offset_of!(Udp, checksum), size_of::<Udp>()),
            _ => return Err(NoTransport::OtherProtocol),
        };
        let len = end.checked_sub(start).filter(|&l| l >= header_len);
        let len = len.ok_or(NoTransport::Malformed)?;
        let pseudo = sum(addresses).wrapping_add(u64::from(protocol)).wrapping_add(len as u64);
        let pseudo_sum = fold(pseudo);
        Ok(Self { version, udp: protocol == UDP, start, offset, end, pseudo_sum })
    }
}

/// Completes a checksum whose offset is known although its protocol may not be: sums all bytes from
/// `start` to the end of the frame, including the field at `start + offset`, and writes the result
/// there. Returns `false`, and changes nothing, if the field is outside the frame.
#[must_use]
pub fn complete(frame: &mut [u8], start: usize, offset: usize) -> bool {
    let Some(at) = start.checked_add(offset) else { return false };
    let Some(end) = at.checked_add(2) else { return false };
    let Some(data) = frame.get(start..).filter(|_| end <= frame.len()) else { return false };
    let checksum = !fold(sum(data));
    let Some(field) = frame.get_mut(at..end) else { return false };
    field.copy_from_slice(&(if checksum == 0 { 0xffff } else { checksum }).to_be_bytes());
    true
}

/// Returns the checksum (RFC 1071) of bytes whose checksum field is 0.
#[must_use]
pub fn internet_checksum(bytes: &[u8]) -> u16 {
    !fold(sum(bytes))
}

/// Returns the one's complement sum of big-endian 16-bit words, not folded; an odd last byte is the
/// high half of a word. Cannot overflow below 2⁴⁸ bytes.
fn sum(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<4>();
    let high = words.iter().fold(0_u64, |s, w| s.wrapping_add(u64::from(u32::from_be_bytes(*w))));
    let (pairs, odd) = rest.as_chunks::<2>();
    let pairs = pairs.iter().fold(0_u64, |s, w| s.wrapping_add(u64::from(u16::from_be_bytes(*w))));
    let odd = odd.first().map_or(0, |&b| u64::from(b) << 8);
    // Folding is linear: a 32-bit word is equivalent to the sum of its halves, modulo 2¹⁶ − 1.
    high.wrapping_add(pairs).wrapping_add(odd)
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff).wrapping_add(sum >> 16);
    }
    sum as u16
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let chunk = bytes.get(at..)?.first_chunk::<2>()?;
    Some(u16::from_be_bytes(*chunk))
}

#[cfg(test)]
#[expect(clippy::indexing_slicing, clippy::arithmetic_side_effects, reason = "tests")]
mod tests {
    use super::*;
    extern crate std;
    use std::vec::Vec;

    /// An Ethernet frame with an IPv4 packet of the given protocol and payload.
    fn ipv4(protocol: u8, payload: &[u8], padding: usize) -> Vec<u8> {
        let mut f = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0].to_vec();
        let total = (20 + payload.len()) as u16;
        f.extend([0x45, 0, (total >> 8) as u8, total as u8, 0, 0, 0x40, 0, 64, protocol, 0, 0]);
        f.extend([192, 168, 0, 31, 192, 168, 0, 30]);
        f.extend(payload);
        f.extend(std::iter::repeat_n(0xaa, padding));
        f
    }

    #[test]
    fn known_udp_checksum_is_computed_and_verified() {
        // Computed by hand: 192.168.0.31 → 192.168.0.30, ports 20 → 10, "Hi": checksum 0x35c5.
        let udp = [0, 20, 0, 10, 0, 10, 0, 0, b'H', b'i'];
        let mut frame = ipv4(UDP, &udp, 0);
        let t = Transport::of(&frame).unwrap();
        assert_eq!((t.start, t.offset, t.end), (34, 6, 44));
        t.fill(&mut frame);
        assert_eq!(&frame[40..42], [0x35, 0xc5]);
        assert!(t.verify(&frame));
        frame[43] ^= 1;
        assert!(!t.verify(&frame));
    }

    #[test]
    fn blank_then_complete_equals_fill() {
        for len in [20, 21, 22, 23, 1460] {
            let tcp: Vec<u8> = (0..len).map(|i| (i * 7) as u8).collect();
            let mut filled = ipv4(TCP, &tcp, 0);
            let t = Transport::of(&filled).unwrap();
            let mut blank = filled.clone();
            t.fill(&mut filled);
            t.blank(&mut blank);
            assert!(!t.verify(&blank));
            assert!(complete(&mut blank, t.start, t.offset));
            assert_eq!(filled, blank);
        }
    }

    #[test]
    fn ethernet_padding_is_not_summed() {
        let mut frame = ipv4(TCP, &[9; 21], 19);
        let t = Transport::of(&frame).unwrap();
        t.fill(&mut frame);
        assert!(t.verify(&frame));
        *frame.last_mut().unwrap() = 0;
        assert!(t.verify(&frame));
    }

    #[test]
    fn ipv6_with_extension_headers_and_vlan_is_parsed() {
        let udp = [0, 1, 0, 2, 0, 9, 0, 0, 7];
        let mut f = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x81, 0, 0, 5, 0x86, 0xdd].to_vec();
        f.extend([0x60, 0, 0, 0, 0, 8 + 16 + 9, 0, 64]);
        f.extend([0xfe; 32]);
        f.extend([60, 0, 1, 4, 0, 0, 0, 0]);
        f.extend([UDP, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        f.extend(udp);
        let t = Transport::of(&f).unwrap();
        assert_eq!((t.version, t.udp, t.start, t.end), (IpVersion::V6, true, 18 + 64, f.len()));
        assert!(!t.verify(&f), "UDP over IPv6 must have a checksum");
        t.fill(&mut f);
        assert!(t.verify(&f));
    }

    #[test]
    fn frame_without_transport_header_returns_reason() {
        let of = |f: &[u8]| Transport::of(f).unwrap_err();
        assert_eq!(of(&[]), NoTransport::NotIp);
        assert_eq!(of(&[0; 60]), NoTransport::NotIp);
        assert_eq!(of(&ipv4(1, &[0; 20], 0)), NoTransport::OtherProtocol);
        assert_eq!(of(&ipv4(TCP, &[0; 19], 40)), NoTransport::Malformed);
        let mut fragment = ipv4(UDP, &[0; 64], 0);
        fragment[20] = 0x20;
        assert_eq!(of(&fragment), NoTransport::Fragment);
        let whole = ipv4(TCP, &[0; 20], 0);
        for len in 14..whole.len() {
            assert_eq!(of(&whole[..len]), NoTransport::Malformed, "cut to {len}");
        }
        let mut chain = [0; 14 + 40 + 80].to_vec();
        (chain[12], chain[13], chain[14], chain[19]) = (0x86, 0xdd, 0x60, 80);
        assert_eq!(of(&chain), NoTransport::Malformed, "hop-by-hop without end");
    }

    #[test]
    fn complete_outside_frame_is_rejected() {
        let mut frame = [0; 40];
        for (start, offset) in [(40, 0), (0, 39), (39, 0), (usize::MAX, 1), (41, 0)] {
            assert!(!complete(&mut frame, start, offset), "{start}+{offset}");
        }
        assert!(complete(&mut frame, 0, 38));
    }
}

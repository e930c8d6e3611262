//! Size of a packet on the wire: the frames after segmentation, each with its headers.
#![forbid(unsafe_code)]

use crate::port::Gso;
use pvio_ring::proto::checksum::{ETHERNET_HEADER, Transport};
use pvio_ring::proto::headers::{Ipv4, Tcp};
use zerocopy::FromBytes;

/// Smallest segment size that is forwarded. Linux's TCP sends no smaller ones: its least MSS
/// (`TCP_MIN_SND_MSS`) is 48, of which options take up to 40. With smaller segments the headers
/// would be many times the size of the data.
pub const SEGMENT_MIN: u16 = 8;

/// Size of Ethernet, IPv4 and TCP headers without options, in bytes.
const HEADERS_MIN: usize = ETHERNET_HEADER + size_of::<Ipv4>() + size_of::<Tcp>();

/// Bytes and frames on the wire.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WireCost {
    /// Size of all frames in bytes, without preamble and FCS.
    pub bytes: u64,
    /// Number of frames.
    pub frames: u64,
}

impl WireCost {
    /// Returns the cost of a packet that is not segmented.
    pub fn whole(len: usize) -> Self {
        Self { bytes: len as u64, frames: 1 }
    }

    /// Returns the least cost of a packet whose headers are not known yet.
    pub fn least(len: usize, gso: Option<Gso>) -> Self {
        gso.map_or(Self::whole(len), |gso| Self::segmented(len, HEADERS_MIN, gso))
    }

    /// Returns the cost of a packet.
    pub fn of(frame: &[u8], gso: Option<Gso>) -> Self {
        let Some(gso) = gso else { return Self::whole(frame.len()) };
        Self::segmented(frame.len(), headers(frame).unwrap_or(HEADERS_MIN), gso)
    }

    fn segmented(len: usize, headers: usize, gso: Gso) -> Self {
        let data = len.saturating_sub(headers);
        let frames = data.div_ceil(usize::from(gso.size.max(1))).max(1);
        let repeated = headers.saturating_mul(frames.saturating_sub(1));
        Self { bytes: len.saturating_add(repeated) as u64, frames: frames as u64 }
    }

    /// Returns the excess over another cost.
    pub fn beyond(self, other: Self) -> Self {
        let bytes = self.bytes.saturating_sub(other.bytes);
        Self { bytes, frames: self.frames.saturating_sub(other.frames) }
    }
}

/// Returns the number of bytes before the payload of a TCP packet.
pub fn headers(frame: &[u8]) -> Option<usize> {
    let transport = Transport::of(frame).ok().filter(|t| !t.udp)?;
    let (tcp, _) = Tcp::ref_from_prefix(frame.get(transport.start..)?).ok()?;
    let len = tcp.header_len();
    (len >= size_of::<Tcp>()).then(|| transport.start.saturating_add(len))
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use pvio_ring::proto::netif::GsoKind;

    #[test]
    fn wire_cost_of_gso_packet_counts_headers_per_segment() {
        let gso = |size| Some(Gso { size, kind: GsoKind::TcpV4 });
        let cost = |bytes, frames| WireCost { bytes, frames };
        assert_eq!(WireCost::least(1514, None), cost(1514, 1));
        assert_eq!(WireCost::least(54 + 3000, gso(1000)), cost(3 * 54 + 3000, 3));
        assert_eq!(WireCost::least(54 + 3001, gso(1000)), cost(4 * 54 + 3001, 4));
        assert_eq!(WireCost::least(54 + 65_000, gso(1)), cost(65_000 * 55, 65_000));
        for len in [0, 53, 54, 55, 1054] {
            assert_eq!(WireCost::least(len, gso(1000)), cost(len as u64, 1), "{len}");
        }
        // TCP with 12 bytes of options, behind a VLAN tag.
        let mut frame = vec![0; 70 + 2000];
        frame[12..18].copy_from_slice(&[0x81, 0, 0, 5, 8, 0]);
        frame[18..28].copy_from_slice(&[0x45, 0, 0x08, 0x04, 0, 0, 0, 0, 64, 6]);
        frame[38 + 12] = 0x80;
        assert_eq!(headers(&frame), Some(70));
        assert_eq!(WireCost::of(&frame, gso(1000)), cost(2 * 70 + 2000, 2));
        assert_eq!(WireCost::of(&frame, None), cost(2070, 1));
    }
}

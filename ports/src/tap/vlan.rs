//! Segmentation of packets that a guest cannot process unsegmented: behind a VLAN tag, frontends
//! find neither a blank checksum nor the headers to segment by (Linux: `skb_checksum_setup` reads
//! the outermost type). The kernel behind a tap leaves both to the receiver even if there is a tag.
#![forbid(unsafe_code)]

use crate::buffers::FRAME_AT;
use crate::segment::Segments;
use crate::{Checksum, Offload, Packet};
use pvio_ring::proto::checksum::{ETHERNET_HEADER, IpVersion};
use pvio_runtime::PrivateBuf;

/// Packet with a VLAN tag that is being segmented.
pub(super) struct VlanSegments {
    packet: Packet<PrivateBuf>,
    /// Number of segments that were written.
    written: u16,
}

impl VlanSegments {
    /// Returns the packet as `Err` if it need not be segmented.
    pub fn of(packet: Packet<PrivateBuf>) -> Result<Self, Packet<PrivateBuf>> {
        let tagged = || IpVersion::of(packet.frame()).is_some_and(|(_, ip)| ip > ETHERNET_HEADER);
        if packet.offload.gso.is_none() || !tagged() {
            return Err(packet);
        }
        Ok(Self { packet, written: 0 })
    }

    /// Returns the next segment, in the given buffer. Returns the buffer as `Err` if there is none.
    pub fn next(&mut self, mut buf: PrivateBuf) -> Result<Packet<PrivateBuf>, PrivateBuf> {
        let gso = self.packet.offload.gso;
        let segments = gso.and_then(|gso| Segments::of(self.packet.frame(), gso));
        let Some(mut segments) = segments else { return Err(buf) };
        segments.skip(self.written);
        let out = buf.as_mut_slice().get_mut(FRAME_AT..);
        let Some(len) = out.and_then(|out| segments.write(out)) else { return Err(buf) };
        self.written = self.written.saturating_add(1);
        let offload = Offload { checksum: Checksum::Validated, gso: None };
        Ok(Packet { buf, start: FRAME_AT, len, offload })
    }

    /// Returns the buffer of the unsegmented packet.
    pub fn into_buf(self) -> PrivateBuf {
        self.packet.buf
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Gso;
    use crate::buffers::LARGE;
    use alloc::vec::Vec;
    use pvio_ring::proto::netif::GsoKind;

    /// Returns a TCP over IPv4 packet, with or without a VLAN tag, with a segment size of 1000
    /// bytes.
    fn packet(tag: &[u8], data: &[u8]) -> Packet<PrivateBuf> {
        let mut frame: Vec<u8> = [2; 12].to_vec();
        frame.extend(tag);
        frame.extend([8, 0, 0x45, 0]);
        frame.extend(u16::try_from(40 + data.len()).unwrap().to_be_bytes());
        frame.extend([0, 1, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend([0, 1, 0, 2, 0, 0, 0, 7, 0, 0, 0, 0, 0x50, 0x18, 1, 0, 0, 0, 0, 0]);
        frame.extend(data);
        let mut buf = PrivateBuf::page_aligned(LARGE);
        buf.as_mut_slice()[FRAME_AT..][..frame.len()].copy_from_slice(&frame);
        let start = u16::try_from(34 + tag.len()).unwrap();
        let offload = Offload {
            checksum: Checksum::Partial { start, offset: 16 },
            gso: Some(Gso { size: 1000, kind: GsoKind::TcpV4 }),
        };
        Packet { buf, start: FRAME_AT, len: frame.len(), offload }
    }

    #[test]
    fn gso_packet_without_vlan_tag_is_not_cut() {
        assert!(VlanSegments::of(packet(&[], &[1; 3000])).is_err());
    }

    #[test]
    fn gso_packet_with_vlan_tag_is_cut_into_segments_with_checksums() {
        let data: Vec<u8> = (0..3500_u32).map(|i| (i % 251) as u8).collect();
        let mut segments = VlanSegments::of(packet(&[0x81, 0, 0, 5], &data)).ok().unwrap();
        let mut all = Vec::new();
        while let Ok(segment) = segments.next(PrivateBuf::page_aligned(LARGE)) {
            let frame = segment.frame();
            assert_eq!(segment.offload, Offload { checksum: Checksum::Validated, gso: None });
            assert_eq!(frame[12..18], [0x81, 0, 0, 5, 8, 0]);
            let seq = u32::from_be_bytes(*frame[42..].first_chunk().unwrap());
            assert_eq!(seq, 7 + u32::try_from(all.len()).unwrap());
            let mut again = frame.to_vec();
            pvio_ring::proto::checksum::Transport::of(frame).unwrap().fill(&mut again);
            assert_eq!(again, frame);
            all.extend_from_slice(&frame[58..]);
        }
        assert_eq!(all, data);
    }
}

//! The header before each packet of a tap (`linux/virtio_net.h`).
#![forbid(unsafe_code)]

use super::device::VNET_HEADER;
use crate::{Checksum, Gso, Offload, Packet};
use bytemuck::{Pod, Zeroable};
use pvio_ring::proto::netif::GsoKind;
use pvio_runtime::PrivateBuf;

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
/// Flag in the type, set if the packet uses ECN.
const GSO_ECN: u8 = 0x80;

/// `struct virtio_net_hdr` in native byte order, as taps have it unless `TUNSETVNETLE` is set.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct VirtioNetHdr {
    flags: u8,
    gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
}

const _: () = assert!(size_of::<VirtioNetHdr>() == VNET_HEADER);

/// Returns the header for a packet to the tap.
pub(super) fn header_of(packet: &Packet<PrivateBuf>) -> [u8; VNET_HEADER] {
    let (flags, csum_start, csum_offset) = match packet.offload.checksum {
        Checksum::Unknown => (0, 0, 0),
        Checksum::Validated => (DATA_VALID, 0, 0),
        Checksum::Partial { start, offset } => (NEEDS_CSUM, start, offset),
    };
    let (gso_type, gso_size, hdr_len) = match packet.offload.gso {
        None => (0, 0, 0),
        Some(gso) => {
            // The length of the TCP header, in 32-bit words, is in the high half of its 13th byte.
            let doff = usize::from(csum_start).saturating_add(12);
            let words = packet.frame().get(doff).map_or(5, |b| u16::from(b >> 4));
            let kind = match gso.kind {
                GsoKind::TcpV4 => GSO_TCPV4,
                GsoKind::TcpV6 => GSO_TCPV6,
            };
            (kind, gso.size, csum_start.saturating_add(words.saturating_mul(4)))
        }
    };
    bytemuck::cast(VirtioNetHdr { flags, gso_type, hdr_len, gso_size, csum_start, csum_offset })
}

/// Parses a packet that was read: `len` bytes with its header, the frame at `start`. Returns the
/// buffer as `Err` if the header is missing.
pub(super) fn parse(
    buf: PrivateBuf,
    start: usize,
    len: usize,
) -> Result<Packet<PrivateBuf>, PrivateBuf> {
    let head = start
        .checked_sub(VNET_HEADER)
        .and_then(|at| buf.as_slice().get(at..))
        .and_then(|b| b.first_chunk::<VNET_HEADER>())
        .copied();
    let (Some(head), Some(len)) = (head, len.checked_sub(VNET_HEADER)) else { return Err(buf) };
    let head: VirtioNetHdr = bytemuck::cast(head);
    let checksum = if head.flags & NEEDS_CSUM != 0 {
        Checksum::Partial { start: head.csum_start, offset: head.csum_offset }
    } else if head.flags & DATA_VALID != 0 {
        Checksum::Validated
    } else {
        Checksum::Unknown
    };
    let size = head.gso_size;
    let gso = match head.gso_type & !GSO_ECN {
        GSO_TCPV4 => Some(Gso { size, kind: GsoKind::TcpV4 }),
        GSO_TCPV6 => Some(Gso { size, kind: GsoKind::TcpV6 }),
        // Other types were not enabled in the kernel.
        _ => None,
    };
    let offload = Offload { checksum, gso };
    Ok(Packet { buf, start, len, offload })
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    const FRAME_AT: usize = 4096;

    fn packet(offload: Offload) -> Packet<PrivateBuf> {
        let mut buf = PrivateBuf::page_aligned(8192);
        buf.as_mut_slice()[FRAME_AT + 34 + 12] = 0x80;
        Packet { buf, start: FRAME_AT, len: 100, offload }
    }

    #[test]
    fn vnet_header_round_trips_offload() {
        let partial = Checksum::Partial { start: 34, offset: 16 };
        for (checksum, gso) in [
            (Checksum::Unknown, None),
            (Checksum::Validated, None),
            (partial, None),
            (partial, Some(Gso { size: 1448, kind: GsoKind::TcpV4 })),
            (partial, Some(Gso { size: 1428, kind: GsoKind::TcpV6 })),
        ] {
            let offload = Offload { checksum, gso };
            let mut out = packet(offload);
            let header = header_of(&out);
            out.buf.as_mut_slice()[FRAME_AT - VNET_HEADER..FRAME_AT].copy_from_slice(&header);
            let back = parse(out.buf, FRAME_AT, VNET_HEADER + 100).unwrap();
            assert_eq!((back.offload, back.start, back.len), (offload, FRAME_AT, 100));
        }
    }

    #[test]
    fn vnet_header_bytes_match_kernel_layout() {
        let checksum = Checksum::Partial { start: 34, offset: 16 };
        let gso = Some(Gso { size: 1448, kind: GsoKind::TcpV4 });
        let words: Vec<u16> = [34 + 32, 1448, 34, 16].to_vec();
        let mut want = [1, 1].to_vec();
        words.iter().for_each(|w| want.extend(w.to_ne_bytes()));
        assert_eq!(header_of(&packet(Offload { checksum, gso })).to_vec(), want);
    }

    #[test]
    fn packet_shorter_than_vnet_header_is_rejected() {
        let buf = || PrivateBuf::page_aligned(8192);
        assert!(parse(buf(), FRAME_AT, VNET_HEADER - 1).is_err());
        assert_eq!(parse(buf(), FRAME_AT, VNET_HEADER).unwrap().len, 0);
    }
}

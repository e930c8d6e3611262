//! Checks whether a guest accepts a packet.

use crate::fault::DropReason;
use crate::port::{Checksum, FRAME_MAX, Packet, PacketBuf};
use crate::queue::{Features, Groups};
use pvio_ring::proto::checksum::{self, ETHERNET_HEADER, IpVersion, Transport};
use pvio_ring::proto::netif::GsoKind;
use pvio_ring::shm::SharedMemory;

/// Checks whether a packet can be delivered to this guest, and completes a checksum that the guest
/// cannot complete. `page` is the number of data bytes per page.
pub(super) fn accept<B: PacketBuf>(
    features: &Features,
    groups: &Groups<impl SharedMemory>,
    page: usize,
    packet: &mut Packet<B>,
) -> Result<(), DropReason> {
    let len = packet.frame().len();
    if len < ETHERNET_HEADER {
        return Err(DropReason::RxShort);
    }
    if !groups.wants(packet.frame()) {
        return Err(DropReason::RxGroup);
    }
    if let Some(gso) = packet.offload.gso {
        let allowed = match gso.kind {
            GsoKind::TcpV4 => features.gso_v4 || features.gso_prefix_v4,
            GsoKind::TcpV6 => features.gso_v6 || features.gso_prefix_v6,
        };
        if !allowed || gso.size == 0 {
            return Err(DropReason::RxGso);
        }
    }
    if len > FRAME_MAX || (len > page && !features.sg) {
        return Err(DropReason::RxTooBig);
    }
    if let Checksum::Partial { start, offset } = packet.offload.checksum {
        let (start, offset) = (usize::from(start), usize::from(offset));
        // The guest gets only a flag for a blank checksum. So the checksum must be where the guest
        // expects it, and of an IP version for which the guest completes it. No Linux guest
        // searches behind a VLAN tag (`skb_checksum_setup`), and Linux's netback leaves no such
        // checksum blank.
        let tagged =
            |frame: &[u8]| IpVersion::of(frame).is_some_and(|(_, ip)| ip > ETHERNET_HEADER);
        let found = Transport::of(packet.frame()).ok();
        let found = found.filter(|t| t.start == start && t.offset == offset);
        let found = found.filter(|_| !tagged(packet.frame()));
        let accepted = found.is_some_and(|t| match t.version {
            IpVersion::V4 => features.checksum_v4,
            IpVersion::V6 => features.checksum_v6,
        });
        if !accepted {
            if packet.offload.gso.is_some() {
                return Err(DropReason::RxGso);
            }
            if !checksum::complete(packet.frame_mut(), start, offset) {
                return Err(DropReason::RxChecksum);
            }
            packet.offload.checksum = Checksum::Validated;
        }
    }
    Ok(())
}

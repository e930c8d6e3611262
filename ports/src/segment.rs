//! Segmentation of a packet for a receiver that does not accept unsegmented packets.
#![forbid(unsafe_code)]

use crate::Gso;
use pvio_netback::wire::headers;
use pvio_ring::proto::checksum::{IpVersion, Transport, internet_checksum};
use pvio_ring::proto::headers::{Ipv4, Ipv6, Tcp};
use zerocopy::FromBytes;
use zerocopy::big_endian::U16;

/// Segmentation of a TCP packet in progress.
#[derive(Debug)]
pub(crate) struct Segments<'a> {
    frame: &'a [u8],
    size: usize,
    version: IpVersion,
    /// Offset of the IP header. The next fields are the offsets of the TCP header, the payload and
    /// the end of the payload.
    ip: usize,
    tcp: usize,
    data: usize,
    end: usize,
    /// Offset of the first byte that is not segmented yet.
    next: usize,
    index: u16,
}

const FIN: u8 = 1;
const PUSH: u8 = 8;
const CWR: u8 = 0x80;

impl<'a> Segments<'a> {
    /// Returns `None` if the packet cannot be segmented.
    pub fn of(frame: &'a [u8], gso: Gso) -> Option<Self> {
        let transport = Transport::of(frame).ok().filter(|t| !t.udp)?;
        let (_, ip) = IpVersion::of(frame)?;
        let (tcp, data) = (transport.start, headers(frame)?);
        let (size, end) = (usize::from(gso.size), transport.end);
        let fits = data < end && size > 0;
        let version = transport.version;
        fits.then_some(Self { frame, size, version, ip, tcp, data, end, next: data, index: 0 })
    }

    /// Returns the size of the largest segment in bytes.
    pub fn len_max(&self) -> usize {
        self.data.saturating_add(self.size)
    }

    /// Whether all segments have been written.
    pub fn is_done(&self) -> bool {
        self.next >= self.end
    }

    /// Skips segments that have been written before.
    pub fn skip(&mut self, segments: u16) {
        let bytes = usize::from(segments).saturating_mul(self.size);
        (self.next, self.index) = (self.data.saturating_add(bytes), segments);
    }

    /// Writes the next segment with its checksums and returns its length. Returns `None` after the
    /// last segment, or if it does not fit.
    pub fn write(&mut self, out: &mut [u8]) -> Option<usize> {
        if self.is_done() {
            return None;
        }
        let end = self.next.saturating_add(self.size).min(self.end);
        let (headers, part) = (self.frame.get(..self.data)?, self.frame.get(self.next..end)?);
        let len = headers.len().saturating_add(part.len());
        let out = out.get_mut(..len)?;
        let (head, body) = out.split_at_mut_checked(headers.len())?;
        head.copy_from_slice(headers);
        body.copy_from_slice(part);
        let done = u32::try_from(self.next.saturating_sub(self.data)).ok()?;
        let in_ip = u16::try_from(len.saturating_sub(self.ip)).ok()?;
        match self.version {
            IpVersion::V4 => {
                let header = head.get_mut(self.ip..self.tcp)?;
                let (ipv4, _) = Ipv4::mut_from_prefix(header).ok()?;
                ipv4.total_len = in_ip.into();
                ipv4.id = ipv4.id.get().wrapping_add(self.index).into();
                ipv4.checksum = U16::ZERO;
                let checksum = internet_checksum(header);
                let (ipv4, _) = Ipv4::mut_from_prefix(header).ok()?;
                ipv4.checksum = checksum.into();
            }
            IpVersion::V6 => {
                let (ipv6, _) = Ipv6::mut_from_prefix(head.get_mut(self.ip..)?).ok()?;
                ipv6.payload_len = in_ip.saturating_sub(size_of::<Ipv6>() as u16).into();
            }
        }
        let (tcp, _) = Tcp::mut_from_prefix(head.get_mut(self.tcp..)?).ok()?;
        tcp.sequence = tcp.sequence.get().wrapping_add(done).into();
        if end < self.end {
            tcp.flags &= !(FIN | PUSH);
        }
        if self.index > 0 {
            tcp.flags &= !CWR;
        }
        (self.next, self.index) = (end, self.index.wrapping_add(1));
        Transport::of(out).ok()?.fill(out);
        Some(len)
    }
}

//! Segmentation of a packet for a receiver that does not accept unsegmented packets.
#![forbid(unsafe_code)]

use crate::Gso;
use pvio_netback::wire::headers;
use pvio_ring::proto::checksum::{IpVersion, Transport};

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
        let mut at = 12_usize;
        while matches!(frame.get(at..)?.first_chunk()?, [0x81, 0] | [0x88, 0xa8]) {
            at = at.saturating_add(4);
        }
        let (ip, tcp, data) = (at.saturating_add(2), transport.start, headers(frame)?);
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
        let place = |at: usize| at..at.saturating_add(2);
        match self.version {
            IpVersion::V4 => {
                let header = head.get_mut(self.ip..self.tcp)?;
                header.get_mut(place(2))?.copy_from_slice(&in_ip.to_be_bytes());
                let id = u16::from_be_bytes(*header.get(4..)?.first_chunk()?);
                let id = id.wrapping_add(self.index);
                header.get_mut(place(4))?.copy_from_slice(&id.to_be_bytes());
                header.get_mut(place(10))?.fill(0);
                let sum = sum_of(header);
                header.get_mut(place(10))?.copy_from_slice(&sum.to_be_bytes());
            }
            IpVersion::V6 => {
                let length = in_ip.saturating_sub(40).to_be_bytes();
                head.get_mut(place(self.ip.saturating_add(4)))?.copy_from_slice(&length);
            }
        }
        let tcp = head.get_mut(self.tcp..)?;
        let seq = u32::from_be_bytes(*tcp.get(4..)?.first_chunk()?).wrapping_add(done);
        tcp.get_mut(4..8)?.copy_from_slice(&seq.to_be_bytes());
        let flags = tcp.get_mut(13)?;
        if end < self.end {
            *flags &= !(FIN | PUSH);
        }
        if self.index > 0 {
            *flags &= !CWR;
        }
        (self.next, self.index) = (end, self.index.wrapping_add(1));
        Transport::of(out).ok()?.fill(out);
        Some(len)
    }
}

/// Returns the checksum of an IPv4 header whose checksum field is 0.
fn sum_of(header: &[u8]) -> u16 {
    let words = header.chunks_exact(2).filter_map(|w| w.first_chunk().copied());
    let sum: u32 = words.map(|w| u32::from(u16::from_be_bytes(w))).sum();
    let fold = |sum: u32| (sum & 0xffff).saturating_add(sum >> 16);
    !(fold(fold(sum)) as u16)
}

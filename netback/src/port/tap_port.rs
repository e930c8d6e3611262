//! Packets through a tap, by io_uring: the port of a worker, and the one place it waits.
//!
//! Reads stand ready, each with a buffer of its own; writes go out in batches. Whatever else is to
//! wake the worker (event channels) is [watched](TapPort::watch) through the same io_uring.
#![forbid(unsafe_code)]

use super::tap::{Tap, VNET_HEADER};
use super::{Checksum, Gso, NetPort, Offload, Packet, PacketBuf, PortError, WouldBlock};
use crate::fault::DropReason;
use crate::queue::BACKLOG_PACKETS;
use crate::stats::Stats;
use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::time::Duration;
use pvio_ring::IoSeg;
use pvio_ring::proto::netif::GsoKind;
use pvio_uring::{FileId, PrivateBuf, Uring, whole};
use std::io;
use std::os::fd::OwnedFd;

/// Buffers for packets on their way out.
const WRITES: usize = 128;
/// Reads that stand ready at most, and at least. Every packet that arrives wakes every read that
/// stands ready, so there are many only while many packets arrive.
const READS_MOST: usize = 64;
const READS_LEAST: usize = 4;
/// Buffers for packets on their way in: what may wait for the guest, and reads besides, so that
/// a guest without buffers is noticed here and not by the kernel.
const BUFFERS_IN: usize = BACKLOG_PACKETS + 2 * READS_MOST;
const WATCHES: usize = 8;

const READ: u64 = 0;
const WRITE: u64 = 1;
/// Watch `n` has the token `WATCH + n`.
const WATCH: u64 = 2;

/// A tap as a port.
pub struct TapPort {
    uring: Uring<PrivateBuf>,
    tap: FileId,
    out: Vec<PrivateBuf>,
    inward: Vec<PrivateBuf>,
    received: VecDeque<Packet<PrivateBuf>>,
    /// Reads standing ready, and how many should.
    reads: usize,
    reads_wanted: usize,
    watches: Vec<Watched>,
    stats: Arc<Stats>,
    /// Why the tap cannot be read any more.
    broken: Option<i32>,
}

/// Names a descriptor that is watched.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Watch(usize);

struct Watched {
    file: FileId,
    armed: bool,
    fired: bool,
}

impl TapPort {
    /// A port on this tap, to be used by the thread that makes it. Packets lost on their way out
    /// are counted in `stats`.
    ///
    /// # Errors
    /// What `io_uring_setup` says.
    pub fn new(tap: Tap, stats: Arc<Stats>) -> io::Result<Self> {
        let mut uring = Uring::new((WRITES + READS_MOST + WATCHES) as u32)?;
        let tap = uring.add_file(tap.into_fd());
        let buffers = |count| {
            let buffer = || PrivateBuf::zeroed(VNET_HEADER + PrivateBuf::FRAME_MAX);
            core::iter::repeat_with(buffer).take(count).collect()
        };
        Ok(Self {
            uring,
            tap,
            out: buffers(WRITES),
            inward: buffers(BUFFERS_IN),
            received: VecDeque::with_capacity(READS_MOST),
            reads: 0,
            reads_wanted: READS_LEAST,
            watches: Vec::with_capacity(WATCHES),
            stats,
            broken: None,
        })
    }

    /// Also wakes when this descriptor becomes readable. `None` when too many are watched.
    pub fn watch(&mut self, file: OwnedFd) -> Option<Watch> {
        if self.watches.len() >= WATCHES {
            return None;
        }
        let file = self.uring.add_file(file);
        self.watches.push(Watched { file, armed: false, fired: false });
        Some(Watch(self.watches.len().saturating_sub(1)))
    }

    /// Whether a watched descriptor became readable since last asked. It is watched again from
    /// then on: empty it before the next [`wait`](Self::wait).
    pub fn fired(&mut self, watch: Watch) -> bool {
        self.watches.get_mut(watch.0).is_some_and(|w| core::mem::take(&mut w.fired))
    }

    /// Takes what the kernel has finished, and makes reads and watches stand ready again.
    ///
    /// # Errors
    /// The tap is gone, or io_uring fails.
    pub fn pump(&mut self) -> io::Result<()> {
        let before = (self.received.len(), self.reads);
        self.reap();
        if let Some(errno) = self.broken {
            return Err(io::Error::from_raw_os_error(errno));
        }
        let got = self.received.len().saturating_sub(before.0);
        if before.1 > 0 && got == before.1 {
            self.reads_wanted = self.reads_wanted.saturating_mul(2).min(READS_MOST);
        } else if got > 0 {
            self.reads_wanted = got.saturating_mul(2).clamp(READS_LEAST, READS_MOST);
        }
        self.arm();
        self.uring.flush()
    }

    /// Waits until something finishes or a watched descriptor becomes readable, or `timeout` is
    /// over. [`pump`](Self::pump) then takes it.
    ///
    /// # Errors
    /// What `io_uring_enter` says.
    pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.arm();
        self.uring.wait(timeout)
    }

    /// Whether there is something to [`pump`](Self::pump). Never waits, and costs next to nothing
    /// while there is not.
    ///
    /// # Errors
    /// What `io_uring_enter` says.
    pub fn look(&mut self) -> io::Result<bool> {
        self.uring.look()
    }

    fn reap(&mut self) {
        let Self { uring, out, inward, received, reads, watches, stats, broken, .. } = self;
        uring.reap(|done| match done.token {
            READ => {
                *reads = reads.saturating_sub(1);
                let Some(IoSeg { buf, .. }) = done.segments.pop() else { return };
                match done.result {
                    Ok(len) => match parse(buf, len as usize) {
                        Ok(packet) => received.push_back(packet),
                        Err(buf) => {
                            stats.drop_one(DropReason::RxShort);
                            inward.push(buf);
                        }
                    },
                    Err(EINTR | EAGAIN) => inward.push(buf),
                    Err(errno) => {
                        *broken = Some(errno);
                        inward.push(buf);
                    }
                }
            }
            WRITE => {
                if done.result.is_err() {
                    stats.drop_one(DropReason::TxPort);
                }
                out.extend(done.segments.pop().map(|seg| seg.buf));
            }
            token => {
                let index = usize::try_from(token.saturating_sub(WATCH)).unwrap_or(usize::MAX);
                if let Some(watch) = watches.get_mut(index) {
                    (watch.armed, watch.fired) = (false, true);
                }
            }
        });
    }

    fn arm(&mut self) {
        while self.reads < self.reads_wanted
            && let Some(buf) = self.inward.pop()
        {
            // There are as many slots as reads, writes and watches together.
            if self.uring.read_stream(self.tap, whole(buf), READ).is_err() {
                break;
            }
            self.reads = self.reads.saturating_add(1);
        }
        for (token, watch) in (WATCH..).zip(&mut self.watches) {
            if !watch.armed && !watch.fired {
                watch.armed = self.uring.poll_readable(watch.file, token).is_ok();
            }
        }
    }
}

const EINTR: i32 = 4;
const EAGAIN: i32 = 11;

impl NetPort for TapPort {
    type Buf = PrivateBuf;
    const HEADROOM: usize = VNET_HEADER;

    fn reserve(&mut self) -> Result<PrivateBuf, WouldBlock> {
        self.out.pop().ok_or(WouldBlock)
    }

    fn unreserve(&mut self, buf: PrivateBuf) {
        self.out.push(buf);
    }

    fn send(&mut self, mut packet: Packet<PrivateBuf>) -> Result<(), PortError> {
        let header = header_of(&packet);
        let head = packet.buf.as_mut_slice().first_chunk_mut::<VNET_HEADER>();
        let (Some(head), VNET_HEADER) = (head, packet.start) else {
            self.out.push(packet.buf);
            return Err(PortError::Unsuited);
        };
        *head = header;
        let len = VNET_HEADER.saturating_add(packet.len);
        let segment = IoSeg { buf: packet.buf, offset: 0, len };
        // A slot for every buffer; without one the buffer is gone with the segment.
        self.uring.write_stream(self.tap, [segment], WRITE).map_err(|_| PortError::Unsuited)
    }

    fn receive(&mut self) -> Option<Packet<PrivateBuf>> {
        self.received.pop_front()
    }

    fn recycle(&mut self, buf: PrivateBuf) {
        self.inward.push(buf);
    }

    fn flush(&mut self) {
        if let Err(error) = self.uring.flush() {
            // Nothing was taken by the kernel; the next wait says the same, to somebody who can
            // end the vif.
            tracing::debug!(%error, "cannot submit to the tap");
        }
    }
}

impl PacketBuf for PrivateBuf {
    fn bytes(&self) -> &[u8] {
        self.as_slice()
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        self.as_mut_slice()
    }
}

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
/// Set beside the type when the packet uses ECN.
const GSO_ECN: u8 = 0x80;

/// `struct virtio_net_hdr` for a packet to the tap: flags, gso_type, hdr_len, gso_size,
/// csum_start, csum_offset, in the machine's byte order.
fn header_of(packet: &Packet<PrivateBuf>) -> [u8; VNET_HEADER] {
    let (flags, start, offset) = match packet.offload.checksum {
        Checksum::Unknown => (0, 0, 0),
        Checksum::Validated => (DATA_VALID, 0, 0),
        Checksum::Partial { start, offset } => (NEEDS_CSUM, start, offset),
    };
    let (gso, size, headers) = match packet.offload.gso {
        None => (0, 0, 0),
        Some(gso) => {
            // The TCP header's length is in the high half of its 13th byte, in words.
            let doff = usize::from(start).saturating_add(12);
            let words = packet.frame().get(doff).map_or(5, |b| u16::from(b >> 4));
            let kind = match gso.kind {
                GsoKind::TcpV4 => GSO_TCPV4,
                GsoKind::TcpV6 => GSO_TCPV6,
            };
            (kind, gso.size, start.saturating_add(words.saturating_mul(4)))
        }
    };
    let ([h0, h1], [s0, s1]) = (headers.to_ne_bytes(), size.to_ne_bytes());
    let ([c0, c1], [o0, o1]) = (start.to_ne_bytes(), offset.to_ne_bytes());
    [flags, gso, h0, h1, s0, s1, c0, c1, o0, o1]
}

/// A packet of `len` bytes from the tap, its header in front; the buffer if it has none.
fn parse(buf: PrivateBuf, len: usize) -> Result<Packet<PrivateBuf>, PrivateBuf> {
    let head = buf.as_slice().first_chunk::<VNET_HEADER>().copied();
    let (Some(head), Some(len)) = (head, len.checked_sub(VNET_HEADER)) else { return Err(buf) };
    let [flags, gso, _, _, s0, s1, c0, c1, o0, o1] = head;
    let checksum = if flags & NEEDS_CSUM != 0 {
        let (start, offset) = (u16::from_ne_bytes([c0, c1]), u16::from_ne_bytes([o0, o1]));
        Checksum::Partial { start, offset }
    } else if flags & DATA_VALID != 0 {
        Checksum::Validated
    } else {
        Checksum::Unknown
    };
    let size = u16::from_ne_bytes([s0, s1]);
    let gso = match gso & !GSO_ECN {
        GSO_TCPV4 => Some(Gso { size, kind: GsoKind::TcpV4 }),
        GSO_TCPV6 => Some(Gso { size, kind: GsoKind::TcpV6 }),
        // The kernel was not told that anything else may come.
        _ => None,
    };
    let offload = Offload { checksum, gso };
    Ok(Packet { buf, start: VNET_HEADER, len, offload })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(offload: Offload) -> Packet<PrivateBuf> {
        let mut buf = PrivateBuf::zeroed(VNET_HEADER + 100);
        buf.as_mut_slice()[VNET_HEADER + 34 + 12] = 0x80;
        Packet { buf, start: VNET_HEADER, len: 100, offload }
    }

    #[test]
    fn what_is_written_into_a_header_is_read_from_it() {
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
            out.buf.as_mut_slice()[..VNET_HEADER].copy_from_slice(&header);
            let back = parse(out.buf, VNET_HEADER + 100).unwrap();
            assert_eq!((back.offload, back.start, back.len), (offload, VNET_HEADER, 100));
        }
    }

    #[test]
    fn the_header_is_the_kernels() {
        let checksum = Checksum::Partial { start: 34, offset: 16 };
        let gso = Some(Gso { size: 1448, kind: GsoKind::TcpV4 });
        let words: Vec<u16> = [34 + 32, 1448, 34, 16].to_vec();
        let mut want = [1, 1].to_vec();
        words.iter().for_each(|w| want.extend(w.to_ne_bytes()));
        assert_eq!(header_of(&packet(Offload { checksum, gso })).to_vec(), want);
    }

    #[test]
    fn a_packet_without_a_whole_header_is_none() {
        assert!(parse(PrivateBuf::zeroed(64), VNET_HEADER - 1).is_err());
        assert_eq!(parse(PrivateBuf::zeroed(64), VNET_HEADER).unwrap().len, 0);
    }
}

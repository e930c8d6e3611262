//! Packets through a tap, by io_uring: the port of a worker, and the worker's wait point.
//!
//! One armed read with its own buffer wakes the worker. When it has returned a packet, further
//! reads are submitted that do not wait, as many in one system call as earlier rounds returned
//! packets. Several armed reads would all be woken by every packet, and all but one would find
//! nothing. Kernels before 6.4 do not support non-waiting reads of a tap; there several reads are
//! armed, and few while the packet rate is low. Writes are submitted in batches. Other descriptors
//! that wake the worker (event channels) are [watched](WaitPoint::watch) through the same io_uring.
//!
//! # Memory
//! The kernel's packets and the guest's packets may have 64 KiB, and a read's size is known only
//! afterwards. So buffers of that size are few:
//!
//! | | large ([`FRAME_MAX`] and a page) | small (2 KiB) |
//! |---|---|---|
//! | in | 48: reads, and what waits for the guest | – |
//! | out | 16: one more than a ring can hold | 128 |
//!
//! That is 4.6 MiB per queue at most, and usually far less: pages of a buffer that no packet has
//! reached take no memory, the most recently used buffers are reused first, and larger packets lead
//! to fewer reads. Packets that do not fit stay in the kernel, which holds as many as the queue of
//! the tap allows ([`TapConfig::queue_len`](super::TapConfig::queue_len)) and drops further
//! ones.
#![forbid(unsafe_code)]

use super::device::{Tap, VNET_HEADER};
use super::vlan::VlanSegments;
use super::vnet::{header_of, parse};
use crate::buffers::{BufferPool, FRAME_AT, LARGE, LARGE_OUT, SMALL_OUT, buffers};
use crate::wait::WaitPort;
use crate::{FRAME_MAX, NetPort, Packet, PortError, WouldBlock};
use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::time::Duration;
use pvio_netback::fault::DropReason;
use pvio_netback::stats::Stats;
use pvio_ring::IoSeg;
use pvio_runtime::{
    Backoff, DisabledUring, FileId, MAX_WATCHES, Operations, PrivateBuf, Uring, WaitPoint, Watch,
    Watches,
};
use std::io;
use std::os::fd::OwnedFd;

/// Size of a read in bytes: one more than the largest frame, so that a truncated packet is
/// detected.
const READ_LEN: usize = VNET_HEADER + FRAME_MAX + 1;
/// Limit of outstanding reads.
const READS_MOST: usize = 32;
/// Least number of armed reads on kernels without non-waiting reads.
const STANDING_LEAST: usize = 4;
/// Limit of the bytes that the reads of one round are expected to return, from the sizes of earlier
/// packets.
const READS_BYTES: usize = 256 * 1024;
/// Bytes of received packets that the guest has not taken, above which no more reads are submitted:
/// packets then wait in the kernel.
const HELD: usize = 64 * 1024;
/// Buffers that are not used for reads but for [`VlanSegments`].
const SPARE: usize = 2;
/// Buffers for received packets: reads, and packets that wait for the guest.
const LARGE_IN: usize = READS_MOST + 16;
const SLOTS: usize = LARGE_OUT + SMALL_OUT + READS_MOST + MAX_WATCHES;
/// Operations of the io_uring: packets, and the watches.
const OPERATIONS: Operations = Operations::READ.and(Operations::WRITE).and(Operations::POLL);

const READ: u64 = 0;
const TRY: u64 = 1;
const WRITE: u64 = 2;
/// Watch `n` has the token `WATCH + n`.
const WATCH: u64 = 3;

/// Port of a tap.
pub struct TapPort {
    uring: Uring<PrivateBuf>,
    tap: FileId,
    out: BufferPool,
    inward: Vec<PrivateBuf>,
    received: VecDeque<Packet<PrivateBuf>>,
    /// Packet that is being segmented; the next packet is received after it.
    segmenting: Option<VlanSegments>,
    /// Bytes of the packets in `received`.
    held: usize,
    reads: Reads,
    watches: Watches,
    stats: Arc<Stats>,
    now: Duration,
    /// Delay after failed reads, until a read succeeds.
    backoff: Backoff,
    /// Time before which no read is submitted, after failed reads.
    paused: Option<Duration>,
    /// Error after which the tap cannot be read any more.
    broken: Option<i32>,
}

/// State of the reads of the tap.
struct Reads {
    /// Whether the kernel supports non-waiting reads.
    tries: bool,
    /// Number of armed reads.
    standing: usize,
    /// Number of reads to submit in one round, from the results of earlier rounds.
    batch: usize,
    /// Number of non-waiting reads of this round that found no packet.
    failed: usize,
    /// Number of packets since the last round with such a read.
    burst: usize,
    /// Whether there may be more packets than were read.
    more: bool,
}

impl Reads {
    const fn new(tries: bool) -> Self {
        let batch = if tries { 1 } else { STANDING_LEAST };
        Self { tries, standing: 0, batch, failed: 0, burst: 0, more: false }
    }

    const fn standing_wanted(&self) -> usize {
        if self.tries { 1 } else { self.batch }
    }

    /// Returns the number of non-waiting reads to submit in a round. `came` holds whether packets
    /// arrived in it.
    const fn to_try(&self, came: bool) -> usize {
        if self.tries && (self.more || came) { self.batch } else { 0 }
    }

    /// Updates the state with the results of a round.
    fn learn(&mut self, packets: usize, bytes: usize) {
        self.more = packets > 0 && self.failed == 0;
        if packets == 0 {
            return;
        }
        self.burst = self.burst.saturating_add(packets);
        let batch = match (self.more, self.tries) {
            (true, true) => self.batch.max(packets.saturating_mul(2)),
            (true, false) => packets.saturating_mul(2),
            (false, _) => core::mem::take(&mut self.burst),
        };
        let least = if self.tries { 1 } else { STANDING_LEAST };
        // One read is armed in addition to the non-waiting ones.
        let most = READS_MOST.saturating_sub(usize::from(self.tries));
        let bound = packets.saturating_mul(READS_BYTES).checked_div(bytes).unwrap_or(most);
        self.batch = batch.clamp(least, bound.clamp(STANDING_LEAST, most));
    }
}

impl TapPort {
    /// Creates a port on this tap. It must be used by the thread that creates it. Packets lost
    /// while sending are counted in `stats`.
    ///
    /// # Errors
    /// An error of `io_uring_setup`.
    pub fn new(tap: Tap, stats: Arc<Stats>) -> io::Result<Self> {
        Self::reading(tap, stats, true)
    }

    /// Creates a port with several armed reads and no non-waiting reads, as [`new`](Self::new) does
    /// on kernels before 6.4.
    ///
    /// # Errors
    /// An error of `io_uring_setup`.
    pub fn standing(tap: Tap, stats: Arc<Stats>) -> io::Result<Self> {
        Self::reading(tap, stats, false)
    }

    fn reading(tap: Tap, stats: Arc<Stats>, tries: bool) -> io::Result<Self> {
        let mut uring = DisabledUring::gathering(SLOTS as u32)?;
        let tap = uring.add_file(tap.into_fd());
        Ok(Self {
            uring: uring.enable(OPERATIONS)?,
            tap,
            out: BufferPool::new(VNET_HEADER),
            inward: buffers(LARGE, LARGE_IN),
            received: VecDeque::with_capacity(READS_MOST),
            segmenting: None,
            held: 0,
            reads: Reads::new(tries),
            watches: Watches::new(WATCH),
            stats,
            now: Duration::ZERO,
            backoff: Backoff::default(),
            paused: None,
            broken: None,
        })
    }

    fn reap(&mut self) {
        let Self { uring, out, inward, received, held, reads, watches, stats, .. } = self;
        let (broken, backoff, mut errors) = (&mut self.broken, &mut self.backoff, 0_usize);
        uring.reap(|done| match done.token {
            READ | TRY => {
                reads.standing = reads.standing.saturating_sub(usize::from(done.token == READ));
                let Some(IoSeg { buf, .. }) = done.segments.pop() else { return };
                match done.result {
                    Ok(len) => match parse(buf, FRAME_AT, len as usize) {
                        Ok(packet) => {
                            backoff.reset();
                            *held = held.saturating_add(packet.len);
                            received.push_back(packet);
                        }
                        Err(buf) => {
                            stats.drop_one(DropReason::RxShort);
                            inward.push(buf);
                        }
                    },
                    Err(errno) => {
                        inward.push(buf);
                        match errno {
                            EINTR | EAGAIN => reads.failed = reads.failed.saturating_add(1),
                            EOPNOTSUPP if done.token == TRY => reads.tries = false,
                            errno if is_gone(errno) => *broken = Some(errno),
                            _ => {
                                // The kernel has dropped the packet.
                                stats.drop_one(DropReason::RxPort);
                                reads.failed = reads.failed.saturating_add(1);
                                errors = errors.saturating_add(1);
                            }
                        }
                    }
                }
            }
            WRITE => {
                if done.result.is_err() {
                    stats.drop_one(DropReason::TxPort);
                }
                done.segments.pop().into_iter().for_each(|seg| out.give_back(seg.buf));
            }
            token => watches.complete(token),
        });
        if errors > 0 {
            let pause = self.backoff.pause_for_ever();
            self.paused = (!pause.is_zero()).then(|| self.now.saturating_add(pause));
        }
    }

    /// Arms reads and watches that are not armed.
    fn arm(&mut self) {
        while self.reads.standing < self.reads.standing_wanted() && self.read(READ) {
            self.reads.standing = self.reads.standing.saturating_add(1);
        }
        self.watches.arm(&mut self.uring);
    }

    /// Submits non-waiting reads in a round that started with `before` packets. Returns their
    /// number.
    fn tries(&mut self, before: usize) -> usize {
        let tries = self.reads.to_try(self.received.len() > before);
        (0..tries).take_while(|_| self.read(TRY)).count()
    }

    /// Submits a read if a buffer is free and the guest has taken enough of the earlier packets.
    fn read(&mut self, token: u64) -> bool {
        if self.held >= HELD || self.inward.len() <= SPARE || self.paused.is_some() {
            return false;
        }
        let Some(buf) = self.inward.pop() else { return false };
        // There are enough slots for all reads, writes and watches together.
        let segment = IoSeg { buf, offset: FRAME_AT - VNET_HEADER, len: READ_LEN };
        let read = match token {
            TRY => self.uring.try_read_stream(self.tap, segment, TRY),
            _ => self.uring.read_stream(self.tap, segment, READ),
        };
        read.is_ok()
    }
}

/// Whether a read error means that the descriptor has no tap any more: its interface was removed
/// (`EBADFD`), or it is not a tap (`EBADF`, `ENODEV`, `ENXIO`). Other errors concern one packet or
/// are temporary. A read that waits while the interface is removed fails with `EFAULT`, and the
/// next one with `EBADFD`.
const fn is_gone(errno: i32) -> bool {
    matches!(errno, 6 | 9 | 19 | 77)
}

const EINTR: i32 = 4;
const EAGAIN: i32 = 11;
const EOPNOTSUPP: i32 = 95;

impl WaitPoint for TapPort {
    fn watch(&mut self, file: OwnedFd) -> io::Result<Watch> {
        self.watches.add(&mut self.uring, file)
    }

    fn fired(&mut self, watch: Watch) -> bool {
        self.watches.fired(watch)
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.arm();
        self.uring.wait(timeout)
    }
}

impl WaitPort for TapPort {
    fn poll(&mut self) -> io::Result<()> {
        let (before, held) = (self.received.len(), self.held);
        self.reads.failed = 0;
        self.reap();
        self.arm();
        if self.tries(before) == 0 {
            self.uring.flush()?;
            self.reap();
            // An armed read may have completed immediately.
            self.tries(before);
        }
        self.uring.flush()?;
        // Non-waiting reads have completed already.
        self.reap();
        if let Some(errno) = self.broken {
            return Err(io::Error::from_raw_os_error(errno));
        }
        let packets = self.received.len().saturating_sub(before);
        self.reads.learn(packets, self.held.saturating_sub(held));
        Ok(())
    }

    fn has_work(&mut self) -> io::Result<bool> {
        self.uring.poll()
    }

    fn gather(&mut self, time: Duration) -> io::Result<()> {
        self.arm();
        // Each packet completes an armed read, so packets alone do not end the wait.
        self.uring.wait_for(self.reads.standing.saturating_add(1), time)
    }
}

impl NetPort for TapPort {
    type Buf = PrivateBuf;
    const HEADROOM: usize = VNET_HEADER;

    fn reserve(&mut self) -> Result<PrivateBuf, WouldBlock> {
        self.out.reserve()
    }

    fn fit(&mut self, buf: PrivateBuf, len: usize) -> PrivateBuf {
        self.out.fit(buf, len)
    }

    fn unreserve(&mut self, buf: PrivateBuf) {
        self.out.give_back(buf);
    }

    fn send(&mut self, mut packet: Packet<PrivateBuf>) -> Result<(), PortError> {
        let header = header_of(&packet);
        let offset = packet.start.checked_sub(VNET_HEADER);
        let head = offset.and_then(|at| packet.buf.as_mut_slice().get_mut(at..packet.start));
        let (Some(head), Some(offset)) = (head, offset) else {
            self.out.give_back(packet.buf);
            return Err(PortError::Unsuited);
        };
        head.copy_from_slice(&header);
        let len = VNET_HEADER.saturating_add(packet.len);
        let segment = IoSeg { buf: packet.buf, offset, len };
        // There is a slot for every buffer. Without one, the buffer is lost with the segment.
        self.uring.write_stream(self.tap, [segment], WRITE).map_err(|_| PortError::Unsuited)
    }

    fn receive(&mut self) -> Option<Packet<PrivateBuf>> {
        loop {
            if let Some(segments) = &mut self.segmenting {
                match segments.next(self.inward.pop()?) {
                    Ok(segment) => return Some(segment),
                    Err(buf) => self.inward.push(buf),
                }
                self.inward.extend(self.segmenting.take().map(VlanSegments::into_buf));
            }
            let packet = self.received.pop_front()?;
            self.held = self.held.saturating_sub(packet.len);
            match VlanSegments::of(packet) {
                Err(packet) => return Some(packet),
                Ok(segments) => self.segmenting = Some(segments),
            }
        }
    }

    fn recycle(&mut self, buf: PrivateBuf) {
        self.inward.push(buf);
    }

    fn flush(&mut self) {
        // If it fails, the kernel took nothing. The next wait returns the same error, which ends
        // the vif.
        let _ = self.uring.flush();
    }

    fn set_clock(&mut self, now: Duration) {
        self.now = now;
        self.paused = self.paused.filter(|until| *until > now);
    }

    fn deadline(&self) -> Option<Duration> {
        self.paused
    }
}

#[cfg(test)]
mod tests;

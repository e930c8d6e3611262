//! Packets through a tap, by io_uring: the port of a worker, and the one place it waits.
//!
//! One read stands ready, with a buffer of its own, to be woken by; once it has brought a packet,
//! others are tried for more, as many in one system call as came before. Every read that stood ready
//! would be woken by every packet, to find that another was faster. Kernels before 6.4 know no read of
//! a tap that does not wait; there several stand ready all the same, few while few packets come.
//! Writes go out in batches. Whatever else is to wake the worker (event channels) is
//! [watched](TapPort::watch) through the same io_uring.
//!
//! # Memory
//! A read may bring 64 KiB and says so only afterwards, and so may a guest. Buffers of that size
//! are few, whatever is in them:
//!
//! | | large ([`FRAME_MAX`] and a page) | small (2 KiB) |
//! |---|---|---|
//! | in | 48: reads, and what waits for the guest | – |
//! | out | 16: one more than a ring can hold | 128 |
//!
//! That is 4.6 MiB for a queue, whatever its guest does, and far less in the rule: pages of a buffer
//! that no packet has reached take no memory, those used last are used next, and there are the
//! fewer reads the larger the packets are. What does not fit stays with the kernel, which keeps as
//! many packets as its side of the tap may queue
//! ([`TapConfig::queue_len`](super::tap::TapConfig::queue_len)) and drops what comes then.
#![forbid(unsafe_code)]

use super::buffers::{BufferPool, FRAME_AT, LARGE, LARGE_OUT, SMALL_OUT, buffers};
use super::cut::Cut;
use super::tap::{Tap, VNET_HEADER};
use super::vnet::{header_of, parse};
use super::wait::{WATCHES, Wait, Watch, Watches};
use super::{FRAME_MAX, NetPort, Packet, PortError, WouldBlock};
use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::time::Duration;
use pvio_netback::fault::DropReason;
use pvio_netback::stats::Stats;
use pvio_ring::IoSeg;
use pvio_uring::{Backoff, FileId, PrivateBuf, Uring};
use std::io;
use std::os::fd::OwnedFd;

/// Bytes of a read: one more than any frame has, so that one cut short is seen to be.
const READ_LEN: usize = VNET_HEADER + FRAME_MAX + 1;
/// Reads under way at most.
const READS_MOST: usize = 32;
/// Where the kernel takes no reads that do not wait: those that stand ready at least.
const STANDING_LEAST: usize = 4;
/// Bytes that the reads of one round are expected to bring at most, by what came before.
const READS_BYTES: usize = 256 * 1024;
/// Bytes of packets that nobody asks for beyond which no more are read: the guest takes none, and
/// they are to wait with the kernel.
const HELD: usize = 64 * 1024;
/// Buffers that no read takes, for [`Cut`].
const SPARE: usize = 2;
/// Buffers for packets on their way in: reads, and what waits for the guest.
const LARGE_IN: usize = READS_MOST + 16;
const SLOTS: usize = LARGE_OUT + SMALL_OUT + READS_MOST + WATCHES;

const READ: u64 = 0;
const TRY: u64 = 1;
const WRITE: u64 = 2;
/// Watch `n` has the token `WATCH + n`.
const WATCH: u64 = 3;

/// A tap as a port.
pub struct TapPort {
    uring: Uring<PrivateBuf>,
    tap: FileId,
    out: BufferPool,
    inward: Vec<PrivateBuf>,
    received: VecDeque<Packet<PrivateBuf>>,
    /// What is cut before more is received.
    cut: Option<Cut>,
    /// Bytes of these.
    held: usize,
    reads: Reads,
    watches: Watches,
    stats: Arc<Stats>,
    now: Duration,
    /// Of reads that failed since one did not.
    backoff: Backoff,
    /// No read is begun before this time: those before failed.
    paused: Option<Duration>,
    /// Why the tap cannot be read any more.
    broken: Option<i32>,
}

/// Reads of the tap.
struct Reads {
    /// Whether the kernel takes reads that do not wait.
    tries: bool,
    /// Those that stand ready.
    standing: usize,
    /// How many are worth a try in one round, by what came before.
    batch: usize,
    /// Tries of this round that found nothing.
    failed: usize,
    /// Packets of the rounds since that happened last.
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

    /// How many are to be tried in a round in which packets came, or none.
    const fn to_try(&self, came: bool) -> usize {
        if self.tries && (self.more || came) { self.batch } else { 0 }
    }

    /// Takes note of what a round brought.
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
        // Beside the tries stands one read.
        let most = READS_MOST.saturating_sub(usize::from(self.tries));
        let bound = packets.saturating_mul(READS_BYTES).checked_div(bytes).unwrap_or(most);
        self.batch = batch.clamp(least, bound.clamp(STANDING_LEAST, most));
    }
}

impl TapPort {
    /// A port on this tap, to be used by the thread that makes it. Packets lost on their way out
    /// are counted in `stats`.
    ///
    /// # Errors
    /// What `io_uring_setup` says.
    pub fn new(tap: Tap, stats: Arc<Stats>) -> io::Result<Self> {
        Self::reading(tap, stats, true)
    }

    /// The same, as [`new`](Self::new) does by itself on kernels before 6.4: several reads stand ready,
    /// and none is tried.
    ///
    /// # Errors
    /// What `io_uring_setup` says.
    pub fn standing(tap: Tap, stats: Arc<Stats>) -> io::Result<Self> {
        Self::reading(tap, stats, false)
    }

    fn reading(tap: Tap, stats: Arc<Stats>, tries: bool) -> io::Result<Self> {
        let mut uring = Uring::gathering(SLOTS as u32)?;
        let tap = uring.add_file(tap.into_fd());
        Ok(Self {
            uring,
            tap,
            out: BufferPool::new(VNET_HEADER),
            inward: buffers(LARGE, LARGE_IN),
            received: VecDeque::with_capacity(READS_MOST),
            cut: None,
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
            token => watches.done(token),
        });
        if errors > 0 {
            let pause = self.backoff.pause_for_ever();
            self.paused = (!pause.is_zero()).then(|| self.now.saturating_add(pause));
        }
    }

    /// Lets reads and watches stand ready that should.
    fn arm(&mut self) {
        while self.reads.standing < self.reads.standing_wanted() && self.read(READ) {
            self.reads.standing = self.reads.standing.saturating_add(1);
        }
        self.watches.arm(&mut self.uring);
    }

    /// Tries as many reads as are worth it in a round that began with so many packets.
    fn tries(&mut self, before: usize) -> usize {
        let tries = self.reads.to_try(self.received.len() > before);
        (0..tries).take_while(|_| self.read(TRY)).count()
    }

    /// Reads a packet, if there is a buffer to spare and what came before was asked for.
    fn read(&mut self, token: u64) -> bool {
        if self.held >= HELD || self.inward.len() <= SPARE || self.paused.is_some() {
            return false;
        }
        let Some(buf) = self.inward.pop() else { return false };
        // There are as many slots as reads, writes and watches together.
        let segment = IoSeg { buf, offset: FRAME_AT - VNET_HEADER, len: READ_LEN };
        let read = match token {
            TRY => self.uring.try_read_stream(self.tap, segment, TRY),
            _ => self.uring.read_stream(self.tap, segment, READ),
        };
        read.is_ok()
    }
}

/// Whether an error of a read says that the descriptor leads to no tap any more: its interface was removed
/// (`EBADFD`), or it is none (`EBADF`, `ENODEV`, `ENXIO`). Others are about one packet, or pass. A read that
/// waits while the interface is removed fails by `EFAULT`, and the next by `EBADFD`.
const fn is_gone(errno: i32) -> bool {
    matches!(errno, 6 | 9 | 19 | 77)
}

const EINTR: i32 = 4;
const EAGAIN: i32 = 11;
const EOPNOTSUPP: i32 = 95;

impl Wait for TapPort {
    fn watch(&mut self, file: OwnedFd) -> Option<Watch> {
        self.watches.add(&mut self.uring, file)
    }

    fn fired(&mut self, watch: Watch) -> bool {
        self.watches.fired(watch)
    }

    fn pump(&mut self) -> io::Result<()> {
        let (before, held) = (self.received.len(), self.held);
        self.reads.failed = 0;
        self.reap();
        self.arm();
        if self.tries(before) == 0 {
            self.uring.flush()?;
            self.reap();
            // What stands ready has found something at once, maybe.
            self.tries(before);
        }
        self.uring.flush()?;
        // What does not wait is over already.
        self.reap();
        if let Some(errno) = self.broken {
            return Err(io::Error::from_raw_os_error(errno));
        }
        let packets = self.received.len().saturating_sub(before);
        self.reads.learn(packets, self.held.saturating_sub(held));
        Ok(())
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.arm();
        self.uring.wait(timeout)
    }

    fn gather(&mut self, time: Duration) -> io::Result<()> {
        self.arm();
        // Packets alone wake nobody: each ends a read that stands ready.
        self.uring.wait_for(self.reads.standing.saturating_add(1), time)
    }

    fn look(&mut self) -> io::Result<bool> {
        self.uring.look()
    }
}

impl NetPort for TapPort {
    type Buf = PrivateBuf;
    const HEADROOM: usize = VNET_HEADER;

    fn reserve(&mut self) -> Result<PrivateBuf, WouldBlock> {
        self.out.large.pop().ok_or(WouldBlock)
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
        // A slot for every buffer; without one the buffer is gone with the segment.
        self.uring.write_stream(self.tap, [segment], WRITE).map_err(|_| PortError::Unsuited)
    }

    fn receive(&mut self) -> Option<Packet<PrivateBuf>> {
        loop {
            if let Some(cut) = &mut self.cut {
                match cut.next(self.inward.pop()?) {
                    Ok(segment) => return Some(segment),
                    Err(buf) => self.inward.push(buf),
                }
                self.inward.extend(self.cut.take().map(Cut::end));
            }
            let packet = self.received.pop_front()?;
            self.held = self.held.saturating_sub(packet.len);
            match Cut::begin(packet) {
                Ok(packet) => return Some(packet),
                Err(cut) => self.cut = Some(cut),
            }
        }
    }

    fn recycle(&mut self, buf: PrivateBuf) {
        self.inward.push(buf);
    }

    fn flush(&mut self) {
        // If it fails, the kernel took nothing; the next wait returns the same error, which ends the vif.
        let _ = self.uring.flush();
    }

    fn turn(&mut self, now: Duration) {
        self.now = now;
        self.paused = self.paused.filter(|until| *until > now);
    }

    fn deadline(&self) -> Option<Duration> {
        self.paused
    }
}

#[cfg(test)]
mod tests;

//! Packets through an AF_XDP socket: the port of a worker, and the worker's wait point.
#![forbid(unsafe_code)]

use super::Queue;
use super::sys::{DEPTH, FRAME, Socket};
use crate::buffers::{BufferPool, buffers};
use crate::segment::Segments;
use crate::wait::WaitPort;
use crate::{Checksum, NetPort, Offload, Packet, PortError, WouldBlock};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::time::Duration;
use pvio_netback::fault::DropReason;
use pvio_netback::stats::Stats;
use pvio_ring::proto::checksum::{ETHERNET_HEADER, complete};
use pvio_runtime::{
    DisabledUring, FileId, MAX_WATCHES, Operations, PrivateBuf, Uring, WaitPoint, Watch, Watches,
};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// Chunks that must be free before a packet is accepted: enough for the segments of one packet of
/// the usual size.
const SEGMENTS: usize = 48;
/// Largest number of system calls to send all frames: the kernel sends 32 frames per call
/// (`TX_BATCH_SIZE`).
const KICKS: usize = DEPTH / 32 + 1;
/// Interval at which unsent frames are checked.
const AGAIN: Duration = Duration::from_micros(200);
/// The same interval while the interface is down.
const AGAIN_DOWN: Duration = Duration::from_millis(20);
/// Number of buffers for received packets.
const INWARD: usize = 64;

/// Whether an error of the socket means that its interface no longer exists.
const fn is_gone(errno: Errno) -> bool {
    matches!(errno, Errno::BADF | Errno::NOTSOCK | Errno::NXIO | Errno::NODEV | Errno::OPNOTSUPP)
}

/// One poll for each watch, and one for the socket.
const SLOTS: usize = MAX_WATCHES + 1;
/// Operations of the io_uring: the polls. Frames are in memory shared with the kernel.
const OPERATIONS: Operations = Operations::POLL;

/// Token of the poll of the socket.
const READY: u64 = 0;
/// Watch `n` has the token `WATCH + n`.
const WATCH: u64 = 1;

/// Port on a queue of an interface.
pub struct AfXdpPort {
    uring: Uring<PrivateBuf>,
    socket: Socket,
    /// The socket as a registered file, for polls.
    polled: FileId,
    armed: bool,
    watches: Watches,
    pool: BufferPool,
    inward: Vec<PrivateBuf>,
    stats: Arc<Stats>,
    now: Duration,
    /// The last attempt to receive found no frame, so a readable socket means new frames.
    dry: bool,
    /// Frames were queued for which the kernel has not been called yet.
    unsent: bool,
    /// A caller waits for free chunks.
    starved: bool,
    again: Duration,
    broken: Option<Errno>,
}

impl AfXdpPort {
    /// Creates the port. It must be used by the thread that creates it. Packets lost while sending
    /// are counted in `stats`.
    ///
    /// # Errors
    /// A system error.
    pub fn new(queue: Queue, stats: Arc<Stats>) -> io::Result<Self> {
        let Queue(socket) = queue;
        let mut uring = DisabledUring::new(SLOTS as u32)?;
        let polled = uring.add_file(socket.as_fd().try_clone_to_owned()?);
        Ok(Self {
            uring: uring.enable(OPERATIONS)?,
            socket,
            polled,
            armed: false,
            watches: Watches::new(WATCH),
            pool: BufferPool::new(0),
            inward: buffers(FRAME, INWARD),
            stats,
            now: Duration::ZERO,
            dry: false,
            unsent: false,
            starved: false,
            again: AGAIN,
            broken: None,
        })
    }

    fn reap(&mut self) {
        let Self { uring, watches, armed, .. } = self;
        uring.reap(|done| match done.token {
            READY => *armed = false,
            token => watches.complete(token),
        });
    }

    fn arm(&mut self) {
        // Frames that wait because the guest does not take them must not wake the worker.
        if self.dry && !self.armed {
            self.armed = self.uring.poll_readable(self.polled, READY).is_ok();
        }
        self.watches.arm(&mut self.uring);
    }

    /// Calls the kernel to send, if the transmit ring needs a wake-up.
    fn kick(&mut self) {
        self.again = AGAIN;
        for _ in 0..KICKS {
            if !self.socket.wants_send() || self.socket.is_taken() {
                break;
            }
            match send(&self.socket, &[], SendFlags::DONTWAIT) {
                Ok(_) | Err(Errno::AGAIN | Errno::INTR) => {}
                Err(Errno::BUSY | Errno::NOBUFS) => break,
                Err(Errno::NETDOWN) => {
                    self.again = AGAIN_DOWN;
                    break;
                }
                Err(errno) if is_gone(errno) => {
                    self.broken = Some(errno);
                    break;
                }
                // For example out of memory: the frames stay in the ring until the next attempt.
                Err(_) => {
                    self.again = AGAIN_DOWN;
                    break;
                }
            }
        }
        self.unsent = self.socket.wants_send() && !self.socket.is_taken();
        self.socket.reap();
    }

    /// Queues one frame for sending; `None` if it is lost.
    fn put(&mut self, write: impl FnOnce(&mut [u8]) -> Option<usize>) -> Option<()> {
        if self.socket.free() == 0 {
            self.kick();
        }
        self.unsent = true;
        self.socket.send(write)
    }

    fn put_all(&mut self, packet: &mut Packet<PrivateBuf>) -> Result<(), PortError> {
        if let Some(gso) = packet.offload.gso {
            let segments = Segments::of(packet.frame(), gso);
            let mut segments =
                segments.filter(|s| s.len_max() <= FRAME).ok_or(PortError::Unsuited)?;
            while !segments.is_done() {
                if self.put(|space| segments.write(space)).is_none() {
                    self.stats.drop_one(DropReason::TxPort);
                    break;
                }
            }
            return Ok(());
        }
        if !(ETHERNET_HEADER..=FRAME).contains(&packet.len) {
            return Err(PortError::Unsuited);
        }
        if let Checksum::Partial { start, offset } = packet.offload.checksum
            && !complete(packet.frame_mut(), start.into(), offset.into())
        {
            return Err(PortError::Unsuited);
        }
        let frame = packet.frame();
        let write = |space: &mut [u8]| {
            space.get_mut(..frame.len())?.copy_from_slice(frame);
            Some(frame.len())
        };
        if frame.is_empty() {
            return Err(PortError::Unsuited);
        }
        if self.put(write).is_none() {
            self.stats.drop_one(DropReason::TxPort);
        }
        Ok(())
    }
}

impl NetPort for AfXdpPort {
    type Buf = PrivateBuf;
    const HEADROOM: usize = 0;

    fn reserve(&mut self) -> Result<PrivateBuf, WouldBlock> {
        if self.socket.free() < SEGMENTS {
            self.kick();
            self.starved = self.socket.free() < SEGMENTS;
            if self.starved {
                return Err(WouldBlock);
            }
        }
        self.pool.reserve()
    }

    fn fit(&mut self, buf: PrivateBuf, len: usize) -> PrivateBuf {
        self.pool.fit(buf, len)
    }

    fn unreserve(&mut self, buf: PrivateBuf) {
        self.pool.give_back(buf);
    }

    fn send(&mut self, mut packet: Packet<PrivateBuf>) -> Result<(), PortError> {
        let sent = self.put_all(&mut packet);
        self.pool.give_back(packet.buf);
        sent
    }

    fn receive(&mut self) -> Option<Packet<PrivateBuf>> {
        let mut buf = self.inward.pop()?;
        let copied = self.socket.receive(|frame| {
            let space = buf.as_mut_slice().get_mut(..frame.len())?;
            space.copy_from_slice(frame);
            Some(frame.len())
        });
        self.dry = copied.is_none();
        match copied.flatten() {
            Some(len) => Some(Packet { buf, start: 0, len, offload: Offload::default() }),
            None => {
                self.inward.push(buf);
                None
            }
        }
    }

    fn recycle(&mut self, buf: PrivateBuf) {
        self.inward.push(buf);
    }

    fn flush(&mut self) {
        if self.unsent {
            self.kick();
        }
    }

    fn set_clock(&mut self, now: Duration) {
        (self.now, self.dry, self.starved) = (now, false, false);
        self.flush();
    }

    fn deadline(&self) -> Option<Duration> {
        (self.unsent || self.starved).then(|| self.now.saturating_add(self.again))
    }
}

impl WaitPoint for AfXdpPort {
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

impl WaitPort for AfXdpPort {
    fn poll(&mut self) -> io::Result<()> {
        self.reap();
        self.socket.reap();
        if let Some(errno) = self.broken {
            return Err(errno.into());
        }
        if self.socket.wants_receive() {
            // The call only wakes the driver; it never returns data.
            let _ = recv(&self.socket, &mut [0_u8; 0][..], RecvFlags::DONTWAIT);
        }
        self.arm();
        self.uring.flush()
    }

    fn has_work(&mut self) -> io::Result<bool> {
        let is_new = self.dry && !self.socket.is_empty();
        Ok(is_new || self.uring.poll()?)
    }
}

impl core::fmt::Debug for AfXdpPort {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("AfXdpPort").field("broken", &self.broken).finish_non_exhaustive()
    }
}

//! The port of a queue that is connected to files, or back to the guest.
#![forbid(unsafe_code)]

use super::recording::Recording;
use crate::buffers::BufferPool;
use crate::pcapng::CapturedPacket;
use crate::queue_port::{PacketQueue, QueuePort};
use crate::{FRAME_MAX, NetPort, Offload, Packet, PortError, WouldBlock};
use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;
use pvio_runtime::PrivateBuf;
use std::io;

/// Packets from and to files, or looped back.
#[derive(Debug)]
pub struct FileQueue {
    pool: BufferPool,
    received: VecDeque<Packet<PrivateBuf>>,
    loopback: bool,
    recording: Option<Arc<Recording>>,
    /// The packet that is being recorded.
    packet: CapturedPacket,
    replay: VecDeque<Vec<u8>>,
}

impl FileQueue {
    fn new(loopback: bool, recording: Option<Arc<Recording>>, replay: VecDeque<Vec<u8>>) -> Self {
        let (pool, packet) = (BufferPool::new(0), CapturedPacket::new(FRAME_MAX));
        let received = VecDeque::with_capacity(256);
        Self { pool, received, loopback, recording, packet, replay }
    }
}

impl PacketQueue for FileQueue {}

/// Port that is connected to files, or looped back.
pub type FilePort = QueuePort<FileQueue>;

impl FilePort {
    /// Creates a port that loops packets back to the guest.
    ///
    /// # Errors
    /// An error of `io_uring_setup`.
    pub fn loopback() -> io::Result<Self> {
        Self::on(FileQueue::new(true, None, VecDeque::new()))
    }

    /// Creates a port that records what the guest sends, if `recording` is given, and sends the
    /// packets of `replay` to it.
    ///
    /// # Errors
    /// An error of `io_uring_setup`.
    pub fn files(recording: Option<Arc<Recording>>, replay: VecDeque<Vec<u8>>) -> io::Result<Self> {
        Self::on(FileQueue::new(false, recording, replay))
    }
}

impl NetPort for FileQueue {
    type Buf = PrivateBuf;
    const HEADROOM: usize = 0;

    fn reserve(&mut self) -> Result<PrivateBuf, WouldBlock> {
        self.pool.reserve()
    }

    fn fit(&mut self, buf: PrivateBuf, len: usize) -> PrivateBuf {
        self.pool.fit(buf, len)
    }

    fn unreserve(&mut self, buf: PrivateBuf) {
        self.pool.give_back(buf);
    }

    fn send(&mut self, packet: Packet<PrivateBuf>) -> Result<(), PortError> {
        if self.loopback {
            // Bounded by the number of buffers.
            self.received.push_back(packet);
            return Ok(());
        }
        if let Some(recording) = &self.recording {
            self.packet.fill(packet.frame(), FRAME_MAX, packet.offload, true);
            recording.add(&self.packet);
        }
        self.pool.give_back(packet.buf);
        Ok(())
    }

    fn receive(&mut self) -> Option<Packet<PrivateBuf>> {
        if let Some(packet) = self.received.pop_front() {
            return Some(packet);
        }
        let len = self.replay.front()?.len();
        let buf = self.pool.large.pop()?;
        let mut buf = self.pool.fit(buf, len);
        let frame = self.replay.pop_front()?;
        buf.as_mut_slice().get_mut(..len)?.copy_from_slice(&frame);
        Some(Packet { buf, start: 0, len, offload: Offload::default() })
    }

    fn recycle(&mut self, buf: PrivateBuf) {
        self.pool.give_back(buf);
    }

    fn flush(&mut self) {
        self.recording.iter().for_each(|recording| recording.flush());
    }
}

//! A vif that is connected to files, or whose packets are looped back to the guest.
//!
//! The packets of a capture file (pcap or pcapng, Ethernet) are sent to the guest once, as fast as
//! it receives them, from the time that it connects. The packets that the guest sends are recorded
//! in a pcapng file in the format of [`capture`](crate::wrappers::capture).
#![forbid(unsafe_code)]

use crate::buffers::BufferPool;
use crate::wait::WaitPort;
use crate::wrappers::capture::{CaptureFile, Record};
use crate::{FRAME_MAX, NetPort, Offload, Packet, PortError, WouldBlock};
use alloc::collections::VecDeque;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::time::Duration;
use pcap_file::DataLink;
use pcap_file::pcap::PcapReader;
use pcap_file::pcapng::{Block, PcapNgReader};
use pvio_runtime::{PrivateBuf, WaitPoint, Watch, WatchRing};
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// Largest size of a file to replay in bytes; it is read into memory completely.
const REPLAY_MAX: u64 = 256 << 20;

/// Recording of a vif, shared by its queues.
#[derive(Debug)]
pub struct Recording(Mutex<Option<CaptureFile<BufWriter<File>>>>);

impl Recording {
    /// Creates or truncates the file, for a vif of that name.
    ///
    /// # Errors
    /// A system error.
    pub fn begin(path: &Path, interface: &str) -> io::Result<Arc<Self>> {
        let file = BufWriter::new(File::create(path)?);
        let file = CaptureFile::begin(file, interface, FRAME_MAX)?;
        Ok(Arc::new(Self(Mutex::new(Some(file)))))
    }

    fn add(&self, record: &Record) {
        self.with(|file| file.add(record));
    }

    fn flush(&self) {
        self.with(CaptureFile::flush);
    }

    fn with(&self, work: impl FnOnce(&mut CaptureFile<BufWriter<File>>) -> io::Result<()>) {
        let mut file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = &mut *file
            && let Err(error) = work(open)
        {
            tracing::warn!(%error, "nothing more is recorded");
            *file = None;
        }
    }
}

/// Returns the packets of a capture file.
///
/// # Errors
/// A message with the defect of the file.
pub fn packets_of(path: &Path) -> Result<VecDeque<Vec<u8>>, String> {
    let shown = path.display();
    let read = |e: io::Error| alloc::format!("{shown} cannot be read: {e}");
    let odd = |what: &str| alloc::format!("{shown} cannot be replayed: {what}");
    let mut file = File::open(path).map_err(read)?;
    if file.metadata().map_err(read)?.len() > REPLAY_MAX {
        return Err(odd("it is larger than 256 MiB"));
    }
    let mut magic = [0; 4];
    file.read_exact(&mut magic).map_err(read)?;
    file.rewind().map_err(read)?;
    let file = BufReader::new(file);
    let mut all = VecDeque::new();
    let mut add = |data: &[u8]| {
        if data.len() <= FRAME_MAX {
            all.push_back(data.to_vec());
        }
    };
    if magic == [0x0a, 0x0d, 0x0d, 0x0a] {
        let mut reader = PcapNgReader::new(file).map_err(|e| odd(&e.to_string()))?;
        while let Some(block) = reader.next_block() {
            match block.map_err(|e| odd(&e.to_string()))? {
                Block::InterfaceDescription(one) if one.linktype != DataLink::ETHERNET => {
                    return Err(odd("it is not of Ethernet"));
                }
                Block::EnhancedPacket(packet) => add(&packet.data),
                Block::SimplePacket(packet) => add(&packet.data),
                _ => {}
            }
        }
    } else {
        let mut reader = PcapReader::new(file).map_err(|e| odd(&e.to_string()))?;
        if reader.header().datalink != DataLink::ETHERNET {
            return Err(odd("it is not of Ethernet"));
        }
        while let Some(packet) = reader.next_packet() {
            add(&packet.map_err(|e| odd(&e.to_string()))?.data);
        }
    }
    Ok(all)
}

/// Port that is connected to files, or looped back.
pub struct FilePort {
    ring: WatchRing,
    pool: BufferPool,
    received: VecDeque<Packet<PrivateBuf>>,
    /// Whether sent packets are looped back.
    back: bool,
    recording: Option<Arc<Recording>>,
    record: Record,
    replay: VecDeque<Vec<u8>>,
}

impl FilePort {
    /// Creates a port that loops packets back to the guest.
    ///
    /// # Errors
    /// An error of `io_uring_setup`.
    pub fn loopback() -> io::Result<Self> {
        Self::new(true, None, VecDeque::new())
    }

    /// Creates a port that records what the guest sends, if `recording` is given, and sends the
    /// packets of `replay` to it.
    ///
    /// # Errors
    /// An error of `io_uring_setup`.
    pub fn files(recording: Option<Arc<Recording>>, replay: VecDeque<Vec<u8>>) -> io::Result<Self> {
        Self::new(false, recording, replay)
    }

    fn new(
        back: bool,
        recording: Option<Arc<Recording>>,
        replay: VecDeque<Vec<u8>>,
    ) -> io::Result<Self> {
        let (ring, pool) = (WatchRing::new()?, BufferPool::new(0));
        let record = Record::new(FRAME_MAX);
        let received = VecDeque::with_capacity(256);
        Ok(Self { ring, pool, received, back, recording, record, replay })
    }
}

impl NetPort for FilePort {
    type Buf = PrivateBuf;
    const HEADROOM: usize = 0;

    fn reserve(&mut self) -> Result<PrivateBuf, WouldBlock> {
        self.pool.large.pop().ok_or(WouldBlock)
    }

    fn fit(&mut self, buf: PrivateBuf, len: usize) -> PrivateBuf {
        self.pool.fit(buf, len)
    }

    fn unreserve(&mut self, buf: PrivateBuf) {
        self.pool.give_back(buf);
    }

    fn send(&mut self, packet: Packet<PrivateBuf>) -> Result<(), PortError> {
        if self.back {
            // Bounded by the number of buffers.
            self.received.push_back(packet);
            return Ok(());
        }
        if let Some(recording) = &self.recording {
            self.record.fill(packet.frame(), FRAME_MAX, packet.offload, true);
            recording.add(&self.record);
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

impl WaitPoint for FilePort {
    fn watch(&mut self, file: OwnedFd) -> io::Result<Watch> {
        self.ring.watch(file)
    }

    fn fired(&mut self, watch: Watch) -> bool {
        self.ring.fired(watch)
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.ring.wait(timeout)
    }
}

impl WaitPort for FilePort {
    fn poll(&mut self) -> io::Result<()> {
        self.ring.poll()
    }

    fn has_work(&mut self) -> io::Result<bool> {
        self.ring.has_work()
    }
}

impl core::fmt::Debug for FilePort {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("FilePort").field("back", &self.back).finish_non_exhaustive()
    }
}

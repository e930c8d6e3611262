//! A vif whose packets go nowhere: back to the guest, or to a file, and come from one.
//!
//! A file that is replayed (pcap or pcapng, of Ethernet) comes to the guest as fast as it takes
//! it, once, from the moment that it is there. What is recorded is a pcapng file as
//! [`capture`](super::capture) writes it, of what the guest sends.
#![forbid(unsafe_code)]

use super::buffers::BufferPool;
use super::capture::{CaptureFile, Record};
use super::wait::{WATCHES, Wait, Watch, Watches};
use super::{FRAME_MAX, NetPort, Offload, Packet, PortError, WouldBlock};
use alloc::collections::VecDeque;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::time::Duration;
use pcap_file::DataLink;
use pcap_file::pcap::PcapReader;
use pcap_file::pcapng::{Block, PcapNgReader};
use pvio_uring::{PrivateBuf, Uring};
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// Bytes of a file that is replayed, at most: it is read at once.
const REPLAY_MAX: u64 = 256 << 20;

/// What is recorded of a vif; for all its queues.
#[derive(Debug)]
pub struct Recording(Mutex<Option<CaptureFile<BufWriter<File>>>>);

impl Recording {
    /// Begins a file of a vif of that name, which is written anew.
    ///
    /// # Errors
    /// What the system says.
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

/// The packets of a capture file.
///
/// # Errors
/// What is wrong with it, in words.
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

/// A port to and from files, or back to the guest.
pub struct FilePort {
    uring: Uring<PrivateBuf>,
    watches: Watches,
    pool: BufferPool,
    received: VecDeque<Packet<PrivateBuf>>,
    /// What is sent comes back.
    back: bool,
    recording: Option<Arc<Recording>>,
    record: Record,
    replay: VecDeque<Vec<u8>>,
}

impl FilePort {
    /// What the guest sends comes back to it.
    ///
    /// # Errors
    /// What `io_uring_setup` says.
    pub fn loopback() -> io::Result<Self> {
        Self::new(true, None, VecDeque::new())
    }

    /// What the guest sends is recorded, if it is to be; what comes to it are these packets.
    ///
    /// # Errors
    /// What `io_uring_setup` says.
    pub fn files(recording: Option<Arc<Recording>>, replay: VecDeque<Vec<u8>>) -> io::Result<Self> {
        Self::new(false, recording, replay)
    }

    fn new(
        back: bool,
        recording: Option<Arc<Recording>>,
        replay: VecDeque<Vec<u8>>,
    ) -> io::Result<Self> {
        let (watches, pool) = (Watches::new(0), BufferPool::new(0));
        let record = Record::new(FRAME_MAX);
        let received = VecDeque::with_capacity(256);
        let uring = Uring::new(WATCHES as u32)?;
        Ok(Self { uring, watches, pool, received, back, recording, record, replay })
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
            // As many at most as there are buffers.
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

impl Wait for FilePort {
    fn watch(&mut self, file: OwnedFd) -> Option<Watch> {
        self.watches.add(&mut self.uring, file)
    }

    fn fired(&mut self, watch: Watch) -> bool {
        self.watches.fired(watch)
    }

    fn pump(&mut self) -> io::Result<()> {
        let Self { uring, watches, .. } = self;
        uring.reap(|done| watches.done(done.token));
        watches.arm(uring);
        uring.flush()
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.watches.arm(&mut self.uring);
        self.uring.wait(timeout)
    }

    fn look(&mut self) -> io::Result<bool> {
        self.uring.look()
    }
}

impl core::fmt::Debug for FilePort {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("FilePort").field("back", &self.back).finish_non_exhaustive()
    }
}

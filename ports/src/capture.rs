//! A look at what passes through a vif, on and off while it does, written as pcapng with
//! nanoseconds.
//!
//! Who does not look pays nothing but one test a packet. Who looks has a bounded number of records;
//! when they are not read in time packets are not captured, which is counted, and the vif goes on.
//!
//! A packet is captured as it is on the vif: one to be segmented is one record, whole, and a
//! checksum left blank is blank. The record's comment says so, and its flags the direction, as the
//! guest sees it: outbound is what it sends (also what a guard then drops).
#![forbid(unsafe_code)]

use super::setting::{Seen, Setting};
use super::wait::{Wait, Wrapper};
use super::{Checksum, FRAME_MAX, NetPort, Offload, Packet, PortError, WouldBlock};
use alloc::borrow::Cow;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use core::time::Duration;
use crossbeam_queue::ArrayQueue;
use pcap_file::DataLink;
use pcap_file::pcapng::PcapNgWriter;
use pcap_file::pcapng::blocks::enhanced_packet::{EnhancedPacketBlock, EnhancedPacketOption};
use pcap_file::pcapng::blocks::interface_description::{
    InterfaceDescriptionBlock, InterfaceDescriptionOption,
};
use pcap_file::pcapng::blocks::interface_statistics::{
    InterfaceStatisticsBlock, InterfaceStatisticsOption,
};
use pvio_ring::proto::netif::GsoKind;
use std::io::{self, Write};
use std::thread::Thread;
use std::time::SystemTime;

/// Bytes of a packet that are captured if nothing else is said: all.
pub const SNAPLEN: usize = FRAME_MAX;
/// Packets that may wait to be read. Their memory is used as packets reach it.
const RECORDS: usize = 512;

/// Where a vif can be looked at.
#[derive(Clone, Debug)]
pub struct Probe {
    session: Arc<Setting<Option<Arc<Session>>>>,
    taken: Arc<AtomicBool>,
}

impl Default for Probe {
    fn default() -> Self {
        Self { session: Setting::new(None), taken: Arc::default() }
    }
}

/// Somebody else looks already.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("it is being captured already, and can be so once at a time")]
pub struct Busy;

impl Probe {
    /// Begins to look, with up to `snaplen` bytes of each packet. To be read by the thread that
    /// calls this.
    ///
    /// # Errors
    /// [`Busy`].
    pub fn open(&self, snaplen: usize) -> Result<Reader, Busy> {
        if self.taken.swap(true, Ordering::AcqRel) {
            return Err(Busy);
        }
        let snaplen = snaplen.min(SNAPLEN);
        let (free, full) = (ArrayQueue::new(RECORDS), ArrayQueue::new(RECORDS));
        for _ in 0..RECORDS {
            let _ = free.push(Record::new(snaplen));
        }
        let (lost, reader) = (AtomicU64::new(0), std::thread::current());
        let session = Arc::new(Session { snaplen, free, full, lost, reader });
        self.session.set(Some(Arc::clone(&session)));
        Ok(Reader { probe: self.clone(), session })
    }

    /// A port that can be looked at here.
    pub fn around<N: NetPort>(&self, port: N) -> Capture<N> {
        Capture { port, session: Seen::of(Arc::clone(&self.session)) }
    }
}

#[derive(Debug)]
struct Session {
    snaplen: usize,
    free: ArrayQueue<Record>,
    full: ArrayQueue<Record>,
    lost: AtomicU64,
    reader: Thread,
}

impl Session {
    fn take(&self, frame: &[u8], offload: Offload, sent: bool) {
        let Some(mut record) = self.free.pop() else {
            self.lost.fetch_add(1, Ordering::Relaxed);
            return;
        };
        record.fill(frame, self.snaplen, offload, sent);
        // There are as many places as records.
        let _ = self.full.push(record);
        self.reader.unpark();
    }
}

/// A packet that passed.
pub struct Record {
    /// The Ethernet frame, or its beginning.
    pub data: Vec<u8>,
    /// Bytes it had.
    pub len: usize,
    /// When it passed.
    pub when: SystemTime,
    /// The guest sent it; else it is for the guest.
    pub sent: bool,
    /// What was still to be done to it.
    pub offload: Offload,
}

impl Record {
    pub(super) fn new(snaplen: usize) -> Self {
        let (data, when) = (Vec::with_capacity(snaplen), SystemTime::UNIX_EPOCH);
        Self { data, len: 0, when, sent: false, offload: Offload::default() }
    }

    /// Now, this packet, of which so much fits in.
    pub(super) fn fill(&mut self, frame: &[u8], snaplen: usize, offload: Offload, sent: bool) {
        self.data.clear();
        // It was made with room for as much.
        self.data.extend_from_slice(frame.get(..snaplen).unwrap_or(frame));
        self.when = SystemTime::now();
        (self.len, self.offload, self.sent) = (frame.len(), offload, sent);
    }

    /// What is unusual about it, in words.
    #[must_use]
    pub fn comment(&self) -> Option<String> {
        let segments = self.offload.gso.map(|gso| {
            let kind = match gso.kind {
                GsoKind::TcpV4 => "TCP over IPv4",
                GsoKind::TcpV6 => "TCP over IPv6",
            };
            format!("to be segmented: {kind}, {} bytes each", gso.size)
        });
        let blank = match self.offload.checksum {
            Checksum::Partial { .. } => Some("checksum left blank"),
            Checksum::Unknown | Checksum::Validated => None,
        };
        match (segments, blank) {
            (Some(segments), Some(blank)) => Some(format!("{segments}; {blank}")),
            (segments, blank) => segments.or(blank.map(String::from)),
        }
    }
}

impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Record").field("len", &self.len).field("sent", &self.sent).finish()
    }
}

/// Somebody who looks, until dropped.
#[derive(Debug)]
pub struct Reader {
    probe: Probe,
    session: Arc<Session>,
}

impl Reader {
    /// Waits for packets, at most so long, and calls `each` for those that there are, until it
    /// says `false`.
    ///
    /// # Errors
    /// What `each` fails with.
    pub fn read(
        &self,
        most: Duration,
        mut each: impl FnMut(&Record) -> io::Result<bool>,
    ) -> io::Result<()> {
        if self.session.full.is_empty() {
            std::thread::park_timeout(most);
        }
        while let Some(record) = self.session.full.pop() {
            let more = each(&record);
            let _ = self.session.free.push(record);
            if !more? {
                break;
            }
        }
        Ok(())
    }

    /// Packets that were not captured, for nobody had read those before.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.session.lost.load(Ordering::Relaxed)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.probe.session.set(None);
        self.probe.taken.store(false, Ordering::Release);
    }
}

/// A port that can be looked at.
#[derive(Debug)]
pub struct Capture<N> {
    port: N,
    session: Seen<Option<Arc<Session>>>,
}

impl<N: NetPort> NetPort for Capture<N> {
    type Buf = N::Buf;
    const HEADROOM: usize = N::HEADROOM;

    fn reserve(&mut self) -> Result<N::Buf, WouldBlock> {
        self.port.reserve()
    }

    fn fit(&mut self, buf: N::Buf, len: usize) -> N::Buf {
        self.port.fit(buf, len)
    }

    fn unreserve(&mut self, buf: N::Buf) {
        self.port.unreserve(buf);
    }

    fn send(&mut self, packet: Packet<N::Buf>) -> Result<(), PortError> {
        if let Some(session) = self.session.get() {
            session.take(packet.frame(), packet.offload, true);
        }
        self.port.send(packet)
    }

    fn receive(&mut self) -> Option<Packet<N::Buf>> {
        let packet = self.port.receive()?;
        if let Some(session) = self.session.get() {
            session.take(packet.frame(), packet.offload, false);
        }
        Some(packet)
    }

    fn recycle(&mut self, buf: N::Buf) {
        self.port.recycle(buf);
    }

    fn flush(&mut self) {
        self.port.flush();
    }

    fn turn(&mut self, now: Duration) {
        self.session.look();
        self.port.turn(now);
    }

    fn deadline(&self) -> Option<Duration> {
        self.port.deadline()
    }
}

impl<N: Wait> Wrapper for Capture<N> {
    type Inner = N;

    fn inner(&mut self) -> &mut N {
        &mut self.port
    }
}

/// A pcapng file of one interface (draft-ietf-opsawg-pcapng).
pub struct CaptureFile<W: Write> {
    writer: PcapNgWriter<W>,
    packets: u64,
}

impl<W: Write> CaptureFile<W> {
    /// Begins the file, of an interface of that name.
    ///
    /// # Errors
    /// What `write` says.
    pub fn begin(write: W, interface: &str, snaplen: usize) -> io::Result<Self> {
        let mut writer = PcapNgWriter::new(write).map_err(io::Error::other)?;
        let snaplen = u32::try_from(snaplen).unwrap_or(u32::MAX);
        let mut block = InterfaceDescriptionBlock::new(DataLink::ETHERNET, snaplen);
        let name = InterfaceDescriptionOption::IfName(Cow::Owned(interface.into()));
        block.options = Vec::from([name, InterfaceDescriptionOption::IfTsResol(9)]);
        writer.write_pcapng_block(block).map_err(io::Error::other)?;
        Ok(Self { writer, packets: 0 })
    }

    /// Adds a packet.
    ///
    /// # Errors
    /// What `write` says.
    pub fn add(&mut self, record: &Record) -> io::Result<()> {
        let direction = if record.sent { 2 } else { 1 };
        let mut options = Vec::from([EnhancedPacketOption::Flags(direction)]);
        options.extend(record.comment().map(|text| EnhancedPacketOption::Comment(text.into())));
        let since = record.when.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let block = EnhancedPacketBlock {
            interface_id: 0,
            timestamp: since,
            original_len: u32::try_from(record.len).unwrap_or(u32::MAX),
            data: Cow::Borrowed(&record.data),
            options,
        };
        self.writer.write_pcapng_block(block).map_err(io::Error::other)?;
        self.packets = self.packets.saturating_add(1);
        Ok(())
    }

    /// Packets in it so far.
    #[must_use]
    pub const fn packets(&self) -> u64 {
        self.packets
    }

    /// Ends the file, telling how many packets are not in it that should be.
    ///
    /// # Errors
    /// What `write` says.
    pub fn end(mut self, lost: u64) -> io::Result<W> {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let nanos = u64::try_from(since.as_nanos()).unwrap_or(u64::MAX);
        let block = InterfaceStatisticsBlock {
            interface_id: 0,
            timestamp: nanos,
            options: Vec::from([
                InterfaceStatisticsOption::IsbIfRecv(self.packets.saturating_add(lost)),
                InterfaceStatisticsOption::IsbIfDrop(lost),
            ]),
        };
        self.writer.write_pcapng_block(block).map_err(io::Error::other)?;
        let mut write = self.writer.into_inner();
        write.flush()?;
        Ok(write)
    }

    /// Lets what was written go.
    ///
    /// # Errors
    /// What `write` says.
    pub fn flush(&mut self) -> io::Result<()> {
        self.writer.get_mut().flush()
    }
}

impl<W: Write> fmt::Debug for CaptureFile<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CaptureFile").field("packets", &self.packets).finish_non_exhaustive()
    }
}

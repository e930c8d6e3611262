//! Packet capture of a vif, which can be started and stopped while the vif runs. The format is
//! pcapng with timestamps in nanoseconds.
//!
//! Without a capture, the cost is one test per packet. A capture has a bounded number of records.
//! When the reader is too slow, packets are not captured, which is counted, and the vif goes on.
//!
//! A packet is captured as it passes the vif: an unsegmented packet is one record, and a blank
//! checksum is blank. The record's comment states this. Its flags hold the direction from the
//! guest's view: outbound packets are those that the guest sends (including packets that a guard
//! then drops).
#![forbid(unsafe_code)]

use crate::{Checksum, FRAME_MAX, NetPort, Offload, Packet, PortError, WouldBlock};
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
use pvio_runtime::{Setting, SettingReader, WaitPoint, Wrapper};
use std::io::{self, Write};
use std::thread::Thread;
use std::time::SystemTime;

/// Default number of bytes captured per packet: all.
pub const SNAPLEN: usize = FRAME_MAX;
/// Number of records that may wait to be read. Their memory is allocated lazily by the kernel.
const RECORDS: usize = 512;

/// Capture point of a vif.
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

/// Error: another capture is active.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("it is being captured already, and can be so once at a time")]
pub struct Busy;

impl Probe {
    /// Starts a capture with up to `snaplen` bytes of each packet. The thread that calls this must
    /// read it.
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

    /// Returns a wrapper of `port` that can be captured at this point.
    pub fn wrap<N: NetPort>(&self, port: N) -> Capture<N> {
        Capture { port, session: SettingReader::new(&self.session) }
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
        // The queue has space for every record.
        let _ = self.full.push(record);
        self.reader.unpark();
    }
}

/// Captured packet.
pub struct Record {
    /// Ethernet frame, truncated to the capture length.
    pub data: Vec<u8>,
    /// Original length in bytes.
    pub len: usize,
    /// Time of the capture.
    pub when: SystemTime,
    /// Whether the guest sent it; otherwise it was sent to the guest.
    pub sent: bool,
    /// Offloads that were still to be done.
    pub offload: Offload,
}

impl Record {
    pub(crate) fn new(snaplen: usize) -> Self {
        let (data, when) = (Vec::with_capacity(snaplen), SystemTime::UNIX_EPOCH);
        Self { data, len: 0, when, sent: false, offload: Offload::default() }
    }

    /// Replaces the contents by this packet, truncated to `snaplen` bytes.
    pub(crate) fn fill(&mut self, frame: &[u8], snaplen: usize, offload: Offload, sent: bool) {
        self.data.clear();
        // The vector was created with this capacity.
        self.data.extend_from_slice(frame.get(..snaplen).unwrap_or(frame));
        self.when = SystemTime::now();
        (self.len, self.offload, self.sent) = (frame.len(), offload, sent);
    }

    /// Returns a description of the packet's unusual properties.
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

/// Reader of a capture, which ends when it is dropped.
#[derive(Debug)]
pub struct Reader {
    probe: Probe,
    session: Arc<Session>,
}

impl Reader {
    /// Waits for packets, for at most `most`, and calls `each` for every available packet until it
    /// returns `false`.
    ///
    /// # Errors
    /// The error of `each`.
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

    /// Returns the number of packets that were not captured because no record was free.
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

/// Port that can be captured.
#[derive(Debug)]
pub struct Capture<N> {
    port: N,
    session: SettingReader<Option<Arc<Session>>>,
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

    fn set_clock(&mut self, now: Duration) {
        self.session.refresh();
        self.port.set_clock(now);
    }

    fn deadline(&self) -> Option<Duration> {
        self.port.deadline()
    }
}

impl<N: WaitPoint> Wrapper for Capture<N> {
    type Inner = N;

    fn inner(&mut self) -> &mut N {
        &mut self.port
    }
}

/// Pcapng file with one interface (draft-ietf-opsawg-pcapng).
pub struct CaptureFile<W: Write> {
    writer: PcapNgWriter<W>,
    packets: u64,
}

impl<W: Write> CaptureFile<W> {
    /// Writes the header of a file for an interface of that name.
    ///
    /// # Errors
    /// A write error.
    pub fn begin(write: W, interface: &str, snaplen: usize) -> io::Result<Self> {
        let mut writer = PcapNgWriter::new(write).map_err(io::Error::other)?;
        let snaplen = u32::try_from(snaplen).unwrap_or(u32::MAX);
        let mut block = InterfaceDescriptionBlock::new(DataLink::ETHERNET, snaplen);
        let name = InterfaceDescriptionOption::IfName(Cow::Owned(interface.into()));
        block.options = Vec::from([name, InterfaceDescriptionOption::IfTsResol(9)]);
        writer.write_pcapng_block(block).map_err(io::Error::other)?;
        Ok(Self { writer, packets: 0 })
    }

    /// Appends a packet.
    ///
    /// # Errors
    /// A write error.
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

    /// Returns the number of packets in the file.
    #[must_use]
    pub const fn packets(&self) -> u64 {
        self.packets
    }

    /// Ends the file with statistics, which hold the number of lost packets.
    ///
    /// # Errors
    /// A write error.
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

    /// Flushes the writer.
    ///
    /// # Errors
    /// A write error.
    pub fn flush(&mut self) -> io::Result<()> {
        self.writer.get_mut().flush()
    }
}

impl<W: Write> fmt::Debug for CaptureFile<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CaptureFile").field("packets", &self.packets).finish_non_exhaustive()
    }
}

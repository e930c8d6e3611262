//! Captured packets, and files of them in the format pcapng (draft-ietf-opsawg-pcapng), with timestamps
//! in nanoseconds.
//!
//! A packet is recorded in the form that it has in the guest's rings: an unsegmented packet is one
//! record, and a blank checksum is blank. The record's comment states this. Its flags hold the
//! direction from the guest's view: outbound packets are those that the guest sends.
#![forbid(unsafe_code)]

use crate::{Checksum, Offload};
use alloc::borrow::Cow;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
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
use std::time::SystemTime;

/// Captured packet.
pub struct CapturedPacket {
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

impl CapturedPacket {
    pub(super) fn new(snaplen: usize) -> Self {
        let (data, when) = (Vec::with_capacity(snaplen), SystemTime::UNIX_EPOCH);
        Self { data, len: 0, when, sent: false, offload: Offload::default() }
    }

    /// Replaces the contents by this packet, truncated to `snaplen` bytes.
    pub(super) fn fill(&mut self, frame: &[u8], snaplen: usize, offload: Offload, sent: bool) {
        self.data.clear();
        // The vector was created with this capacity.
        self.data.extend_from_slice(frame.get(..snaplen).unwrap_or(frame));
        self.when = SystemTime::now();
        (self.len, self.offload, self.sent) = (frame.len(), offload, sent);
    }

    /// Replaces the contents by a packet that was captured by another process.
    pub(super) fn set(
        &mut self,
        data: &[u8],
        len: usize,
        (when, sent): (SystemTime, bool),
        offload: Offload,
    ) {
        self.data.clear();
        self.data.extend_from_slice(data);
        (self.len, self.when, self.sent, self.offload) = (len, when, sent, offload);
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

impl fmt::Debug for CapturedPacket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CapturedPacket").field("len", &self.len).field("sent", &self.sent).finish()
    }
}

/// Pcapng file with one interface.
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
    pub fn add(&mut self, packet: &CapturedPacket) -> io::Result<()> {
        let direction = if packet.sent { 2 } else { 1 };
        let mut options = Vec::from([EnhancedPacketOption::Flags(direction)]);
        options.extend(packet.comment().map(|text| EnhancedPacketOption::Comment(text.into())));
        let since = packet.when.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let block = EnhancedPacketBlock {
            interface_id: 0,
            timestamp: since,
            original_len: u32::try_from(packet.len).unwrap_or(u32::MAX),
            data: Cow::Borrowed(&packet.data),
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

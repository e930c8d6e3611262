//! Packets of a capture file, pcap or pcapng.
#![forbid(unsafe_code)]

use crate::FRAME_MAX;
use alloc::collections::VecDeque;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use pcap_file::DataLink;
use pcap_file::pcap::PcapReader;
use pcap_file::pcapng::{Block, PcapNgReader};
use std::fs::File;
use std::io::{self, BufReader, Read, Seek};
use std::path::Path;

/// Largest size of a file to replay in bytes; it is read into memory completely.
const REPLAY_MAX: u64 = 256 << 20;

/// Returns the packets of a capture file.
///
/// # Errors
/// A message with the defect of the file.
pub fn packets_of(path: &Path) -> Result<VecDeque<Vec<u8>>, String> {
    let shown = path.display();
    let file = File::open(path).map_err(|e| alloc::format!("{shown} cannot be read: {e}"))?;
    packets_in(file, &shown.to_string())
}

/// Returns the packets of an open capture file, which is `shown` so in messages.
///
/// # Errors
/// A message with the defect of the file.
pub fn packets_in(mut file: File, shown: &str) -> Result<VecDeque<Vec<u8>>, String> {
    let read = |e: io::Error| alloc::format!("{shown} cannot be read: {e}");
    let odd = |what: &str| alloc::format!("{shown} cannot be replayed: {what}");
    file.rewind().map_err(read)?;
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

//! Capture files that are replayed: pcap and pcapng, of any bytes.
//!
//! A packet is not larger than a frame. A file that pvio wrote is read back as it was written.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pvio_fuzz::nic::Frame;
use pvio_ports::file::{Recording, packets_of};
use pvio_ports::{FRAME_MAX, NetPort, Packet, PacketBuf, file::FilePort};
use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::LazyLock;

#[derive(Arbitrary, Debug)]
enum Input {
    File(Vec<u8>),
    /// A pcap file with a valid header.
    Pcap {
        network: u8,
        packets: Vec<(u32, u32, Vec<u8>)>,
    },
    /// A pcapng file: blocks with valid lengths.
    Pcapng(Vec<(u8, Vec<u8>)>),
    Recorded(Vec<Frame>),
}

static FILE: LazyLock<PathBuf> = LazyLock::new(|| {
    std::env::temp_dir().join(format!("pvio-fuzz-capture-{}", std::process::id()))
});

fuzz_target!(|input: Input| {
    let bytes = match input {
        Input::File(bytes) => bytes,
        Input::Pcap { network, packets } => {
            let mut bytes = 0xa1b2_c3d4_u32.to_le_bytes().to_vec();
            bytes.extend([
                2,
                0,
                4,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0xff,
                0xff,
                0,
                0,
                network & 1,
                0,
                0,
                0,
            ]);
            for (captured, len, data) in packets {
                bytes.extend([0; 8]);
                let captured = if captured >> 28 == 0xf { captured } else { data.len() as u32 };
                bytes.extend(captured.to_le_bytes());
                bytes.extend(len.to_le_bytes());
                bytes.extend(data);
            }
            bytes
        }
        Input::Pcapng(blocks) => {
            let mut bytes = 0x0a0d_0d0a_u32.to_le_bytes().to_vec();
            bytes.extend([28, 0, 0, 0, 0x4d, 0x3c, 0x2b, 0x1a, 1, 0, 0, 0]);
            bytes.extend([0xff; 8]);
            bytes.extend(28_u32.to_le_bytes());
            for (kind, mut data) in blocks {
                data.resize(data.len().next_multiple_of(4), 0);
                bytes.extend(u32::from(kind % 12).to_le_bytes());
                bytes.extend((data.len() as u32 + 12).to_le_bytes());
                bytes.extend(&data);
                bytes.extend((data.len() as u32 + 12).to_le_bytes());
            }
            bytes
        }
        Input::Recorded(frames) => {
            recorded(&frames);
            return;
        }
    };
    std::fs::write(&*FILE, bytes).expect("a file");
    if let Ok(packets) = packets_of(&FILE) {
        assert!(packets.iter().all(|packet| packet.len() <= FRAME_MAX));
    }
});

fn recorded(frames: &[Frame]) {
    let recording = Recording::begin(&FILE, "vif1.0").expect("a file");
    let mut port = FilePort::files(Some(recording), VecDeque::new()).expect("an io_uring");
    let mut sent = Vec::new();
    for frame in frames.iter().take(16) {
        let bytes = frame.bytes();
        let Ok(buf) = port.reserve() else { break };
        let mut buf = port.fit(buf, bytes.len());
        buf.bytes_mut()[..bytes.len()].copy_from_slice(&bytes);
        let packet = Packet { buf, start: 0, len: bytes.len(), offload: frame.offload() };
        port.send(packet).expect("a file takes everything");
        sent.push(bytes);
    }
    port.flush();
    drop(port);
    let read = packets_of(&FILE).expect("a file that pvio wrote");
    assert!(read == sent, "{} packets were written, {} read", sent.len(), read.len());
}

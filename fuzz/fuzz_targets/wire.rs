//! Parsers of wire formats: blkif in both layouts, netif, its control ring, packets and their checksums,
//! xenstore messages, virtio_net_hdr.
//!
//! What is parsed is written in a form that is parsed to the same. Checksums that are filled in are correct.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pvio_fuzz::nic::Frame;
use pvio_netback::port::Gso;
use pvio_netback::wire::{WireCost, headers};
use pvio_ports::wrappers::guard::{Network, Rules};
use pvio_ring::proto::blkif::{Abi, Request, Response, Status};
use pvio_ring::proto::checksum::{IpVersion, Transport, complete, internet_checksum};
use pvio_ring::proto::netif::{
    CTRL_SLOT_SIZE, CtrlRequest, CtrlResponse, Extra, GrefEntry, GsoKind, HashTypes, RX_SLOT_SIZE,
    RxRequest, RxResponse, TX_SLOT_SIZE, TxRequest, TxResponse, hash_frame, toeplitz,
};
use pvio_ring::shm::{HeapMemory, PAGE_SIZE};
use pvio_ring::{BackRing, FrontRing};
use pvio_xenbus::wire::{Header, decode, split_string, strings};

#[derive(Arbitrary, Debug)]
enum Input {
    Blkif {
        x86_32: bool,
        slots: Vec<[u8; 32]>,
        rest: [u8; 32],
        last: [u8; 32],
    },
    BlkifResponse {
        x86_32: bool,
        id: u64,
        op: u8,
        status: i16,
    },
    Tx([u8; TX_SLOT_SIZE]),
    Rx([u8; RX_SLOT_SIZE]),
    Ctrl([u8; CTRL_SLOT_SIZE]),
    Xenstore(Vec<u8>),
    Packet {
        frame: Frame,
        gso: u16,
        start: u16,
        offset: u16,
        key: [u8; 40],
        types: u8,
        addresses: bool,
    },
    Bytes(Vec<u8>),
}

fuzz_target!(|input: Input| match input {
    Input::Blkif { x86_32, slots, rest, last } => {
        let abi = if x86_32 { Abi::X86_32 } else { Abi::X86_64 };
        let mut bytes = slots.iter().take(2).flatten().copied().collect::<Vec<u8>>();
        bytes.extend(rest.into_iter().chain(last));
        bytes.resize(112, 0);
        blkif(abi, &bytes);
    }
    Input::BlkifResponse { x86_32, id, op, status } => {
        let abi = if x86_32 { Abi::X86_32 } else { Abi::X86_64 };
        let mut out = [0; 16];
        let response = Response { id, op, status: Status::from_wire(status) };
        let bytes = response.write(abi, &mut out).to_vec();
        let read =
            through_ring(abi.slot_size(), &bytes, |slot| Response::read(slot).expect("whole"));
        assert_eq!(read, response);
    }
    Input::Tx(bytes) => {
        let request =
            through_ring(TX_SLOT_SIZE, &bytes, |slot| TxRequest::read(slot).expect("whole"));
        let again = through_ring(TX_SLOT_SIZE, &request.to_bytes(), |slot| {
            TxRequest::read(slot).expect("whole")
        });
        assert_eq!(again, request);
        let extra = through_ring(TX_SLOT_SIZE, &bytes, |slot| Extra::read(slot).expect("whole"));
        if let Ok(extra) = extra {
            let again = through_ring(TX_SLOT_SIZE, &extra.to_bytes(), |slot| {
                Extra::read(slot).expect("whole")
            });
            assert_eq!(again, Ok(extra));
        }
        through_ring(TX_SLOT_SIZE, &bytes, |slot| TxResponse::read(slot).expect("whole"));
    }
    Input::Rx(bytes) => {
        let request =
            through_ring(RX_SLOT_SIZE, &bytes, |slot| RxRequest::read(slot).expect("whole"));
        let again = through_ring(RX_SLOT_SIZE, &request.to_bytes(), |slot| {
            RxRequest::read(slot).expect("whole")
        });
        assert_eq!(again, request);
        through_ring(RX_SLOT_SIZE, &bytes, |slot| RxResponse::read(slot).expect("whole"));
        let entry = GrefEntry::from_bytes(bytes);
        assert_eq!(GrefEntry::from_bytes(entry.to_bytes()), entry);
    }
    Input::Ctrl(bytes) => {
        let request =
            through_ring(CTRL_SLOT_SIZE, &bytes, |slot| CtrlRequest::read(slot).expect("whole"));
        assert_eq!(request.to_bytes(), bytes);
        if let Some(ask) = request.ask() {
            assert_eq!(CtrlRequest::new(request.id, ask).ask(), Some(ask));
        }
        through_ring(CTRL_SLOT_SIZE, &bytes, |slot| CtrlResponse::read(slot).expect("whole"));
    }
    Input::Xenstore(bytes) => {
        if let Ok(Some(frame)) = decode(&bytes) {
            let len = frame.wire_len();
            assert!(len <= bytes.len() && frame.payload.len() <= 4096);
            let Header { kind, req_id, tx_id, len: payload } = frame.header;
            assert_eq!(payload as usize, frame.payload.len());
            assert_eq!(frame.header.emit()[..], bytes[..16], "{kind} {req_id} {tx_id}");
            let _ = (strings(frame.payload).count(), split_string(frame.payload).is_some());
        }
    }
    Input::Packet { frame, gso, start, offset, key, types, addresses } => {
        let mut bytes = frame.bytes();
        packet(&bytes, gso, &key, types, addresses);
        if let Ok(transport) = Transport::of(&bytes) {
            assert!(transport.start < transport.end && transport.end <= bytes.len());
            let _ = transport.verify(&bytes);
            transport.blank(&mut bytes);
            let at = if transport.udp { 6 } else { 16 };
            let mut completed = bytes.clone();
            assert!(
                complete(&mut completed[..transport.end], transport.start, at),
                "inside the frame"
            );
            transport.fill(&mut bytes);
            assert!(transport.verify(&bytes), "a checksum that was filled in is not correct");
        }
        let len = bytes.len();
        let done = complete(&mut bytes, start.into(), offset.into());
        assert!(!done || usize::from(start) + usize::from(offset) + 2 <= len);
    }
    Input::Bytes(bytes) => {
        packet(&bytes, 1448, &[1; 40], 15, true);
        let _ = internet_checksum(&bytes);
    }
});

fn packet(frame: &[u8], gso: u16, key: &[u8; 40], types: u8, addresses: bool) {
    if let Some((_, at)) = IpVersion::of(frame) {
        assert!(at <= frame.len());
    }
    if let Some(headers) = headers(frame) {
        assert!(headers >= 34 + 20);
    }
    for kind in [GsoKind::TcpV4, GsoKind::TcpV6] {
        let cost = WireCost::of(frame, Some(Gso { size: gso, kind }));
        assert!(cost.bytes >= frame.len() as u64 && cost.frames >= 1);
    }
    let types = HashTypes::from_bits_truncate(types.into());
    let _ = hash_frame(frame, types, key);
    let _ = toeplitz(key, &frame[..frame.len().min(36)]);
    let network = Network { address: [10, 0, 0, 1].into(), prefix: 24 };
    let mac = [2, 0, 0, 0, 0, 2];
    let rules = Rules { mac: Some(mac), addresses: addresses.then(|| vec![network]) };
    if rules.check(frame).is_ok() {
        assert_eq!(frame[6..12], mac, "a frame with another address passes the filter");
    }
}

fn blkif(abi: Abi, bytes: &[u8]) {
    let read = |bytes: &[u8]| {
        through_ring(abi.slot_size(), &bytes[..abi.slot_size()], |slot| {
            Request::read(slot, abi).expect("whole")
        })
    };
    if let Ok(request) = read(bytes) {
        if let Request::Data { segments, .. } = &request {
            assert!(
                segments.len() <= 11 && segments.iter().all(|s| s.offset() + s.len() <= PAGE_SIZE)
            );
        }
        let mut out = [0; 112];
        let written = request.write(abi, 0, &mut out).to_vec();
        let mut padded = written.clone();
        padded.resize(112, 0);
        assert_eq!(read(&padded), Ok(request));
    }
}

/// Writes a slot to a ring, and reads it on the other side.
fn through_ring<T>(
    size: usize,
    bytes: &[u8],
    read: impl FnOnce(&mut pvio_ring::Slot<'_, HeapMemory>) -> T,
) -> T {
    let page = HeapMemory::pages(1);
    let mut front = FrontRing::init(page.clone(), size).expect("a valid size");
    front.push(bytes).expect("an empty ring");
    let _ = front.publish();
    let mut back = BackRing::attach(page, size).expect("a valid ring");
    let mut slot = back.pop().expect("valid indices").expect("a request");
    read(&mut slot)
}

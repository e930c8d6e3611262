use super::*;
use crate::engine::BlockEngine;
use crate::engine::Geometry;
use crate::engine::offload::{Executor, Offload};
use alloc::sync::Arc;
use proptest::prelude::*;
use pvio_ring::IoSeg;
use pvio_ring::shm::{HeapMemory, Region};
use std::sync::Mutex;

#[derive(Default)]
struct Caught(Mutex<Vec<Job>>);

impl Executor for Caught {
    fn execute(&self, jobs: &mut dyn Iterator<Item = Job>) {
        self.0.lock().unwrap().extend(jobs);
    }
}

const EXPORT: Export = Export {
    size: 1 << 30,
    flags: export::SEND_FLUSH | export::SEND_TRIM,
    min_block: 1,
    max_block: 8192,
    structured: true,
};

/// An engine whose executor is `Requests`.
struct Rig {
    engine: Offload<HeapMemory>,
    requests: Requests,
    page: HeapMemory,
}

impl Rig {
    fn new(export: Export, ios: &[(Io, usize)]) -> Self {
        let caught = Arc::new(Caught::default());
        let geometry = Geometry {
            sectors: export.size / 512,
            sector_size: 512,
            physical_sector_size: 512,
            copied: false,
            read_only: false,
            discard: None,
        };
        let page = HeapMemory::pages(8);
        let executor: Arc<dyn Executor> = caught.clone();
        let mut engine = Offload::new(executor, geometry, 16, &Arc::default()).unwrap();
        for (tag, (io, len)) in ios.iter().enumerate() {
            let seg = IoSeg { buf: page.clone(), offset: 0, len: *len };
            let mut segments = if *len > 0 { alloc::vec![seg] } else { Vec::new() };
            engine.submit(tag as u32, *io, &mut segments).unwrap();
        }
        engine.kick();
        let mut requests = Requests::new(export);
        caught.0.lock().unwrap().drain(..).for_each(|job| requests.add(job));
        Self { engine, requests, page }
    }

    /// Sends everything. Returns each request's command, cookie, offset and length.
    fn sent(&mut self) -> Vec<(u16, u64, u64, u32)> {
        let mut all = Vec::new();
        loop {
            let bytes = self.requests.outgoing().to_vec();
            if bytes.is_empty() {
                break;
            }
            all.extend(&bytes);
            self.requests.sent(bytes.len());
        }
        let mut rest = all.as_slice();
        let mut found = Vec::new();
        while let Ok((request, after)) = wire::Request::ref_from_prefix(rest) {
            let (command, len) = (request.command.get(), request.len.get());
            let expected =
                wire::Request::new(command, request.cookie.get(), request.offset.get(), len);
            assert_eq!(request.as_bytes(), expected.as_bytes(), "magic and flags");
            found.push((command, request.cookie.get(), request.offset.get(), len));
            rest = after.get(if command == cmd::WRITE { len as usize } else { 0 }..).unwrap();
        }
        assert!(rest.is_empty());
        found
    }

    fn done(&mut self) -> Vec<(u32, Result<(), EngineError>)> {
        let mut done = Vec::new();
        self.engine.reap(&mut |tag, result, _| done.push((tag, result)));
        done
    }
}

fn chunk(flags: u16, kind: u16, cookie: u64, data: &[u8]) -> Vec<u8> {
    let mut bytes = wire::STRUCTURED_REPLY.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

fn simple(error: u32, cookie: u64) -> Vec<u8> {
    let mut bytes = wire::SIMPLE_REPLY.to_be_bytes().to_vec();
    bytes.extend(error.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes
}

#[test]
fn split_read_with_chunks_and_holes_is_parsed_byte_by_byte() {
    let mut rig = Rig::new(EXPORT, &[(Io::Read { sector: 2 }, 12288)]);
    let sent = rig.sent();
    assert_eq!(
        sent.iter().map(|r| (r.0, r.2, r.3)).collect::<Vec<_>>(),
        [(cmd::READ, 1024, 8192), (cmd::READ, 9216, 4096),]
    );
    let (first, second) = (sent[0].1, sent[1].1);
    // The parts arrive out of order. The first part has two chunks: the second half comes first,
    // and the first half is a hole.
    let mut bytes = Vec::new();
    let data =
        |at: u64, len: usize, byte: u8| [&at.to_be_bytes()[..], &alloc::vec![byte; len]].concat();
    bytes.extend(chunk(chunk::DONE, chunk::OFFSET_DATA, second, &data(9216, 4096, 3)));
    bytes.extend(chunk(0, chunk::OFFSET_DATA, first, &data(1024 + 4096, 4096, 2)));
    let hole = [&1024u64.to_be_bytes()[..], &4096u32.to_be_bytes()].concat();
    bytes.extend(chunk(0, chunk::OFFSET_HOLE, first, &hole));
    bytes.extend(chunk(chunk::DONE, chunk::NONE, first, &[]));
    rig.page.fill(0, 12288, 9).unwrap();
    let mut held = Vec::new();
    for byte in bytes {
        assert!(rig.done().is_empty());
        held.push(byte);
        held = rig.requests.incoming(&held).unwrap().to_vec();
    }
    assert_eq!(rig.done(), [(0, Ok(()))]);
    let mut got = [0; 12288];
    rig.page.read_bytes(0, &mut got).unwrap();
    assert!(got[..4096].iter().all(|b| *b == 0));
    assert!(got[4096..8192].iter().all(|b| *b == 2));
    assert!(got[8192..].iter().all(|b| *b == 3));
}

#[test]
fn reply_whose_range_overflows_loses_connection() {
    // The distance from the request's offset and the length together are more than 64 bits.
    for (kind, data) in [
        (chunk::OFFSET_DATA, alloc::vec![1; 2000]),
        (chunk::OFFSET_HOLE, 2000_u32.to_be_bytes().to_vec()),
    ] {
        let mut rig = Rig::new(EXPORT, &[(Io::Read { sector: 2 }, 12288)]);
        let first = rig.sent()[0].1;
        let data = [&(u64::MAX - 50).to_be_bytes()[..], &data].concat();
        let reply = chunk(chunk::DONE, kind, first, &data);
        let lost = Lost("it sends more data than requested");
        assert_eq!(rig.requests.incoming(&reply), Err(lost));
        assert!(rig.done().is_empty());
        rig.requests.fail(EngineError::Os(5));
        assert_eq!(rig.done(), [(0, Err(EngineError::Os(5)))]);
    }
}

#[test]
fn range_that_is_sent_twice_loses_connection() {
    // Both chunks together are as long as the read, but a part of its buffer has no data.
    let data = |at: u64| [&at.to_be_bytes()[..], &[1; 4096]].concat();
    let hole = |at: u64| [&at.to_be_bytes()[..], &4096_u32.to_be_bytes()].concat();
    for (first, second) in [
        ((chunk::OFFSET_DATA, data(0)), (chunk::OFFSET_DATA, data(0))),
        ((chunk::OFFSET_DATA, data(0)), (chunk::OFFSET_DATA, data(4095))),
        ((chunk::OFFSET_DATA, data(4096)), (chunk::OFFSET_DATA, data(1))),
        ((chunk::OFFSET_HOLE, hole(0)), (chunk::OFFSET_DATA, data(0))),
        ((chunk::OFFSET_DATA, data(2048)), (chunk::OFFSET_HOLE, hole(0))),
        ((chunk::OFFSET_HOLE, hole(4096)), (chunk::OFFSET_HOLE, hole(4096))),
    ] {
        let mut rig = Rig::new(EXPORT, &[(Io::Read { sector: 0 }, 8192)]);
        let cookie = rig.sent()[0].1;
        rig.requests.incoming(&chunk(0, first.0, cookie, &first.1)).unwrap();
        let lost = Lost("it sends the same data twice");
        let reply = chunk(chunk::DONE, second.0, cookie, &second.1);
        assert_eq!(rig.requests.incoming(&reply), Err(lost));
        assert!(rig.done().is_empty());
        rig.requests.fail(EngineError::Os(5));
    }
}

#[test]
fn read_in_too_many_pieces_loses_connection() {
    // Every other byte: each of them needs memory until the bytes between them arrive.
    let mut rig = Rig::new(EXPORT, &[(Io::Read { sector: 0 }, 8192)]);
    let cookie = rig.sent()[0].1;
    let mut piece = |at: u64| {
        let data = [&at.to_be_bytes()[..], &[1]].concat();
        rig.requests.incoming(&chunk(0, chunk::OFFSET_DATA, cookie, &data)).map(<[u8]>::len)
    };
    let accepted = (0..4096).position(|n| piece(2 * n).is_err());
    assert_eq!(accepted, Some(RANGES));
    assert_eq!(piece(8191), Err(Lost("it sends data in too many pieces")));
    rig.requests.fail(EngineError::Os(5));
}

#[test]
fn read_without_all_of_its_data_loses_connection() {
    let mut rig = Rig::new(EXPORT, &[(Io::Read { sector: 0 }, 8192)]);
    let cookie = rig.sent()[0].1;
    let data = [&1_u64.to_be_bytes()[..], &[1; 8191]].concat();
    let reply = chunk(chunk::DONE, chunk::OFFSET_DATA, cookie, &data);
    assert_eq!(rig.requests.incoming(&reply), Err(Lost("it sends less data than requested")));
    assert!(rig.done().is_empty());
    rig.requests.fail(EngineError::Os(5));
}

#[test]
fn reconnect_resends_only_requests_without_reply_in_order() {
    let ios = [
        (Io::Write { sector: 0 }, 4096),
        (Io::Flush, 0),
        (Io::Discard { sector: 8, sectors: 8, secure: false }, 0),
        (Io::Read { sector: 0 }, 512),
    ];
    let mut rig = Rig::new(EXPORT, &ios);
    let first = rig.sent();
    assert_eq!(
        rig.requests.incoming(&chunk(chunk::DONE, chunk::NONE, first[1].1, &[])),
        Ok(&[][..])
    );
    // Half of a read was received.
    let half = chunk(0, chunk::OFFSET_DATA, first[3].1, &[&[0; 8][..], &[1; 256]].concat());
    rig.requests.incoming(&half).unwrap();
    rig.requests.requeue(EXPORT);
    let second = rig.sent();
    assert_eq!(second.iter().map(|r| r.0).collect::<Vec<_>>(), [cmd::WRITE, cmd::TRIM, cmd::READ]);
    assert!(second.iter().all(|new| first.iter().all(|old| old.1 != new.1)), "new cookies");
    // A reply with the old cookie is rejected.
    assert!(rig.requests.incoming(&simple(0, first[0].1)).is_err());
    assert!(rig.requests.incoming(&chunk(chunk::DONE, chunk::NONE, second[2].1, &[])).is_err());
    rig.requests.fail(EngineError::Os(5));
    let done = rig.done();
    assert_eq!(done[0], (1, Ok(())));
    assert_eq!(done[1..].iter().map(|d| d.1).collect::<Vec<_>>(), [Err(EngineError::Os(5)); 3]);
}

#[test]
fn nbd_error_reply_fails_only_its_request() {
    let plain = Export { structured: false, ..EXPORT };
    let mut rig = Rig::new(plain, &[(Io::Write { sector: 0 }, 512), (Io::Read { sector: 0 }, 512)]);
    let sent = rig.sent();
    rig.requests.incoming(&simple(28, sent[0].1)).unwrap();
    rig.requests.incoming(&simple(95, sent[1].1)).unwrap();
    assert_eq!(rig.done(), [(0, Err(EngineError::Os(28))), (1, Err(EngineError::Unsupported))]);
    let mut rig = Rig::new(EXPORT, &[(Io::Flush, 0), (Io::Flush, 0)]);
    let sent = rig.sent();
    let error = [&5u32.to_be_bytes()[..], &3u16.to_be_bytes(), b"why"].concat();
    rig.requests.incoming(&chunk(chunk::DONE, chunk::ERROR | 1, sent[0].1, &error)).unwrap();
    assert_eq!(rig.done(), [(0, Err(EngineError::Os(5)))]);
    assert!(rig.requests.incoming(&simple(wire::SHUTDOWN, sent[1].1)).is_err());
    rig.requests.fail(EngineError::Os(5));
}

proptest! {
    #[test]
    fn random_server_replies_complete_each_request_once(
        replies in prop::collection::vec(
            (0u64..6, 0u16..4, prop_oneof![0u16..4, Just(0x8001u16)], 0u64..20_000, 0usize..5000, any::<bool>()),
            0..40,
        ),
        cut in 1usize..64,
    ) {
        let ios = [(Io::Read { sector: 0 }, 12288), (Io::Write { sector: 9 }, 512), (Io::Flush, 0)];
        let mut rig = Rig::new(EXPORT, &ios);
        rig.sent();
        let mut held = Vec::new();
        'all: for (cookie, flags, kind, offset, len, plain) in replies {
            let bytes = if plain {
                simple(u32::from(kind), cookie)
            } else {
                chunk(flags, kind, cookie, &[&offset.to_be_bytes()[..], &alloc::vec![1; len]].concat())
            };
            for piece in bytes.chunks(cut) {
                held.extend(piece);
                match rig.requests.incoming(&held) {
                    Ok(rest) => held = rest.to_vec(),
                    Err(Lost(_)) => break 'all,
                }
                prop_assert!(held.len() < 8192, "incomplete input is bounded");
            }
        }
        rig.requests.requeue(EXPORT);
        rig.requests.fail(EngineError::Os(5));
        let mut tags: Vec<u32> = rig.done().iter().map(|done| done.0).collect();
        tags.sort();
        prop_assert_eq!(tags, [0, 1, 2], "each request completes once");
    }
}

#[test]
fn request_header_has_the_layout_of_the_protocol() {
    let request = wire::Request::new(cmd::TRIM, 0x0102, 0x0304 << 48, 0x0506);
    let bytes = b"\x25\x60\x95\x13\0\0\0\x04\0\0\0\0\0\0\x01\x02\x03\x04\0\0\0\0\0\0\0\0\x05\x06";
    assert_eq!(request.as_bytes(), bytes);
}

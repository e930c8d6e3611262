//! The NBD client with a hostile server: the handshake, and the replies to requests.
//!
//! Each operation completes exactly once, and data is only written to the buffers of its operation.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pvio_blkback::engine::{BlockEngine, Io};
use pvio_ring::IoSeg;
use pvio_ring::shm::{HeapMemory, PAGE_SIZE, Region};
use pvio_storage::engine::nbd::fuzz::{Client, negotiate};
use std::collections::{HashMap, VecDeque};
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

#[derive(Arbitrary, Debug)]
enum Input {
    Handshake(Vec<Handshake>),
    Transmission { structured: bool, large_blocks: bool, actions: Vec<Action> },
}

/// What a server sends during the handshake.
#[derive(Arbitrary, Debug)]
enum Handshake {
    Greeting { flags: u16 },
    Reply { option: u8, kind: u8, error: bool, info: Option<u8>, data: Vec<u8> },
    Export { size: u64, flags: u16 },
    Raw(Vec<u8>),
}

#[derive(Arbitrary, Debug)]
enum Action {
    Submit {
        kind: u8,
        sector: u16,
        pages: u8,
    },
    Kick,
    Send,
    /// A reply to a request that the server has seen.
    Simple {
        which: u8,
        error: u8,
        data: Data,
    },
    Chunk {
        which: u8,
        flags: u8,
        kind: Kind,
        distance: u64,
        len: u16,
        cut: Option<u32>,
        data: Data,
    },
    Raw(Vec<u8>),
    Receive(u16),
    Reconnect,
    Fail,
}

#[derive(Arbitrary, Debug)]
enum Kind {
    None,
    Data,
    Hole,
    Error,
    Other(u16),
}

#[derive(Arbitrary, Debug)]
enum Data {
    /// As much as was requested.
    Whole,
    Some(u16),
}

struct Seen {
    cookie: u64,
    offset: u64,
    len: u32,
    read: bool,
}

fuzz_target!(|input: Input| match input {
    Input::Handshake(steps) => handshake(&steps),
    Input::Transmission { structured, large_blocks, actions } => {
        transmission(structured, large_blocks, actions);
    }
});

fn handshake(steps: &[Handshake]) {
    let mut bytes = Vec::new();
    for step in steps {
        match step {
            Handshake::Greeting { flags } => {
                bytes.extend(b"NBDMAGICIHAVEOPT");
                bytes.extend(flags.to_be_bytes());
            }
            Handshake::Reply { option, kind, error, info, data } => {
                let mut payload: Vec<u8> =
                    info.iter().flat_map(|info| u16::from(*info).to_be_bytes()).collect();
                payload.extend(data);
                reply(&mut bytes, *option, u32::from(*kind) | u32::from(*error) << 31, &payload);
            }
            Handshake::Export { size, flags } => {
                let mut payload = vec![0, 0];
                payload.extend(size.to_be_bytes());
                payload.extend(flags.to_be_bytes());
                reply(&mut bytes, 7, 3, &payload);
            }
            Handshake::Raw(raw) => bytes.extend(raw),
        }
    }
    // What fits into the socket, so that nothing blocks.
    bytes.truncate(64 << 10);
    let (client, mut server) = UnixStream::pair().expect("descriptors");
    server.write_all(&bytes).expect("room in the socket");
    server.shutdown(Shutdown::Write).expect("a connected socket");
    if let Ok(export) = negotiate(client) {
        assert!(export.size >= 512 && export.size % 512 == 0, "an export of {} bytes", export.size);
        assert!(export.min_block <= 4096 && export.max_block >= 4096, "blocks of an export");
    }
}

fn reply(bytes: &mut Vec<u8>, option: u8, kind: u32, payload: &[u8]) {
    bytes.extend(0x3_e889_0455_65a9_u64.to_be_bytes());
    bytes.extend(u32::from(option).to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend((payload.len() as u32).to_be_bytes());
    bytes.extend(payload);
}

fn transmission(structured: bool, large_blocks: bool, actions: Vec<Action>) {
    const SIZE: u64 = 1 << 30;
    // Flush, trim and zeroes.
    let flags = 1 | 1 << 2 | 1 << 5 | 1 << 6;
    let mut client =
        Client::new(SIZE, flags, if large_blocks { 1 << 25 } else { 8192 }, structured);
    let mut submitted: HashMap<u32, HeapMemory> = HashMap::new();
    let mut sent = Vec::new();
    let mut seen: VecDeque<Seen> = VecDeque::new();
    let mut input: Vec<u8> = Vec::new();
    for action in actions {
        match action {
            Action::Submit { kind, sector, pages } => {
                let Some(tag) = (0..16).find(|tag| !submitted.contains_key(tag)) else { continue };
                let pages = 1 + usize::from(pages % 8);
                // One page more, which no operation may change.
                let buf = HeapMemory::pages(pages + 1);
                let (sector, len) = (sector.into(), pages * PAGE_SIZE);
                let data = || vec![IoSeg { buf: buf.clone(), offset: 0, len }];
                let (io, mut segments) = match kind % 5 {
                    0 | 1 => (Io::Read { sector }, data()),
                    2 => (Io::Write { sector }, data()),
                    3 => (Io::Flush, Vec::new()),
                    _ => (Io::Discard { sector, sectors: pages as u64, secure: false }, Vec::new()),
                };
                client.engine.submit(tag, io, &mut segments).expect("a free tag");
                submitted.insert(tag, buf);
            }
            Action::Kick => {
                client.engine.kick();
                client.take_jobs();
            }
            Action::Send => {
                sent.extend(client.send());
                parse_requests(&mut sent, &mut seen);
            }
            Action::Simple { which, error, data } => {
                let Some(request) = take(&mut seen, which) else { continue };
                input.extend(0x6744_6698_u32.to_be_bytes());
                input.extend(u32::from(error % 8).to_be_bytes());
                input.extend(request.cookie.to_be_bytes());
                let whole = if request.read && error % 8 == 0 { request.len as usize } else { 0 };
                input.resize(input.len() + data.len(whole), 0x33);
            }
            Action::Chunk { which, flags, kind, distance, len, cut, data } => {
                let done = flags & 1 == 1;
                let request = if done { take(&mut seen, which) } else { peek(&seen, which) };
                let Some(request) = request else { continue };
                let offset = request.offset.wrapping_add(distance);
                let mut payload = Vec::new();
                let kind = match kind {
                    Kind::None => 0,
                    Kind::Data => {
                        payload.extend(offset.to_be_bytes());
                        payload.resize(8 + data.len(request.len as usize), 0x44);
                        1
                    }
                    Kind::Hole => {
                        payload.extend(offset.to_be_bytes());
                        payload.extend((data.len(request.len as usize) as u32).to_be_bytes());
                        2
                    }
                    Kind::Error => {
                        payload.extend(5_u32.to_be_bytes());
                        payload.extend(0_u16.to_be_bytes());
                        payload.resize(6 + usize::from(len % 64), b'e');
                        0x8001
                    }
                    Kind::Other(kind) => {
                        payload.resize(len.into(), 0);
                        kind
                    }
                };
                input.extend(0x668e_33ef_u32.to_be_bytes());
                input.extend(u16::from(flags).to_be_bytes());
                input.extend(kind.to_be_bytes());
                input.extend(request.cookie.to_be_bytes());
                input.extend(cut.unwrap_or(payload.len() as u32).to_be_bytes());
                input.extend(payload);
            }
            Action::Raw(bytes) => input.extend(bytes),
            Action::Receive(most) => {
                let now = input.len().min(usize::from(most) * 16);
                match client.receive(&input[..now]) {
                    Ok(left) => drop(input.drain(..now - left)),
                    Err(_) => {
                        input.clear();
                        (sent, seen) = Default::default();
                        client.reconnect();
                    }
                }
            }
            Action::Reconnect => {
                input.clear();
                (sent, seen) = Default::default();
                client.reconnect();
            }
            Action::Fail => {
                client.take_jobs();
                client.fail();
                assert!(client.is_idle());
                (sent, seen) = Default::default();
            }
        }
        reap(&mut client, &mut submitted);
        assert!(input.len() < 16 << 20);
    }
    // The server is given up: everything completes.
    client.engine.kick();
    for _ in 0..64 {
        client.take_jobs();
        client.fail();
        reap(&mut client, &mut submitted);
    }
    assert!(submitted.is_empty(), "{} operations do not complete", submitted.len());
}

impl Data {
    fn len(&self, whole: usize) -> usize {
        match self {
            Self::Whole => whole,
            Self::Some(len) => usize::from(*len),
        }
    }
}

fn reap(client: &mut Client, submitted: &mut HashMap<u32, HeapMemory>) {
    client.engine.reap(&mut |tag, _, _| {
        let buf = submitted.remove(&tag).expect("the completion of an operation in flight");
        let mut guard = vec![0; PAGE_SIZE];
        buf.read_bytes(buf_len(&buf) - PAGE_SIZE, &mut guard).expect("inside the memory");
        assert!(guard.iter().all(|byte| *byte == 0), "memory beyond the buffer was written");
    });
}

fn buf_len(buf: &HeapMemory) -> usize {
    use pvio_ring::shm::SharedMemory;
    buf.len()
}

/// Parses the requests that the client has sent.
fn parse_requests(sent: &mut Vec<u8>, seen: &mut VecDeque<Seen>) {
    while let Some(head) = sent.first_chunk::<28>() {
        let word =
            |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let double = |at| u64::from(word(at)) << 32 | u64::from(word(at + 4));
        assert_eq!(word(0), 0x2560_9513, "magic number of a request");
        let (command, len) = (word(4) & 0xffff, word(24));
        let whole = 28 + if command == 1 { len as usize } else { 0 };
        if sent.len() < whole {
            break;
        }
        seen.push_back(Seen { cookie: double(8), offset: double(16), len, read: command == 0 });
        sent.drain(..whole);
    }
}

fn take(seen: &mut VecDeque<Seen>, which: u8) -> Option<Seen> {
    let len = seen.len();
    if len == 0 { None } else { seen.remove(usize::from(which) % len) }
}

fn peek(seen: &VecDeque<Seen>, which: u8) -> Option<Seen> {
    let Seen { cookie, offset, len, read } = seen.get(usize::from(which) % seen.len().max(1))?;
    Some(Seen { cookie: *cookie, offset: *offset, len: *len, read: *read })
}

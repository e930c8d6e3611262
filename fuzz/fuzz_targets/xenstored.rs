//! The xenstore server with two hostile domains, one connected through its shared page.
//!
//! After each action the store is consistent, and its administrator's node is neither changed nor read.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pvio_fuzz::Value;
use pvio_ring::DomId;
use pvio_ring::byte_ring::ByteRing;
use pvio_ring::shm::{HeapMemory, Region};
use pvio_xenbus::wire::page::PageWord;
use pvio_xenbus::wire::{Header, Op, PAYLOAD_MAX};
use pvio_xenstored::{ConnId, Quota, RingConnection, Store};
use std::sync::atomic::Ordering;

const SECRET: &[u8] = b"value that no domain may read";
/// Numbers of a message that the server handles at once, by quota.
const QUOTA: Quota =
    Quota { nodes: 12, watches: 6, transactions: 3, memory: 8000, events: 8, ..Quota::XEN };

#[derive(Arbitrary, Debug)]
enum Action {
    /// A request of one of the domains.
    Request(Requester, Message),
    /// Bytes to the ring, as far as there is room.
    Raw(Vec<u8>),
    /// A word of the page: indices, features, connection, error.
    Scribble(u8, Value),
    Reconnect,
    Serve,
    /// The administrator does something.
    Admin(Message),
    Release(bool),
}

#[derive(Arbitrary, Debug)]
enum Requester {
    Ring,
    Call,
}

#[derive(Arbitrary, Debug)]
struct Message {
    op: u8,
    tx: u8,
    path: Path,
    tail: Tail,
}

#[derive(Arbitrary, Debug)]
enum Path {
    Own(Vec<u8>),
    Known(u8),
    None,
}

#[derive(Arbitrary, Debug)]
enum Tail {
    None,
    Value(u8),
    Text(String),
    Perms(Vec<(u8, u8)>),
    Bytes(Vec<u8>),
    Long(u16),
}

impl Message {
    fn payload(&self) -> Vec<u8> {
        const KNOWN: [&str; 14] = [
            "/",
            "a",
            "a/b",
            "/local/domain",
            "/local/domain/1",
            "/local/domain/2/a",
            "/secret",
            "/shared",
            "/shared/x",
            "@releaseDomain",
            "@introduceDomain",
            "T",
            "F",
            "/tool/xenstored",
        ];
        let mut bytes = match &self.path {
            Path::Own(name) => {
                // Names from a small alphabet, so that they occur again.
                let mut path: Vec<u8> =
                    name.iter().take(12).map(|byte| b"ab/"[usize::from(byte % 3)]).collect();
                path.push(0);
                path
            }
            Path::Known(which) => {
                format!("{}\0", KNOWN[usize::from(*which) % KNOWN.len()]).into_bytes()
            }
            Path::None => Vec::new(),
        };
        match &self.tail {
            Tail::None => {}
            Tail::Value(value) => bytes.extend(format!("{value}\0").into_bytes()),
            Tail::Text(text) => bytes.extend(text.as_bytes()),
            Tail::Perms(perms) => bytes.extend(perms.iter().take(8).flat_map(|(kind, domain)| {
                format!("{}{}\0", ["n", "r", "w", "b"][usize::from(kind % 4)], domain % 4)
                    .into_bytes()
            })),
            Tail::Bytes(raw) => bytes.extend(raw),
            Tail::Long(len) => bytes.resize(bytes.len() + usize::from(len % 5000), b'x'),
        }
        bytes.truncate(PAYLOAD_MAX + 1);
        bytes
    }

    fn header(&self, len: usize) -> Header {
        Header {
            kind: u32::from(self.op % 26),
            req_id: 7,
            tx_id: u32::from(self.tx % 4),
            len: len as u32,
        }
    }
}

fn call(store: &mut Store, conn: ConnId, op: Op, payload: &[u8]) -> Vec<u8> {
    let header = Header::new(op, 7, 0, payload.len()).expect("a short payload");
    store.handle(conn, &header, payload).expect("the administrator's connection");
    let mut out = Vec::new();
    store.take_output(conn, &mut out, 0);
    out
}

fuzz_target!(|actions: Vec<Action>| {
    let mut store = Store::new(QUOTA);
    let dom0 = store.connect(DomId::DOM0);
    for domain in [1, 2] {
        let home = format!("/local/domain/{domain}\0");
        call(&mut store, dom0, Op::Mkdir, home.as_bytes());
        call(&mut store, dom0, Op::SetPerms, format!("{home}n{domain}\0").as_bytes());
    }
    call(&mut store, dom0, Op::Write, &[b"/secret\0", SECRET].concat());
    call(&mut store, dom0, Op::SetPerms, b"/secret\0n0\0");
    call(&mut store, dom0, Op::Mkdir, b"/shared\0");
    call(&mut store, dom0, Op::SetPerms, b"/shared\0b0\0");

    let page = HeapMemory::pages(1);
    let mut ring = RingConnection::new(&mut store, DomId(1), page.clone()).expect("a whole page");
    let mut guest = ByteRing::xenstore_client(page.clone()).expect("a whole page");
    let mut second = store.connect(DomId(2));
    let mut admin_changed_secret = false;

    for action in actions {
        match action {
            Action::Request(Requester::Ring, message) => {
                let payload = message.payload();
                let bytes = [&message.header(payload.len()).emit()[..], &payload].concat();
                let _ = guest.write(&bytes);
                serve(&mut ring, &mut store);
            }
            Action::Request(Requester::Call, message) => {
                let payload = message.payload();
                if store.handle(second, &message.header(payload.len()), &payload).is_err() {
                    store.disconnect(second);
                    second = store.connect(DomId(2));
                }
                let mut out = Vec::new();
                store.take_output(second, &mut out, 1 << 16);
                assert!(out.len() <= (1 << 17), "{} bytes of output", out.len());
                assert!(
                    !out.windows(SECRET.len()).any(|bytes| bytes == SECRET),
                    "the secret is read"
                );
            }
            Action::Raw(bytes) => drop(guest.write(&bytes)),
            Action::Scribble(word, value) => {
                let at = 2048 + usize::from(word % 9) * 4;
                let now = page.load_u32(at, Ordering::Relaxed).expect("inside the page");
                let value = match value {
                    Value::Any(value) => value,
                    Value::Near(distance) => now.wrapping_add_signed(distance.into()),
                };
                page.store_u32(at, value, Ordering::Release);
            }
            Action::Reconnect => {
                PageWord::Connection.store(&page, 1);
                serve(&mut ring, &mut store);
                guest.reattach();
            }
            Action::Serve => serve(&mut ring, &mut store),
            Action::Admin(message) => {
                let payload = message.payload();
                admin_changed_secret |=
                    payload.starts_with(b"/\0") || payload.starts_with(b"/secret");
                if store.handle(dom0, &message.header(payload.len()), &payload).is_err() {
                    // It may have released itself.
                    return;
                }
                let mut out = Vec::new();
                store.take_output(dom0, &mut out, 1 << 16);
            }
            Action::Release(first) => {
                store.release(DomId(if first { 1 } else { 2 }));
                store.take_dropped();
                if first {
                    ring = RingConnection::new(&mut store, DomId(1), page.clone()).expect("a page");
                } else {
                    second = store.connect(DomId(2));
                }
            }
        }
        let mut out = vec![0; 1024];
        if let Ok(read) = guest.read(&mut out) {
            assert!(
                !out[..read].windows(SECRET.len()).any(|bytes| bytes == SECRET),
                "the secret is read"
            );
        }
        if let Err(fault) = store.check() {
            panic!("the store is inconsistent at {fault}");
        }
    }
    if !admin_changed_secret && store.can_accept(dom0) {
        let out = call(&mut store, dom0, Op::Read, b"/secret\0");
        assert!(out.ends_with(SECRET), "the secret was changed");
    }
    ring.close(&mut store);
    store.disconnect(second);
    for domain in [1, 2] {
        store.release(DomId(domain));
    }
    assert_eq!(store.check(), Ok(()));
    assert_eq!((store.connections_of(DomId(1)), store.connections_of(DomId(2))), (0, 0));
});

fn serve(ring: &mut RingConnection<HeapMemory>, store: &mut Store) {
    for round in 0.. {
        match ring.serve(store) {
            Ok(served) if served.more => {}
            _ => break,
        }
        // The ring holds 64 messages at most, and a connection's buffer a few more.
        assert!(round < 200, "the server is never idle");
    }
}

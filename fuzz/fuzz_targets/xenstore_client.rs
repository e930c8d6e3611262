//! The xenstore client over a shared page, with a hostile server.
//!
//! Each call returns after the server has nothing more to say, and memory for events is bounded.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pvio_fuzz::Value;
use pvio_ring::byte_ring::ByteRing;
use pvio_ring::shm::{HeapMemory, Region};
use pvio_xenbus::client::{EVENT_LIMIT, RingClient, RingEvents};
use pvio_xenbus::handshake::common::{BackendKind, DeviceAddr, list_backends, read_state};
use pvio_xenbus::wire::{HEADER_LEN, Header, decode};
use pvio_xenbus::{Xenstore, XsError, transaction};
use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::time::Duration;

#[derive(Arbitrary, Debug)]
struct Input {
    calls: Vec<Call>,
    server: Vec<Action>,
}

#[derive(Arbitrary, Debug)]
enum Call {
    Read,
    Directory,
    Perms,
    Write(Vec<u8>),
    Watch(u8),
    Unwatch(u8),
    Transaction,
    Poll,
    Wait,
    State,
    List,
    Domain,
    Reconnect,
}

/// What the server does when the client notifies it or waits for it.
#[derive(Arbitrary, Debug)]
enum Action {
    /// Answers the oldest request that it has read.
    Answer {
        kind: Option<u8>,
        id: Option<u8>,
        tx: Option<u8>,
        payload: Payload,
    },
    Event {
        path: Vec<u8>,
        token: u8,
        many: u8,
    },
    Header {
        kind: u8,
        id: u8,
        len: u32,
    },
    Raw(Vec<u8>),
    Scribble(u8, Value),
    Nothing,
}

#[derive(Arbitrary, Debug)]
enum Payload {
    Ok,
    Error(u8),
    Number(u32),
    Text(Vec<u8>),
}

impl Payload {
    fn bytes(self) -> Vec<u8> {
        const ERRORS: [&str; 6] =
            ["ENOENT\0", "EACCES\0", "EAGAIN\0", "EQUOTA\0", "NONSENSE\0", ""];
        match self {
            Self::Ok => b"OK\0".to_vec(),
            Self::Error(which) => ERRORS[usize::from(which) % ERRORS.len()].into(),
            Self::Number(number) => format!("{number}\0").into_bytes(),
            Self::Text(bytes) => bytes,
        }
    }
}

struct Server {
    ring: ByteRing<HeapMemory>,
    page: HeapMemory,
    actions: VecDeque<Action>,
    input: Vec<u8>,
    output: Vec<u8>,
}

impl Server {
    /// Does the next thing. Returns whether there was one.
    fn act(&mut self) -> bool {
        let mut bytes = [0; 1024];
        if let Ok(read) = self.ring.read(&mut bytes) {
            self.input.extend(&bytes[..read]);
        }
        self.input.truncate(1 << 16);
        let Some(action) = self.actions.pop_front() else { return self.flush() };
        match action {
            Action::Answer { kind, id, tx, payload } => {
                let error = matches!(payload, Payload::Error(_));
                let payload = payload.bytes();
                if let Ok(Some(frame)) = decode(&self.input) {
                    let (header, len) = (frame.header, frame.wire_len());
                    self.input.drain(..len);
                    let kind = kind.map_or(if error { 16 } else { header.kind }, u32::from);
                    let req_id = id.map_or(header.req_id, u32::from);
                    let tx_id = tx.map_or(header.tx_id, u32::from);
                    self.message(
                        Header { kind, req_id, tx_id, len: payload.len() as u32 },
                        &payload,
                    );
                }
            }
            Action::Event { path, token, many } => {
                for number in 0..=many % 16 {
                    let payload =
                        [&b"/p"[..], &[b'a' + number], &path, b"\0t", &[b'0' + token % 4], b"\0"]
                            .concat();
                    self.message(
                        Header { kind: 15, req_id: 0, tx_id: 0, len: payload.len() as u32 },
                        &payload,
                    );
                }
            }
            Action::Header { kind, id, len } => {
                self.message(Header { kind: kind.into(), req_id: id.into(), tx_id: 0, len }, &[]);
            }
            Action::Raw(bytes) => self.output.extend(bytes),
            Action::Scribble(word, value) => {
                let at = 2048 + usize::from(word % 9) * 4;
                let now = self.page.load_u32(at, Ordering::Relaxed).expect("inside the page");
                let value = match value {
                    Value::Any(value) => value,
                    Value::Near(distance) => now.wrapping_add_signed(distance.into()),
                };
                self.page.store_u32(at, value, Ordering::Release);
            }
            Action::Nothing => {}
        }
        self.flush();
        true
    }

    fn message(&mut self, header: Header, payload: &[u8]) {
        self.output.extend(header.emit());
        self.output.extend(payload);
    }

    fn flush(&mut self) -> bool {
        let written = self.ring.write(&self.output).unwrap_or(0);
        self.output.drain(..written);
        written > 0
    }
}

/// The event channel of the client: each wait lets the server act.
struct Events(Server);

impl RingEvents for Events {
    type Deadline = ();

    fn deadline(&self, _: Duration) -> Option<()> {
        Some(())
    }

    fn notify(&mut self) -> Result<(), XsError> {
        Ok(())
    }

    fn wait(&mut self, until: Option<()>) -> Result<bool, XsError> {
        match (self.0.act(), until) {
            (true, _) => Ok(true),
            (false, Some(())) => Ok(false),
            (false, None) => Err(XsError::Transport("the server has ended".into())),
        }
    }
}

fuzz_target!(|input: Input| {
    let page = HeapMemory::pages(1);
    let server = Server {
        ring: ByteRing::xenstore_server(page.clone()).expect("a whole page"),
        page: page.clone(),
        actions: input.server.into(),
        input: Vec::new(),
        output: Vec::new(),
    };
    // The server supports reconnection and errors.
    page.store_u32(2064, 3, Ordering::Relaxed);
    let mut client = RingClient::attach(page, Events(server)).expect("a whole page");
    let token = |which: u8| format!("t{}", which % 4);
    for call in input.calls {
        match call {
            Call::Read => drop(client.read_opt("/a")),
            Call::Directory => {
                if let Ok(names) = client.directory("/a") {
                    assert!(names.len() <= 1 << 16);
                }
            }
            Call::Perms => drop(client.get_perms("/a")),
            Call::Write(value) => drop(client.write("/a", &value)),
            Call::Watch(which) => drop(client.watch("/p", &token(which))),
            Call::Unwatch(which) => drop(client.unwatch("/p", &token(which))),
            Call::Transaction => {
                let _ = transaction(&mut client, |xs| xs.write("/a", b"1"));
            }
            Call::Poll => {
                let mut count = 0;
                while let Ok(Some(_)) = client.poll_event() {
                    count += 1;
                    assert!(count <= 2 * EVENT_LIMIT, "more events than are queued");
                }
            }
            Call::Wait => drop(client.wait_event(Some(Duration::from_secs(1)))),
            Call::State => drop(read_state(&mut client, "/b")),
            Call::List => {
                if let Ok(found) = list_backends(&mut client, BackendKind::Vbd, pvio_fuzz::BACK) {
                    let mut all = found.clone();
                    all.dedup();
                    let _: Vec<DeviceAddr> = all;
                }
            }
            Call::Domain => drop(client.domain_path(pvio_fuzz::FRONT)),
            Call::Reconnect => drop(client.reconnect()),
        }
    }
    assert_eq!(HEADER_LEN, 16);
});

//! The client with an untrusted server: the test acts as the server, byte by byte.
#![cfg(feature = "std")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use pvio_xenbus::client::{Client, EVENT_LIMIT};
use pvio_xenbus::wire::{HEADER_LEN, Header, Op, XsErrno};
use pvio_xenbus::{Xenstore, XsError};

fn message(kind: u32, req_id: u32, payload: &[u8]) -> Vec<u8> {
    let header = Header { kind, req_id, tx_id: 0, len: payload.len() as u32 };
    [&header.emit()[..], payload].concat()
}

fn event(path: &str) -> Vec<u8> {
    message(Op::WatchEvent.code(), 0, format!("{path}\0t\0").as_bytes())
}

/// Has the client read `/x` and responds with `bytes`; returns the client, the result of the read,
/// and the server's socket, still open.
fn read_answered_by(bytes: Vec<u8>) -> (Client, Result<Vec<u8>, XsError>, UnixStream) {
    let (mine, mut theirs) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || {
        let mut request = [0; HEADER_LEN + 3];
        theirs.read_exact(&mut request).unwrap();
        assert_eq!(request, message(Op::Read.code(), 1, b"/x\0")[..]);
        theirs.write_all(&bytes).unwrap();
        theirs
    });
    let mut client = Client::from_stream(mine).unwrap();
    let answer = client.read("/x");
    (client, answer, server.join().unwrap())
}

#[test]
fn events_received_with_response_are_available_immediately() {
    let read = Op::Read.code();
    let bytes = [event("/before"), message(read, 1, b"v"), event("/after")].concat();
    let (mut client, answer, _open) = read_answered_by(bytes);
    assert_eq!(answer.unwrap(), b"v");
    assert_eq!(client.poll_event().unwrap().unwrap().path, "/before");
    assert_eq!(client.poll_event().unwrap().unwrap().path, "/after");
    assert_eq!(client.poll_event().unwrap(), None);
}

#[test]
fn error_response_keeps_connection_and_protocol_violation_ends_it() {
    let (read, error) = (Op::Read.code(), Op::Error.code());
    let (client, answer, mut server) = read_answered_by(message(error, 1, b"ENOSPC\0"));
    assert_eq!(answer.unwrap_err().errno(), Some(XsErrno::NoSpc));
    let mut client = client;
    server.write_all(&event("/later")).unwrap();
    assert_eq!(client.wait_event(None).unwrap().unwrap().path, "/later");

    let (_client, answer, _open) = read_answered_by(message(error, 1, b"EWHATEVER\0"));
    assert_eq!(
        answer.unwrap_err().errno(),
        Some(XsErrno::Inval),
        "unknown error name is returned as EINVAL"
    );

    let oversize = Header { kind: read, req_id: 1, tx_id: 0, len: 4097 }.emit().to_vec();
    for breach in [
        message(read, 2, b"v"),
        message(Op::Write.code(), 1, b"OK\0"),
        message(99, 1, b""),
        message(Op::WatchEvent.code(), 0, b"/no-token\0"),
        oversize,
    ] {
        let (mut client, answer, _open) = read_answered_by(breach.clone());
        assert!(matches!(answer, Err(XsError::Protocol(_))), "{breach:?}: {answer:?}");
        assert_eq!(client.read("/x"), answer, "error of the connection is permanent");
        assert!(matches!(client.poll_event(), Err(XsError::Protocol(_))));
    }
    // A response without a request.
    let (mine, mut theirs) = UnixStream::pair().unwrap();
    let mut client = Client::from_stream(mine).unwrap();
    theirs.write_all(&message(read, 1, b"v")).unwrap();
    assert!(matches!(client.wait_event(None), Err(XsError::Protocol(_))));
}

#[test]
fn closed_connection_is_reported_after_earlier_events() {
    let (mut client, answer, server) =
        read_answered_by([event("/last"), message(Op::Read.code(), 1, b"")].concat());
    answer.unwrap();
    drop(server);
    assert_eq!(client.wait_event(None).unwrap().unwrap().path, "/last");
    assert_eq!(client.wait_event(None), Err(XsError::Closed));
    assert_eq!(client.write("/x", b""), Err(XsError::Closed));
    let (mine, theirs) = UnixStream::pair().unwrap();
    drop(theirs);
    assert_eq!(Client::from_stream(mine).unwrap().read("/x"), Err(XsError::Closed));
}

/// A server that fills the client's socket before it reads the request must not cause a deadlock.
#[test]
fn event_flood_before_response_does_not_block_and_is_bounded() {
    let (mine, mut theirs) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || {
        for i in 0..100_000 {
            theirs.write_all(&event(&format!("/flood/{i}"))).unwrap();
        }
        let mut request = [0; HEADER_LEN + 3];
        theirs.read_exact(&mut request).unwrap();
        theirs.write_all(&message(Op::Read.code(), 1, b"v")).unwrap();
        theirs
    });
    let mut client = Client::from_stream(mine).unwrap();
    assert_eq!(client.read("/x").unwrap(), b"v");
    let _open = server.join().unwrap();
    let mut count = 0;
    while client.poll_event().unwrap().is_some() {
        count += 1;
    }
    assert_eq!(count, EVENT_LIMIT, "events are limited without a matching watch");
}

#[test]
fn client_descriptor_is_readable_while_event_is_pending() {
    let (mine, mut theirs) = UnixStream::pair().unwrap();
    let mut client = Client::from_stream(mine).unwrap();
    let ready = |client: &Client| {
        let mut fds = [rustix::event::PollFd::new(client, rustix::event::PollFlags::IN)];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::event::poll(&mut fds, Some(&now)).unwrap() == 1
    };
    assert!(!ready(&client));
    theirs.write_all(&event("/e")).unwrap();
    assert!(ready(&client));
    assert_eq!(client.wait_event(Some(Duration::ZERO)).unwrap().unwrap().path, "/e");
    assert!(!ready(&client));
}

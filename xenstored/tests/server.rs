//! The server on sockets: privileges, and resistance to hostile clients.
#![cfg(feature = "std")]

mod common;

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use common::drain;
use pvio_ring::DomId;
use pvio_xenbus::client::Client;
use pvio_xenbus::wire::{HEADER_LEN, Header, Op, XsErrno, decode};
use pvio_xenbus::{TRANSACTION_RETRIES, Xenstore, XsError, transaction};
use pvio_xenstored::Store;
use pvio_xenstored::server::{Server, ServerHandle};

const SHORT: Duration = Duration::from_millis(200);
const LONG: Duration = Duration::from_secs(10);

fn serve() -> (ServerHandle, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let server =
        Server::new(Store::default()).listen(dir.path().join("s")).unwrap().spawn().unwrap();
    (server, dir)
}

fn guest(server: &ServerHandle, domid: u16) -> Client {
    let mut dom0 = server.connect_local(DomId::DOM0).unwrap();
    pvio_xenbus::handshake::common::create_domain(&mut dom0, DomId(domid), "guest").unwrap();
    server.introduce(DomId(domid)).unwrap();
    server.connect_local(DomId(domid)).unwrap()
}

#[test]
fn socket_is_private_to_dom0_and_removed_on_shutdown() {
    let (server, dir) = serve();
    let path = dir.path().join("s");
    assert_eq!(server.path(), Some(&*path));
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let mut tool = Client::connect(&path).unwrap();
    tool.write("relative", b"1").unwrap();
    let mut dom0 = server.connect_local(DomId::DOM0).unwrap();
    assert_eq!(dom0.read("/local/domain/0/relative").unwrap(), b"1");
    server.check().unwrap().unwrap();
    server.shutdown();
    assert!(!path.exists());
    assert_eq!(tool.read("relative"), Err(XsError::Closed));
    assert_eq!(dom0.poll_event(), Err(XsError::Closed));
}

#[test]
fn stale_socket_is_replaced_and_live_socket_or_file_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    drop(UnixListener::bind(&path).unwrap());
    let server = Server::new(Store::default()).listen(&path).unwrap().spawn().unwrap();
    let second = Server::new(Store::default()).listen(&path).unwrap_err();
    assert_eq!(second.kind(), std::io::ErrorKind::AddrInUse);
    Client::connect(&path).unwrap().read("/").unwrap();
    drop(server);
    std::fs::write(&path, "precious").unwrap();
    let third = Server::new(Store::default()).listen(&path).unwrap_err();
    assert_eq!(third.kind(), std::io::ErrorKind::AddrInUse);
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[test]
fn domain_connection_has_own_permissions_and_home() {
    let (server, _dir) = serve();
    let mut d5 = guest(&server, 5);
    d5.write("data/x", b"mine").unwrap();
    assert_eq!(d5.read("/local/domain/5/data/x").unwrap(), b"mine");
    assert_eq!(d5.read("name").unwrap(), b"guest");
    assert_eq!(d5.write("name", b"other").unwrap_err().errno(), Some(XsErrno::Acces));
    assert_eq!(d5.domain_path(DomId(5)).unwrap(), "/local/domain/5");
    let refused = d5.read("/tool/xenstored").unwrap_err();
    assert_eq!(refused.to_string(), "Read of `/tool/xenstored` was rejected: EACCES");
}

#[test]
fn events_between_responses_are_delivered_and_wait_times_out() {
    let (server, _dir) = serve();
    let mut watcher = server.connect_local(DomId::DOM0).unwrap();
    let mut writer = server.connect_local(DomId::DOM0).unwrap();
    watcher.watch("/w", "t").unwrap();
    assert_eq!(drain(&mut watcher, SHORT), [("/w".into(), "t".into())]);
    writer.write("/w/a", b"").unwrap();
    for _ in 0..50 {
        // The event arrives before one of these responses and must not be mistaken for it.
        watcher.read("/").unwrap();
    }
    writer.write("/w/b", b"").unwrap();
    let event = |path: &str| (path.to_string(), "t".to_string());
    assert_eq!(drain(&mut watcher, SHORT), [event("/w/a"), event("/w/b")]);
    let start = Instant::now();
    assert_eq!(watcher.wait_event(Some(SHORT)).unwrap(), None);
    assert!(start.elapsed() >= SHORT && start.elapsed() < LONG);
    assert_eq!(watcher.poll_event().unwrap(), None);

    let late = std::thread::spawn(move || {
        std::thread::sleep(SHORT);
        writer.write("/w/late", b"").unwrap();
    });
    assert_eq!(watcher.wait_event(Some(LONG)).unwrap().unwrap().path, "/w/late");
    late.join().unwrap();
    watcher.unwatch("/w", "t").unwrap();
    assert_eq!(watcher.unwatch("/w", "t").unwrap_err().errno(), Some(XsErrno::NoEnt));
}

#[test]
fn concurrent_transactions_are_retried_until_committed() {
    let (server, _dir) = serve();
    server.connect_local(DomId::DOM0).unwrap().write("/n", b"0").unwrap();
    let count = |mut xs: Client| {
        move || {
            let mut conflicts = 0;
            for _ in 0..50 {
                loop {
                    let bump = transaction(&mut xs, |tx| {
                        let n: u32 = String::from_utf8(tx.read("/n")?).unwrap().parse().unwrap();
                        tx.write("/n", (n + 1).to_string().as_bytes())
                    });
                    match bump {
                        Err(XsError::Conflict) => conflicts += 1,
                        other => break other.unwrap(),
                    }
                }
            }
            // Each failed attempt is caused by one of the 100 transactions of the other two.
            assert!(
                conflicts <= 100 / TRANSACTION_RETRIES,
                "{conflicts} conflicts without interference"
            );
        }
    };
    let threads: Vec<_> = (0..3)
        .map(|_| std::thread::spawn(count(server.connect_local(DomId::DOM0).unwrap())))
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    assert_eq!(server.connect_local(DomId::DOM0).unwrap().read("/n").unwrap(), b"150");
}

#[test]
fn long_directory_is_assembled_from_parts() {
    let (server, _dir) = serve();
    let mut xs = server.connect_local(DomId::DOM0).unwrap();
    let names: Vec<String> = (0..600).map(|i| format!("quite-a-long-name-{i:04}")).collect();
    transaction(&mut xs, |tx| names.iter().try_for_each(|n| tx.mkdir(&format!("/big/{n}"))))
        .unwrap();
    assert_eq!(xs.directory("/big").unwrap(), names);
    assert_eq!(xs.directory("/big/quite-a-long-name-0001").unwrap(), [""; 0]);
    let too_long = xs.write("/x", &[0; 4094]).unwrap_err();
    assert_eq!(too_long, XsError::TooLong);
    xs.write("/x", &[7; 4093]).unwrap();
    assert_eq!(xs.read("/x").unwrap(), [7; 4093]);
}

#[test]
fn released_domain_is_disconnected_and_release_watch_fires() {
    let (server, _dir) = serve();
    let mut dom0 = server.connect_local(DomId::DOM0).unwrap();
    dom0.watch("@releaseDomain", "gone").unwrap();
    drain(&mut dom0, SHORT);
    let mut d5 = guest(&server, 5);
    let mut second = server.connect_local(DomId(5)).unwrap();
    d5.write("data/x", b"").unwrap();
    assert!(server.release(DomId(5)).unwrap());
    assert!(!server.release(DomId(5)).unwrap());
    assert_eq!(d5.read("data/x"), Err(XsError::Closed));
    assert_eq!(second.wait_event(Some(LONG)), Err(XsError::Closed));
    assert_eq!(drain(&mut dom0, SHORT), [("@releaseDomain".into(), "gone".into())]);
    assert_eq!(dom0.read_opt("/local/domain/5/data").unwrap(), None);
    // With requests on the wire, as a toolstack does it.
    let mut d6 = guest(&server, 6);
    dom0.request(Op::Release, 0, &[b"6\0"]).unwrap();
    assert_eq!(d6.wait_event(Some(LONG)), Err(XsError::Closed));
    server.check().unwrap().unwrap();
}

#[test]
fn malformed_frame_closes_only_its_connection() {
    let (_server, dir) = serve();
    let path = dir.path().join("s");
    let mut good = Client::connect(&path).unwrap();
    for bad in [&[0xff_u8; 64][..], &Header { kind: 2, req_id: 0, tx_id: 0, len: 4097 }.emit()] {
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream.write_all(bad).unwrap();
        assert_eq!(
            stream.read(&mut [0; 64]).unwrap_or(0),
            0,
            "connection is closed without a response"
        );
        good.read("/").unwrap();
    }
    // Half a message, then no data, then the end of the stream.
    let mut half = UnixStream::connect(&path).unwrap();
    half.write_all(&Header { kind: 2, req_id: 0, tx_id: 0, len: 100 }.emit()).unwrap();
    half.write_all(b"/to").unwrap();
    good.read("/").unwrap();
    drop(half);
    // Responses to requests sent before a half-close are still delivered.
    let mut last = UnixStream::connect(&path).unwrap();
    last.write_all(&Header { kind: 2, req_id: 9, tx_id: 0, len: 2 }.emit()).unwrap();
    last.write_all(b"/\0").unwrap();
    last.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = Vec::new();
    last.read_to_end(&mut answer).unwrap();
    assert_eq!(decode(&answer).unwrap().unwrap().header.req_id, 9);
    good.read("/").unwrap();
}

#[test]
fn client_that_never_reads_is_blocked_by_backpressure() {
    let (server, dir) = serve();
    let mut deaf = UnixStream::connect(dir.path().join("s")).unwrap();
    let mut setup = server.connect_local(DomId::DOM0).unwrap();
    setup.write("/big", &[b'x'; 4000]).unwrap();
    let mut request = Header { kind: Op::Read.code(), req_id: 1, tx_id: 0, len: 5 }.emit().to_vec();
    request.extend_from_slice(b"/big\0");
    deaf.set_write_timeout(Some(SHORT)).unwrap();
    let mut sent = 0;
    while let Ok(n) = deaf.write(&request) {
        sent += n;
        assert!(sent < 64 << 20, "server accepts unlimited requests");
        if n < request.len() {
            break;
        }
    }
    setup.read("/").unwrap();
    // Once it reads, every complete request gets its response, in order.
    let asked = sent / request.len();
    assert!(asked > 100);
    deaf.set_read_timeout(Some(LONG)).unwrap();
    let mut answers = vec![0; asked * (HEADER_LEN + 4000)];
    deaf.read_exact(&mut answers).unwrap();
    for answer in answers.chunks(HEADER_LEN + 4000) {
        assert_eq!(decode(answer).unwrap().unwrap().payload, [b'x'; 4000]);
    }
}

#[test]
fn watcher_that_never_reads_has_bounded_event_queue() {
    let (server, dir) = serve();
    let mut deaf = Client::connect(dir.path().join("s")).unwrap();
    deaf.watch("/w", "t").unwrap();
    let mut writer = server.connect_local(DomId::DOM0).unwrap();
    let pad = "p".repeat(1000);
    for i in 0..4000 {
        writer.write(&format!("/w/{i}/{pad}"), b"").unwrap();
    }
    let seen = drain(&mut deaf, SHORT);
    assert!(seen.len() < 3000, "{} events were queued", seen.len());
    assert!(seen.contains(&("/w".into(), "t".into())), "no merged event");
    deaf.read("/").unwrap();
}

#[test]
fn connections_beyond_limit_wait_until_others_close() {
    let (server, dir) = serve();
    let path = dir.path().join("s");
    for round in 0..5 {
        let mut clients: Vec<_> = (0..100).map(|_| Client::connect(&path).unwrap()).collect();
        for (i, xs) in clients.iter_mut().enumerate() {
            xs.write(&format!("/m/{i}"), round.to_string().as_bytes()).unwrap();
        }
    }
    // More than the maximum number of connections: the surplus waits, and is served when there is
    // room.
    let mut first: Vec<_> = (0..512).map(|_| Client::connect(&path).unwrap()).collect();
    for xs in &mut first {
        xs.read("/").unwrap();
    }
    let mut surplus = Client::connect(&path).unwrap();
    surplus_waits(&mut surplus);
    drop(first);
    assert_eq!(surplus.read("/m/7").unwrap(), b"4");
    server.check().unwrap().unwrap();
}

fn surplus_waits(xs: &mut Client) {
    assert_eq!(xs.poll_event().unwrap(), None);
    assert_eq!(xs.wait_event(Some(SHORT)).unwrap(), None);
}

//! Network block devices: real servers that are killed and restarted under load.

use crate::support::{Machine, has, text, workload};
use pvio_blkback::engine::{EngineError, Io};
use pvio_ring::shm::HeapMemory;
use pvio_storage::engine::nbd::{NbdLink, NbdOptions};
use pvio_storage::engine::offload::Offload;
use pvio_storage::engine::wait::{WaitEngine, Waiting};
use pvio_storage::image::spec::NbdSpec;
use pvio_storage::image::{Image, ImageOptions, Spec};
use pvio_xenbus::handshake::vbd::Mode;
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// A server process; killed when it is dropped.
struct Server(Child);

impl Server {
    /// Starts a server and waits until `ready`.
    fn start(program: &str, args: &[String], ready: impl Fn() -> bool) -> Self {
        let child = Command::new(program)
            .args(args)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut server = Self(child);
        while !ready() {
            assert!(server.0.try_wait().unwrap().is_none(), "{program} {args:?} exited");
            std::thread::sleep(Duration::from_millis(5));
        }
        server
    }

    fn qemu_unix(socket: &Path, image: &Path) -> Self {
        // The server does not bind to an existing socket.
        let _ = std::fs::remove_file(socket);
        let args = ["-k", text(socket), "-x", "disk", "-f", "raw", "-t", "-e", "8", text(image)];
        Self::start("qemu-nbd", &args.map(String::from), || listens(socket))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Returns whether a server accepts connections. The socket's name exists slightly earlier.
fn listens(socket: &Path) -> bool {
    UnixStream::connect(socket).is_ok()
}

fn sparse(dir: &Path, bytes: u64) -> PathBuf {
    let image = dir.join("disk.img");
    std::fs::File::create(&image).unwrap().set_len(bytes).unwrap();
    image
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn guest_uses_qemu_nbd_disk_over_unix_socket() {
    if !has("qemu-nbd", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (image, socket) = (sparse(dir.path(), 24 << 20), dir.path().join("s"));
    let server = Server::qemu_unix(&socket, &image);
    let mut model = vec![0; 24 << 20];
    let params = format!("nbd+unix:///disk?socket={}", text(&socket));
    let mut guest = Machine::new().disk(&params, Mode::ReadWrite);
    workload(&mut guest, &mut model, 1, 60, true);
    assert!(guest.everything() == model);
    guest.close();
    drop(server);
    assert!(std::fs::read(image).unwrap() == model);
}

#[test]
fn guest_uses_nbdkit_disk_over_tcp() {
    if !has("nbdkit", "nbdkit") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = sparse(dir.path(), 16 << 20);
    let port = free_port();
    let args =
        ["-f", "-i", "127.0.0.1", "-p", &port.to_string(), "-e", "a b", "file", text(&image)];
    let there = || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok();
    let server = Server::start("nbdkit", &args.map(String::from), there);
    let mut model = vec![0; 16 << 20];
    let params = format!("nbd://127.0.0.1:{port}/a%20b");
    let mut guest = Machine::new().disk(&params, Mode::ReadWrite);
    workload(&mut guest, &mut model, 2, 60, true);
    assert!(guest.everything() == model);
    guest.close();
    drop(server);
    assert!(std::fs::read(image).unwrap() == model);
}

#[test]
fn nbd_server_with_minimal_features_and_small_blocks_is_used() {
    if !has("nbdkit", "nbdkit") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (image, socket) = (sparse(dir.path(), 8 << 20), dir.path().join("s"));
    // Features that the plain server lacks: simple replies only, and small and large block sizes.
    let args = [
        "-f",
        "--no-sr",
        "-U",
        text(&socket),
        "--filter=blocksize-policy",
        "--filter=nozero",
        "file",
        text(&image),
        "blocksize-minimum=4096",
        "blocksize-maximum=8192",
        "blocksize-error-policy=error",
    ]
    .map(String::from);
    let server = Server::start("nbdkit", &args, || listens(&socket));
    let spec: Spec = format!("nbd+unix:///?socket={}", text(&socket)).parse().unwrap();
    let disk = Image::open_disk(&spec, ImageOptions::default()).unwrap();
    assert_eq!(disk.geometry().sector_size, 4096);
    let mut engine = disk.engine::<HeapMemory>(8).unwrap();
    let page = HeapMemory::pages(11);
    let seg = |len| vec![pvio_ring::IoSeg { buf: page.clone(), offset: 0, len }];
    pvio_ring::shm::Region::fill(&page, 0, 45056, 7).unwrap();
    assert_eq!(perform(&mut engine, Io::Write { sector: 8 }, seg(45056)), Ok(()));
    assert_eq!(perform(&mut engine, Io::Flush, vec![]), Ok(()));
    let zeroes = Io::WriteZeroes { sector: 16, sectors: 16 };
    assert_eq!(perform(&mut engine, zeroes, vec![]), Ok(()));
    assert_eq!(perform(&mut engine, Io::Read { sector: 8 }, seg(45056)), Ok(()));
    let mut got = [0; 45056];
    pvio_ring::shm::Region::read_bytes(&page, 0, &mut got).unwrap();
    let expected = |i: usize| if (4096..12288).contains(&i) { 0 } else { 7 };
    assert!(got.iter().enumerate().all(|(i, b)| *b == expected(i)));
    drop(server);
}

#[test]
fn nbd_server_restarted_under_load_loses_no_request() {
    if !has("qemu-nbd", "qemu-utils") {
        return;
    }
    const KILLS: usize = 8;
    let dir = tempfile::tempdir().unwrap();
    let (image, socket) = (sparse(dir.path(), 16 << 20), dir.path().join("s"));
    let mut server = Server::qemu_unix(&socket, &image);
    let params = format!("nbd+unix:///disk?socket={}", text(&socket));
    let mut guest = Machine::new().disk(&params, Mode::ReadWrite);
    let mut model = vec![0; 16 << 20];
    let kills = Arc::new(AtomicUsize::new(0));
    let (counted, where_, what) = (Arc::clone(&kills), socket, image.clone());
    let killer = std::thread::spawn(move || {
        while counted.load(Ordering::SeqCst) < KILLS {
            std::thread::sleep(Duration::from_millis(60));
            drop(server);
            server = Server::qemu_unix(&where_, &what);
            counted.fetch_add(1, Ordering::SeqCst);
        }
        server
    });
    let mut seed = 0;
    while kills.load(Ordering::SeqCst) < KILLS {
        seed += 1;
        workload(&mut guest, &mut model, seed, 20, true);
    }
    let server = killer.join().unwrap();
    assert!(guest.everything() == model);
    guest.close();
    drop(server);
    assert!(std::fs::read(image).unwrap() == model);
}

/// Executes one operation and returns its outcome.
fn perform(
    engine: &mut impl WaitEngine<HeapMemory>,
    io: Io,
    mut segments: Vec<pvio_ring::IoSeg<HeapMemory>>,
) -> Result<(), EngineError> {
    engine.submit(0, io, &mut segments).unwrap();
    engine.kick();
    let mut over = None;
    while over.is_none() {
        engine.wait_due(None).unwrap();
        engine.reap(&mut |_, result, _| over = Some(result));
    }
    over.unwrap()
}

#[test]
fn lost_nbd_server_fails_requests_after_timeout_and_reconnects() {
    if !has("qemu-nbd", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (image, socket) = (sparse(dir.path(), 1 << 20), dir.path().join("s"));
    let server = Server::qemu_unix(&socket, &image);
    let params = format!("nbd+unix:///disk?socket={}", text(&socket));
    let Spec::Nbd(spec) = params.parse().unwrap() else { panic!("spec is an NBD address") };
    let options = NbdOptions { patience: Duration::from_millis(300), ..NbdOptions::default() };
    let link = Arc::new(NbdLink::connect(&spec, options).unwrap());
    let engine =
        Offload::<HeapMemory>::new(link.clone(), link.geometry(false), 4, &Arc::default()).unwrap();
    let completions = engine.completions().unwrap();
    let mut engine = Waiting::new(engine, Some(completions)).unwrap();
    assert_eq!(perform(&mut engine, Io::Flush, vec![]), Ok(()));
    drop(server);
    assert_eq!(perform(&mut engine, Io::Flush, vec![]), Err(EngineError::Os(5)));
    assert_eq!(perform(&mut engine, Io::Flush, vec![]), Err(EngineError::Os(5)));
    // A disk of another size is not the disk that the guest uses.
    let other = dir.path().join("other.img");
    std::fs::File::create(&other).unwrap().set_len(2 << 20).unwrap();
    let wrong = Server::qemu_unix(&socket, &other);
    assert_eq!(perform(&mut engine, Io::Flush, vec![]), Err(EngineError::Os(5)));
    drop(wrong);
    let _server = Server::qemu_unix(&socket, &image);
    // On a busy machine the server may take longer to reply than the link's short timeout.
    let mut answers = (0..100).map(|_| perform(&mut engine, Io::Flush, vec![]));
    assert!(
        answers.any(|answer| answer == Ok(())),
        "engine does not reconnect to the restarted server"
    );
    let counted = link.events().map(|(name, log)| (name, log.seen()));
    assert_eq!(counted[1], ("server-back", 1));
    assert!(
        counted[0].1 >= 1 && counted[2].1 >= 3,
        "connection lost and requests failed each time: {counted:?}"
    );
}

#[test]
fn nbd_connect_failure_is_reported_with_its_code() {
    let connect = |address: &str, read_only| {
        let Spec::Nbd(spec) = address.parse::<Spec>().unwrap() else { panic!("{address}") };
        let spec: NbdSpec = spec;
        let options = NbdOptions { read_only, ..NbdOptions::default() };
        NbdLink::connect(&spec, options).map(drop).map_err(|e| (e.code(), e.to_string()))
    };
    let (code, _) = connect("nbd+unix:///x?socket=/nowhere/s", false).unwrap_err();
    assert_eq!(code, "nbd-unreachable");
    // Another service is listening.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let other = std::thread::spawn(move || {
        let mut peer = listener.accept().unwrap().0;
        std::io::Write::write_all(&mut peer, b"SSH-2.0-OpenSSH_9.2p1 Debian-2").unwrap();
    });
    let (code, _) = connect(&format!("nbd://127.0.0.1:{port}/"), false).unwrap_err();
    assert_eq!(code, "nbd-protocol");
    other.join().unwrap();

    if !has("qemu-nbd", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (image, socket) = (sparse(dir.path(), 1 << 20), dir.path().join("s"));
    let server = Server::qemu_unix(&socket, &image);
    let (code, what) =
        connect(&format!("nbd+unix:///nothing?socket={}", text(&socket)), false).unwrap_err();
    assert_eq!(code, "nbd-no-export");
    assert!(what.contains("\"nothing\""), "{what}");
    drop(server);
    std::fs::remove_file(&socket).unwrap();
    let args = ["-r", "-k", text(&socket), "-x", "disk", "-f", "raw", "-t", text(&image)];
    let _server = Server::start("qemu-nbd", &args.map(String::from), || listens(&socket));
    let address = format!("nbd+unix:///disk?socket={}", text(&socket));
    assert_eq!(connect(&address, false).unwrap_err().0, "nbd-read-only");
    assert_eq!(connect(&address, true), Ok(()));
}

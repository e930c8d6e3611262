//! Functions that the tests share.
#![allow(dead_code, reason = "each test program uses a part of it")]

pub mod ring;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pvio_ring::DomId;
use pvio_xenbus::wire::{Header, Op, XsErrno, decode, split_string};
use pvio_xenbus::{WatchEvent, Xenstore};
use pvio_xenstored::{ConnId, Store};

/// Executes one request in wire format and returns its response; events are dropped.
pub fn ask(
    store: &mut Store,
    conn: ConnId,
    op: Op,
    tx: u32,
    payload: &[u8],
) -> Result<Vec<u8>, XsErrno> {
    let header = Header::new(op, 77, tx, payload.len()).unwrap();
    store.handle(conn, &header, payload).unwrap();
    let mut out = Vec::new();
    // A limit of 0 returns no event.
    store.take_output(conn, &mut out, 0);
    let frame = decode(&out).unwrap().unwrap();
    assert_eq!(frame.wire_len(), out.len(), "one response per request");
    assert_eq!((frame.header.req_id, frame.header.tx_id), (77, tx));
    if frame.header.op() == Some(Op::Error) {
        let (name, rest) = split_string(frame.payload).unwrap();
        assert!(rest.is_empty());
        return Err(XsErrno::from_name(name).unwrap());
    }
    assert_eq!(frame.header.op(), Some(op));
    Ok(frame.payload.to_vec())
}

/// Creates a domain's home directory, which the domain owns, and connects the domain.
pub fn guest(store: &mut Store, dom0: ConnId, domid: u16) -> ConnId {
    let home = format!("/local/domain/{domid}\0");
    ask(store, dom0, Op::Mkdir, 0, home.as_bytes()).unwrap();
    ask(store, dom0, Op::SetPerms, 0, format!("{home}n{domid}\0").as_bytes()).unwrap();
    store.introduce(DomId(domid));
    store.connect(DomId(domid))
}

/// Takes all queued events, as (path, token).
pub fn events(store: &mut Store, conn: ConnId) -> Vec<(String, String)> {
    let mut out = Vec::new();
    store.take_output(conn, &mut out, usize::MAX);
    let mut rest = &out[..];
    let mut found = Vec::new();
    while let Some(frame) = decode(rest).unwrap() {
        assert_eq!(frame.header.op(), Some(Op::WatchEvent));
        assert_eq!((frame.header.req_id, frame.header.tx_id), (0, 0));
        let (path, tail) = split_string(frame.payload).unwrap();
        let (token, tail) = split_string(tail).unwrap();
        assert!(tail.is_empty());
        found.push((
            String::from_utf8(path.to_vec()).unwrap(),
            String::from_utf8(token.to_vec()).unwrap(),
        ));
        rest = &rest[frame.wire_len()..];
    }
    assert!(rest.is_empty());
    found
}

/// Takes all events that arrive within `time`, as (path, token).
pub fn drain<X: Xenstore>(xs: &mut X, time: Duration) -> Vec<(String, String)> {
    let mut found = Vec::new();
    while let Some(WatchEvent { path, token }) = xs.wait_event(Some(time)).unwrap() {
        found.push((path, token));
    }
    found
}

/// Returns the path of a Debian program; prints that it is missing otherwise.
pub fn debian(path: &str, package: &str) -> Option<PathBuf> {
    let found = Path::new(path).exists().then(|| path.into());
    if found.is_none() {
        eprintln!("SKIPPED: {path} is missing; install it with: apt-get install {package}");
    }
    found
}

/// A child process that is killed, by its id, when the test ends.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Debian's `xenstored` on a separate socket. It needs a hypervisor, which a preloaded library
/// emulates (`reference/hypervisor.c`), so that domains can be introduced and can communicate with
/// it through their rings ([`Reference::dir`] contains the pages and the events).
pub struct Reference {
    pub socket: PathBuf,
    pub dir: tempfile::TempDir,
    _daemon: Running,
}

impl Reference {
    pub fn start() -> Option<Self> {
        let program = debian("/usr/lib/xen-4.17/bin/xenstored", "xen-utils-4.17")?;
        debian("/usr/include/xenctrl.h", "libxen-dev")?;
        let dir = tempfile::tempdir().unwrap();
        let library = dir.path().join("hypervisor.so");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/hypervisor.c");
        let compiled = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-o"])
            .args([&library, &source])
            .output();
        match compiled {
            Err(e) => {
                eprintln!("SKIPPED: no C compiler ({e}); install one with: apt-get install gcc");
                return None;
            }
            Ok(done) => assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr)),
        }
        rustix::fs::mknodat(
            rustix::fs::CWD,
            dir.path().join("events"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
            0,
        )
        .unwrap();
        let socket = dir.path().join("socket");
        let words = dir.path().join("words");
        let daemon = Command::new(program)
            .args(["--no-fork", "--pid-file"])
            .arg(dir.path().join("pid"))
            .env("LD_PRELOAD", library)
            .env("FAKE_XEN", dir.path())
            .env("XENSTORED_PATH", &socket)
            .env("XENSTORED_RUNDIR", dir.path())
            .env("XENSTORED_ROOTDIR", dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&words).unwrap())
            .spawn()
            .unwrap();
        let mut daemon = Running(daemon);
        let until = Instant::now() + Duration::from_secs(10);
        while std::os::unix::net::UnixStream::connect(&socket).is_err() {
            let ended = daemon.0.try_wait().unwrap();
            assert_eq!(ended, None, "Debian's xenstored exited; see standard error");
            assert!(Instant::now() < until, "Debian's xenstored neither listens nor exits");
            std::thread::sleep(Duration::from_millis(10));
        }
        Some(Self { socket, dir, _daemon: daemon })
    }
}

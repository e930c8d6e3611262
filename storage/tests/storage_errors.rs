//! Status of the guest's requests when the host's file system fails an operation once: a FUSE file
//! system whose calls fail as each test determines.

#[path = "support/fuse.rs"]
mod fuse;
#[path = "support/mod.rs"]
mod support;

use fuse::{OneFile, ServedFile, part, put};
use fuser::{Errno, ReplyWrite};
use pvio_blkback::engine::{BlockEngine, EngineError, Io};
use pvio_ring::IoSeg;
use pvio_ring::shm::{HeapMemory, Region};
use pvio_storage::engine::wait::{DiskEngine, WaitEngine};
use pvio_storage::image::{Disk, Image};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use support::{has, text, tool};

const EIO: i32 = 5;
/// `EINTR` and `EAGAIN`: the operation must be retried.
const TRANSIENT: [i32; 2] = [4, 11];
const OLD: u8 = 0xaa;

/// The file, and the errors of calls on it.
#[derive(Default)]
struct Host {
    bytes: Vec<u8>,
    /// Errors of the next calls of each kind, last first.
    fsync: Vec<i32>,
    fallocate: Vec<i32>,
    write: Vec<i32>,
    /// Every call and its error, or 0.
    log: Vec<(&'static str, i32)>,
}

impl Host {
    fn call(&mut self, what: &'static str) -> Result<(), Errno> {
        let errors = match what {
            "fsync" => &mut self.fsync,
            "fallocate" => &mut self.fallocate,
            _ => &mut self.write,
        };
        let error = errors.pop().unwrap_or_default();
        self.log.push((what, error));
        if error == 0 { Ok(()) } else { Err(Errno::from_i32(error)) }
    }
}

struct FailingFile(Arc<Mutex<Host>>);

impl FailingFile {
    fn host(&self) -> MutexGuard<'_, Host> {
        self.0.lock().unwrap()
    }
}

impl ServedFile for FailingFile {
    fn len(&self) -> u64 {
        self.host().bytes.len() as u64
    }

    fn read(&self, at: u64, len: usize) -> Vec<u8> {
        part(&self.host().bytes, at, len)
    }

    fn write(&self, at: u64, data: &[u8], reply: ReplyWrite) {
        let mut host = self.host();
        match host.call("write") {
            Ok(()) => {
                put(&mut host.bytes, at, data);
                reply.written(data.len() as u32);
            }
            Err(error) => reply.error(error),
        }
    }

    fn resize(&self, len: u64) -> Result<(), Errno> {
        self.host().bytes.resize(len as usize, 0);
        Ok(())
    }

    fn fallocate(&self, _: i32, at: u64, len: u64) -> Result<(), Errno> {
        let mut host = self.host();
        host.call("fallocate")?;
        put(&mut host.bytes, at, &vec![0; len as usize]);
        Ok(())
    }

    fn sync(&self) -> Result<(), Errno> {
        self.host().call("fsync")
    }
}

/// A mounted file system whose file has given bytes, and its directory.
struct Mounted {
    host: Arc<Mutex<Host>>,
    dir: tempfile::TempDir,
    session: Option<fuser::BackgroundSession>,
}

impl Mounted {
    /// Returns `None`, with a message, if no FUSE file system can be mounted.
    fn new(bytes: Vec<u8>) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let host = Arc::new(Mutex::new(Host { bytes, ..Host::default() }));
        match fuser::spawn_mount(
            OneFile(FailingFile(host.clone())),
            dir.path(),
            &fuser::Config::default(),
        ) {
            Ok(session) => Some(Self { host, dir, session: Some(session) }),
            Err(error) => {
                println!("SKIPPED: no FUSE file system can be mounted ({error}); run as root");
                None
            }
        }
    }

    fn open(&self, format: &str) -> Image {
        let disk = format!("{format}:{}", text(&self.dir.path().join("disk")));
        Image::open_as(&disk.parse::<Disk>().unwrap()).unwrap()
    }

    fn host<T>(&self, change: impl FnOnce(&mut Host) -> T) -> T {
        change(&mut self.host.lock().unwrap())
    }

    /// Returns the calls since the last time.
    fn log(&self) -> Vec<(&'static str, i32)> {
        self.host(|host| std::mem::take(&mut host.log))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        self.session.take().into_iter().for_each(|session| drop(session.umount_and_join()));
    }
}

/// Executes one operation; writes are pages of sevens.
fn one(engine: &mut DiskEngine<HeapMemory>, io: Io) -> Result<(), EngineError> {
    let page = HeapMemory::pages(1);
    page.fill(0, 4096, 7).unwrap();
    with(engine, io, page)
}

/// Executes one operation with a page of data.
fn with(engine: &mut DiskEngine<HeapMemory>, io: Io, page: HeapMemory) -> Result<(), EngineError> {
    let mut segments = Vec::new();
    if matches!(io, Io::Write { .. } | Io::Read { .. }) {
        segments.push(IoSeg { buf: page, offset: 0, len: 4096 });
    }
    engine.submit(0, io, &mut segments).unwrap();
    engine.kick();
    let mut result = None;
    loop {
        engine.reap(&mut |_, done, _| result = Some(done));
        if let Some(result) = result {
            return result;
        }
        engine.wait_due(Some(Duration::from_secs(5))).unwrap();
    }
}

#[test]
fn interrupted_operation_is_retried_as_same_operation() {
    let Some(mounted) = Mounted::new(vec![OLD; 1 << 20]) else { return };
    let image = mounted.open("raw");
    let mut engine = image.engine::<HeapMemory>(8).unwrap();
    let there = |host: &mut Host| host.bytes[64 * 512..64 * 512 + 4096].to_vec();
    for error in TRANSIENT {
        // Once, and more often than is retried without a delay.
        for times in [1, 5] {
            let (sector, sectors) = (64, 8);
            for (what, io, left) in [
                ("fsync", Io::Flush, OLD),
                ("fallocate", Io::Discard { sector, sectors, secure: false }, 0),
                ("fallocate", Io::WriteZeroes { sector, sectors }, 0),
                ("write", Io::Write { sector }, 7),
            ] {
                mounted.log();
                mounted.host(|host| {
                    host.bytes.fill(OLD);
                    let errors = match what {
                        "fsync" => &mut host.fsync,
                        "fallocate" => &mut host.fallocate,
                        _ => &mut host.write,
                    };
                    errors.resize(times, error);
                });
                assert_eq!(one(&mut engine, io), Ok(()), "{io:?}, {error}");
                let mut expected = vec![(what, error); times];
                expected.push((what, 0));
                assert_eq!(mounted.log(), expected, "{io:?}, {error}");
                assert_eq!(mounted.host(there), [left; 4096], "{io:?}, {error}");
            }
        }
    }
    assert!(!image.flush_failed(), "interrupted flush is not counted as a failure");
}

#[test]
fn flush_after_failed_flush_fails_on_every_engine_of_image() {
    for options in ["", "direct"] {
        let Some(mounted) = Mounted::new(vec![OLD; 1 << 20]) else { return };
        let image = mounted.open(&format!("[{options}]raw"));
        let [mut first, mut second] = [(); 2].map(|()| image.engine::<HeapMemory>(8).unwrap());
        assert_eq!(one(&mut first, Io::Write { sector: 8 }), Ok(()));
        assert_eq!(one(&mut second, Io::Flush), Ok(()));
        mounted.host(|host| host.fsync = vec![EIO]);
        mounted.log();
        for engine in [&mut first, &mut second] {
            assert_eq!(one(engine, Io::Flush), Ok(()), "nothing was written since the last flush");
        }
        assert_eq!(mounted.log(), []);
        assert_eq!(one(&mut second, Io::Write { sector: 8 }), Ok(()));
        mounted.log();
        assert_eq!(one(&mut first, Io::Flush), Err(EngineError::Os(EIO)));
        assert!(image.flush_failed());
        for engine in [&mut second, &mut first] {
            assert_eq!(one(engine, Io::Flush), Err(EngineError::Os(EIO)));
            assert_eq!(
                one(engine, Io::Write { sector: 8 }),
                Ok(()),
                "write succeeds after a failed flush"
            );
        }
        let flushes = mounted.log().into_iter().filter(|(what, _)| *what == "fsync");
        assert_eq!(flushes.collect::<Vec<_>>(), [("fsync", EIO)]);
    }
}

#[test]
fn flush_of_image_marked_failed_by_predecessor_fails() {
    let Some(mounted) = Mounted::new(vec![OLD; 1 << 20]) else { return };
    let image = mounted.open("raw");
    image.mark_flush_failed();
    let mut engine = image.engine::<HeapMemory>(8).unwrap();
    assert_eq!(one(&mut engine, Io::Flush), Err(EngineError::Os(EIO)));
    drop((engine, image));
    let again = mounted.open("raw");
    assert_eq!(one(&mut again.engine::<HeapMemory>(8).unwrap(), Io::Flush), Ok(()));
}

fn made(dir: &Path, arguments: &[&str]) -> Vec<u8> {
    let path = dir.join("made");
    tool("qemu-img", &[&["create", "-q"], arguments, &[text(&path), "8M"]].concat());
    std::fs::read(path).unwrap()
}

/// Formats that `qemu-img` creates, by the names of this project and with the options of
/// `qemu-img`.
const FORMATS: [(&str, &[&str]); 3] = [
    ("vhd", &["-f", "vpc", "-o", "force_size=on"]),
    ("vmdk", &["-f", "vmdk"]),
    ("qcow2", &["-f", "qcow2"]),
];

#[test]
fn failed_flush_fails_later_flushes_in_every_format() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (format, arguments) in FORMATS {
        let Some(mounted) = Mounted::new(made(dir.path(), arguments)) else { return };
        let image = mounted.open(format);
        let mut engine = image.engine::<HeapMemory>(8).unwrap();
        assert_eq!(one(&mut engine, Io::Write { sector: 8 }), Ok(()), "{format}");
        assert_eq!(one(&mut engine, Io::Flush), Ok(()), "{format}");
        assert_eq!(one(&mut engine, Io::Write { sector: 16 }), Ok(()), "{format}");
        mounted.host(|host| host.fsync = vec![EIO]);
        for attempt in 0..3 {
            let error = one(&mut engine, Io::Flush);
            assert_eq!(error, Err(EngineError::Os(EIO)), "{format}, {attempt}");
        }
        assert!(image.flush_failed(), "{format}");
    }
}

#[test]
fn failed_flush_inside_write_fails_later_flushes() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (format, arguments) = FORMATS[0];
    let Some(mounted) = Mounted::new(made(dir.path(), arguments)) else { return };
    let image = mounted.open(format);
    let mut engine = image.engine::<HeapMemory>(8).unwrap();
    // A new block: its footer is flushed first.
    mounted.host(|host| host.fsync = vec![EIO]);
    assert_eq!(one(&mut engine, Io::Write { sector: 8 }), Err(EngineError::Os(EIO)));
    assert!(image.flush_failed(), "failure is recorded before the next flush");
    assert_eq!(one(&mut engine, Io::Flush), Err(EngineError::Os(EIO)));
}

/// A sequence of writes to parts of a disk that are far from each other.
const WRITES: u8 = 40;
const STRIDE: u64 = 330;

fn write(engine: &mut DiskEngine<HeapMemory>, number: u8) -> Result<(), EngineError> {
    let page = HeapMemory::pages(1);
    page.fill(0, 4096, number).unwrap();
    with(engine, Io::Write { sector: u64::from(number) * STRIDE }, page)
}

/// Checks that an image contains the writes below `end`, and is consistent.
fn check_writes(dir: &Path, format: &str, bytes: &[u8], end: u8, what: &str) {
    let path = dir.join("copy");
    std::fs::write(&path, bytes).unwrap();
    let image = Image::open_as(&format!("{format}:{}", text(&path)).parse().unwrap()).unwrap();
    let mut engine = image.engine::<HeapMemory>(8).unwrap();
    for number in 0..end {
        let page = HeapMemory::pages(1);
        let sector = u64::from(number) * STRIDE;
        with(&mut engine, Io::Read { sector }, page.clone()).unwrap();
        let mut found = [0; 4096];
        page.read_bytes(0, &mut found).unwrap();
        assert!(found == [number; 4096], "{what}: write {number} of {end} is lost");
    }
    drop((engine, image));
    if format == "qcow2" {
        let mut check = std::process::Command::new("qemu-img");
        let status = check.args(["check", "-q", text(&path)]).output().unwrap().status.code();
        // Leaked clusters are allowed.
        assert!(matches!(status, Some(0 | 3)), "{what}: qemu-img check returns {status:?}");
    }
}

#[test]
fn full_storage_at_any_write_loses_nothing_that_was_completed() {
    const ENOSPC: i32 = 28;
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    // Every one takes minutes.
    let step = std::env::var("PVIO_FULL_STEP").map_or(61, |step| step.parse().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let formats: [(&str, &[&str]); 3] = [
        ("qcow2", &["-f", "qcow2", "-o", "cluster_size=512"]),
        ("qcow2", &["-f", "qcow2", "-o", "cluster_size=4096"]),
        ("vhd", &["-f", "vpc", "-o", "force_size=on"]),
    ];
    for (format, arguments) in formats {
        let empty = made(dir.path(), arguments);
        let (mut first, mut end) = (0, usize::MAX);
        while first < end {
            let Some(mounted) = Mounted::new(empty.clone()) else { return };
            let what = format!("{arguments:?}, full from call {first}");
            let image = mounted.open(format);
            image.pauses().set_holds(false);
            let mut engine = image.engine::<HeapMemory>(8).unwrap();
            mounted.log();
            // Several attempts fail.
            let errors = std::iter::repeat_n(0, first).chain([ENOSPC; 3]);
            mounted.host(|host| host.write = errors.rev().collect());
            for number in 0..WRITES {
                while let Err(error) = write(&mut engine, number) {
                    assert_eq!(error, EngineError::Os(ENOSPC), "{what}");
                    // The process might be killed now.
                    let bytes = mounted.host(|host| host.bytes.clone());
                    check_writes(dir.path(), format, &bytes, number, &what);
                    let flush = one(&mut engine, Io::Flush);
                    let full = Err(EngineError::StorageFull(ENOSPC));
                    assert!(flush == Ok(()) || flush == full, "{what}: {flush:?}");
                }
            }
            assert!(!image.flush_failed(), "{what}");
            let bytes = mounted.host(|host| host.bytes.clone());
            check_writes(dir.path(), format, &bytes, WRITES, &what);
            end = mounted.log().iter().filter(|(what, _)| *what == "write").count();
            drop((engine, image));
            let bytes = mounted.host(|host| host.bytes.clone());
            check_writes(dir.path(), format, &bytes, WRITES, &what);
            first += step;
        }
    }
}

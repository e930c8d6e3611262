//! Threads that execute a disk's operations and end by a panic: every operation then fails as lost,
//! which closes the device with a reason, and no operation hangs. The panics are raised from the
//! threads' log calls.

mod support;

use pvio_blkback::engine::{EngineError, Io};
use pvio_ring::IoSeg;
use pvio_ring::shm::HeapMemory;
use pvio_storage::engine::wait::DiskEngine;
use pvio_storage::image::{Image, ImageOptions};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use support::{alone, has, text, tool};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Panics in every thread of a disk that logs a failure.
struct Panics;

impl Subscriber for Panics {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::WARN
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, _: &Event<'_>) {
        let thread = std::thread::current();
        // A thread that unwinds may be the last owner of the connection and log its end: a second
        // panic there would end the process.
        let unwinds = std::thread::panicking();
        if matches!(thread.name(), Some("disk" | "nbd" | "flush")) && !unwinds {
            panic!("injected panic in {:?}", thread.name());
        }
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

fn open(disk: &str) -> (Image, DiskEngine<HeapMemory>) {
    // All tests set the same subscriber.
    let _ = tracing::subscriber::set_global_default(Panics);
    let image = Image::open_disk(&disk.parse().unwrap(), ImageOptions::default()).unwrap();
    let engine = image.engine(8).unwrap();
    (image, engine)
}

fn read(engine: &mut DiskEngine<HeapMemory>, sector: u64) -> Result<(), EngineError> {
    let segment = IoSeg { buf: HeapMemory::pages(1), offset: 0, len: 4096 };
    alone(engine, Io::Read { sector }, Some(segment))
}

#[test]
fn operations_of_panicked_thread_pool_complete_as_lost() {
    if !has("qemu-img", "qemu-utils") || !has("qemu-io", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", text(&path), "4M"]);
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 4M", text(&path)]);
    let (_image, mut engine) = open(&format!("qcow2:{}", text(&path)));
    assert_eq!(read(&mut engine, 0), Ok(()));
    // No such image supports this.
    let secure = Io::Discard { sector: 0, sectors: 8, secure: true };
    // More attempts than there are threads.
    for attempt in 0..8 {
        assert_eq!(alone(&mut engine, secure, None), Err(EngineError::Lost), "attempt {attempt}");
    }
}

/// Performs the handshake of an NBD server, and replies to the first flush request.
fn serve(mut stream: UnixStream, answer: u32) {
    stream.write_all(b"NBDMAGICIHAVEOPT\0\x03").unwrap();
    stream.read_exact(&mut [0; 4]).unwrap();
    loop {
        let mut head = [0; 16];
        stream.read_exact(&mut head).unwrap();
        let mut data = vec![0; u32::from_be_bytes(head[12..].try_into().unwrap()) as usize];
        stream.read_exact(&mut data).unwrap();
        let mut reply = |kind: u32, data: &[u8]| {
            let magic = 0x0003_e889_0455_65a9u64.to_be_bytes();
            let len = (data.len() as u32).to_be_bytes();
            let all = [&magic[..], &head[8..12], &kind.to_be_bytes(), &len, data].concat();
            stream.write_all(&all).unwrap();
        };
        if head[8..12] == 7u32.to_be_bytes() {
            reply(3, &[&[0, 0][..], &(1u64 << 20).to_be_bytes(), &[0, 5]].concat());
            reply(1, b"");
            break;
        }
        reply((1 << 31) + 1, b"");
    }
    let mut request = [0; 28];
    // Without a reply the connection ends here.
    if stream.read_exact(&mut request).is_ok() && answer != 0 {
        let head = [&0x6744_6698u32.to_be_bytes()[..], &answer.to_be_bytes(), &request[8..16]];
        stream.write_all(&head.concat()).unwrap();
        let _ = stream.read_exact(&mut request);
    }
}

fn nbd(dir: &Path, answer: u32) -> String {
    let socket = dir.join("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    std::thread::spawn(move || serve(listener.accept().unwrap().0, answer));
    format!("nbd+unix:///?socket={}", text(&socket))
}

#[test]
fn operations_of_panicked_nbd_thread_complete_as_lost() {
    let dir = tempfile::tempdir().unwrap();
    let (_image, mut engine) = open(&nbd(dir.path(), 0));
    for attempt in 0..3 {
        assert_eq!(read(&mut engine, 0), Err(EngineError::Lost), "attempt {attempt}");
    }
    assert_eq!(alone(&mut engine, Io::Flush, None), Err(EngineError::Lost));
}

#[test]
fn flushes_of_panicked_thread_complete_as_lost_and_mark_flush_failed() {
    const EIO: u32 = 5;
    let dir = tempfile::tempdir().unwrap();
    let (image, mut engine) = open(&nbd(dir.path(), EIO));
    for attempt in 0..3 {
        assert_eq!(
            alone(&mut engine, Io::Flush, None),
            Err(EngineError::Lost),
            "attempt {attempt}"
        );
    }
    assert!(image.flush_failed());
}

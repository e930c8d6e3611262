use super::*;
use crate::engine::Discard;
use crate::engine::wait::WaitEngine;
use pvio_ring::IoSeg;
use pvio_ring::shm::PrivatePage;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;

const DISK: Geometry = Geometry {
    sectors: 64,
    sector_size: 512,
    physical_sector_size: 4096,
    copied: false,
    read_only: false,
    discard: Some(Discard { granularity: 4096, alignment: 0, secure: false }),
};

/// Returns an engine with a second io_uring for reads and writes. It is not a polled one, because
/// not every machine has a device with poll queues.
fn beside(image: OwnedFd) -> UringEngine<PrivateBuf> {
    let second =
        Polled::over(DisabledUring::new(4).unwrap(), image.try_clone().unwrap(), None).unwrap();
    let mut engine = UringEngine::new(image, DISK, 4).unwrap();
    engine.polled = Some(second);
    engine
}

fn page(byte: u8) -> Segments<PrivateBuf> {
    let mut buf = PrivateBuf::page_aligned(4096);
    buf.as_mut_slice().fill(byte);
    [whole(buf)].into_iter().collect()
}

/// Returns everything completed so far: tags, results, and first bytes.
fn over(engine: &mut UringEngine<PrivateBuf>) -> Vec<(u32, Result<(), EngineError>, Option<u8>)> {
    let mut all = Vec::new();
    engine.reap(&mut |tag, result, segments| {
        let first = segments.drain(..).next().map(|s: IoSeg<PrivateBuf>| s.buf.as_slice()[0]);
        all.push((tag, result, first));
    });
    all
}

/// Executes one operation and returns the first byte of its data.
fn one(engine: &mut UringEngine<PrivateBuf>, io: Io, mut segments: Segments<PrivateBuf>) -> u8 {
    engine.submit(3, io, &mut segments).unwrap();
    engine.kick();
    loop {
        engine.wait_due(None).unwrap();
        if let Some((tag, result, first)) = over(engine).pop() {
            assert_eq!((tag, result), (3, Ok(())), "{io:?}");
            return first.unwrap_or_default();
        }
    }
}

#[test]
fn polled_engine_submits_reads_and_writes_to_second_io_uring() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(64 * 512).unwrap();
    let mut engine = beside(file.into());
    one(&mut engine, Io::Write { sector: 8 }, page(7));
    one(&mut engine, Io::Flush, Vec::new());
    assert_eq!(one(&mut engine, Io::Read { sector: 8 }, page(0)), 7);
    one(&mut engine, Io::Discard { sector: 8, sectors: 8, secure: false }, Vec::new());
    assert_eq!(one(&mut engine, Io::Read { sector: 8 }, page(1)), 0);
    // Each operation is in flight in the expected io_uring.
    let busy = |e: &UringEngine<_>| (e.uring.busy(), e.polled.as_ref().unwrap().uring.busy());
    engine.submit(0, Io::Read { sector: 0 }, &mut page(1)).unwrap();
    assert_eq!(busy(&engine), (0, 1));
    engine.submit(1, Io::Flush, &mut Vec::new()).unwrap();
    assert_eq!(busy(&engine), (1, 1));
    let mut left = 2;
    while left > 0 {
        engine.wait_due(None).unwrap();
        left -= over(&mut engine).len();
    }
}

#[test]
fn polling_wait_ends_on_watch_timeout_or_completion() {
    let (image, mut data) = io::pipe().unwrap();
    let (event, mut bell) = io::pipe().unwrap();
    let mut engine = beside(image.into());
    let watch = engine.watch(event.into()).unwrap();
    engine.submit(0, Io::Read { sector: 0 }, &mut page(0)).unwrap();
    engine.wait_due(Some(Duration::from_millis(1))).unwrap();
    assert_eq!((over(&mut engine).len(), engine.fired(watch)), (0, false), "wait ended by timeout");
    bell.write_all(b"x").unwrap();
    engine.wait_due(None).unwrap();
    assert_eq!((over(&mut engine).len(), engine.fired(watch)), (0, true));
    data.write_all(&[9; 4096]).unwrap();
    // The watched descriptor is still readable: other waits end because of it.
    let done = loop {
        engine.wait_due(None).unwrap();
        if let Some(done) = over(&mut engine).pop() {
            break done;
        }
    };
    assert_eq!(done, (0, Ok(()), Some(9)));
}

#[test]
fn pool_pages_are_registered_only_for_direct_io() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(64 * 512).unwrap();
    for direct in [false, true] {
        let flags = if direct { OFlags::DIRECT } else { OFlags::empty() };
        let mut options = std::fs::File::options();
        options.read(true).write(true).custom_flags(flags.bits() as i32);
        let mut engine =
            UringEngine::new(options.open(file.path()).unwrap().into(), DISK, 4).unwrap();
        let mut pages: Vec<PrivatePage> = PrivatePage::pool(4).collect();
        let known = engine.register(pages[0].stretch(3).unwrap());
        assert_eq!(known, if direct { 3 * 4096 } else { 0 });
        // A registration that the kernel rejects returns 0 and causes no failure.
        assert_eq!(engine.register(pages[3].stretch(1).unwrap()), 0);
        for (n, page) in pages.iter_mut().enumerate() {
            page.bytes().fill(n as u8 + 1);
        }
        let mut segments: Segments<PrivatePage> = pages.into_iter().map(whole).collect();
        let last = segments.pop().unwrap();
        let mut before = 0;
        for (io, mut segments, of_those) in [
            (Io::Write { sector: 8 }, segments, 1),
            (Io::Write { sector: 0 }, [last].into_iter().collect(), 0),
        ] {
            for (io, on_registered) in [(io, of_those), (Io::Read { sector: 8 }, of_those)] {
                engine.submit(1, io, &mut segments).unwrap();
                engine.kick();
                while segments.is_empty() {
                    engine.wait_due(None).unwrap();
                    engine.reap(&mut |_, result, back| {
                        assert_eq!(result, Ok(()), "{io:?}, direct: {direct}");
                        segments.append(back);
                    });
                }
                let expected = before + if direct { on_registered } else { 0 };
                assert_eq!(engine.uring.on_registered(), expected, "{io:?}");
                before = expected;
                if io == (Io::Read { sector: 8 }) {
                    let firsts: Vec<u8> =
                        segments.iter_mut().map(|s| s.buf.bytes()[4095]).collect();
                    assert!(firsts == [1, 2, 3] || firsts == [1], "{firsts:?}");
                }
                segments.iter_mut().for_each(|s| s.buf.bytes().fill(0xee));
            }
        }
    }
}

/// `IORING_OP_*` (`linux/io_uring.h`) that a disk does not need.
const NOT_NEEDED: [(&str, u8); 12] = [
    ("SENDMSG", 9),
    ("RECVMSG", 10),
    ("TIMEOUT", 11),
    ("ACCEPT", 13),
    ("CONNECT", 16),
    ("OPENAT", 18),
    ("STATX", 21),
    ("OPENAT2", 28),
    ("SPLICE", 30),
    ("UNLINKAT", 36),
    ("SOCKET", 45),
    ("URING_CMD", 46),
];

#[test]
fn engine_executes_its_operations_and_no_others() {
    const EACCES: i32 = 13;
    let zero = Io::WriteZeroes { sector: 8, sectors: 8 };
    for mode in [IoMode::Normal, IoMode::SqPoll] {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 * 512).unwrap();
        let mut engine = UringEngine::with(file.into(), DISK, 4, mode, None).unwrap();
        one(&mut engine, Io::Write { sector: 8 }, page(7));
        // Several memory ranges are another opcode than one.
        let pages = || [page(1), page(2)].into_iter().flatten().collect::<Segments<_>>();
        one(&mut engine, Io::Write { sector: 16 }, pages());
        one(&mut engine, Io::Read { sector: 16 }, pages());
        one(&mut engine, Io::Flush, Vec::new());
        one(&mut engine, zero, Vec::new());
        assert_eq!(one(&mut engine, Io::Read { sector: 8 }, page(1)), 0);
        for (name, opcode) in NOT_NEEDED {
            assert_eq!(engine.uring.attempt(opcode).unwrap(), -EACCES, "{name}, {mode:?}");
        }
        for attempt in engine.uring.attempt_register() {
            assert_eq!(attempt.unwrap_err().raw_os_error(), Some(EACCES), "{mode:?}");
        }
        let (event, mut bell) = io::pipe().unwrap();
        let watch = engine.watch(event.into()).unwrap();
        bell.write_all(b"x").unwrap();
        engine.wait_due(None).unwrap();
        over(&mut engine);
        assert!(engine.fired(watch), "{mode:?}");
    }
}

#[test]
fn io_uring_of_polled_transfers_executes_only_those() {
    const EACCES: i32 = 13;
    const FSYNC: u8 = 3;
    const POLL_ADD: u8 = 6;
    let file = tempfile::tempfile().unwrap();
    file.set_len(64 * 512).unwrap();
    let mut engine = beside(file.into());
    let pages = || [page(1), page(2)].into_iter().flatten().collect::<Segments<_>>();
    one(&mut engine, Io::Write { sector: 16 }, pages());
    one(&mut engine, Io::Read { sector: 16 }, pages());
    let second = &mut engine.polled.as_mut().unwrap().uring;
    let others = [("FSYNC", FSYNC), ("POLL_ADD", POLL_ADD)];
    for (name, opcode) in NOT_NEEDED.into_iter().chain(others) {
        assert_eq!(second.attempt(opcode).unwrap(), -EACCES, "{name}");
    }
}

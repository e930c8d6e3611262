use super::*;
use crate::buf::{PrivateBuf, whole};
use pvio_ring::shm::{HeapMemory, PAGE_SIZE, PrivatePage, Region};
use std::io;

#[test]
fn vectored_write_reads_back_through_shared_memory() {
    let mut uring = Uring::new(4).unwrap();
    let file = uring.add_file(tempfile::tempfile().unwrap().into());
    let page = HeapMemory::pages(1);
    page.write_bytes(0, &[1; 512]).unwrap();
    page.write_bytes(1024, &[2; 512]).unwrap();
    let seg = |offset| IoSeg { buf: page.clone(), offset, len: 512 };
    uring.write(file, 4096, [seg(0), seg(1024)], 1).unwrap();
    uring.wait(None).unwrap();
    uring.reap(|d| assert_eq!(d.result, Ok(1024)));
    uring.read(file, 4096 + 512, [seg(2048)], 2).unwrap();
    uring.wait(None).unwrap();
    uring.reap(|d| assert_eq!(d.result, Ok(512)));
    let mut got = [0; 512];
    page.read_bytes(2048, &mut got).unwrap();
    assert_eq!(got, [2; 512]);
}

#[test]
fn segment_outside_its_buffer_fails_with_efault() {
    let mut uring = Uring::new(4).unwrap();
    let file = uring.add_file(tempfile::tempfile().unwrap().into());
    uring.write(file, 0, [whole(PrivateBuf::zeroed(8192))], 0).unwrap();
    uring.wait(None).unwrap();
    uring.reap(|d| assert_eq!(d.result, Ok(8192)));
    let outside = IoSeg { buf: PrivateBuf::zeroed(512), offset: 256, len: 512 };
    uring.read(file, 0, [outside], 1).unwrap();
    uring.wait(None).unwrap();
    uring.reap(|d| assert_eq!(d.result, Err(14), "EFAULT"));
}

#[test]
fn write_rest_skips_bytes_already_written() {
    let mut uring = Uring::new(4).unwrap();
    let file = uring.add_file(tempfile::tempfile().unwrap().into());
    let page = HeapMemory::pages(1);
    page.write_bytes(0, &[1; 512]).unwrap();
    page.write_bytes(512, &[2; 512]).unwrap();
    page.write_bytes(2048, &[3; 512]).unwrap();
    let seg = |offset| IoSeg { buf: page.clone(), offset, len: 512 };
    // The first segment and half of the second were written before.
    uring.write_rest(file, 0, 768, [seg(0), seg(512), seg(2048)], 1).unwrap();
    uring.wait(None).unwrap();
    uring.reap(|d| {
        assert_eq!(d.result, Ok(768));
        assert_eq!(d.segments.len(), 3, "all segments are returned");
    });
    uring.read(file, 0, [IoSeg { buf: page.clone(), offset: 3072, len: 768 }], 2).unwrap();
    uring.wait(None).unwrap();
    uring.reap(|d| assert_eq!(d.result, Ok(768)));
    let mut got = [0; 768];
    page.read_bytes(3072, &mut got).unwrap();
    assert_eq!((&got[..256], &got[256..]), (&[2; 256][..], &[3; 512][..]));
}

#[test]
fn write_with_more_than_1024_segments_is_short_transfer() {
    let mut uring = Uring::new(2).unwrap();
    let file = uring.add_file(tempfile::tempfile().unwrap().into());
    let page = HeapMemory::pages(1);
    // Every second sector of a page, so that no two segments are adjacent.
    let segments =
        || (0..1500).map(|i| IoSeg { buf: page.clone(), offset: i % 4 * 1024, len: 512 });
    for round in 0..3 {
        uring.write(file, 0, segments(), round).unwrap();
        uring.wait(None).unwrap();
        uring.reap(|d| {
            assert_eq!(d.result, Ok(1024 * 512));
            assert_eq!(d.segments.len(), 1500);
        });
        let skip = 1024 * 512;
        uring.write_rest(file, skip as u64, skip, segments(), round).unwrap();
        uring.wait(None).unwrap();
        uring.reap(|d| assert_eq!(d.result, Ok(476 * 512)));
    }
}

#[test]
fn poll_beyond_free_slots_is_rejected() {
    let mut uring = Uring::<PrivateBuf>::new(2).unwrap();
    let (read, _write) = io::pipe().unwrap();
    let pipe = uring.add_file(read.into());
    uring.poll_readable(pipe, 1).unwrap();
    uring.poll_readable(pipe, 2).unwrap();
    assert!(uring.poll_readable(pipe, 3).is_err());
    assert_eq!((uring.busy(), uring.free_slots()), (0, 0));
}

#[test]
fn poll_finds_what_became_ready_without_waiting() {
    let mut uring = Uring::<PrivateBuf>::new(2).unwrap();
    let (read, mut write) = io::pipe().unwrap();
    let pipe = uring.add_file(read.into());
    uring.poll_readable(pipe, 1).unwrap();
    uring.flush().unwrap();
    assert!(!uring.poll().unwrap());
    io::Write::write_all(&mut write, b"x").unwrap();
    assert!(uring.poll().unwrap());
    assert_eq!(uring.reap(|done| assert_eq!(done.token, 1)), 1);
    assert!(!uring.poll().unwrap());
}

#[test]
fn drop_with_read_in_flight_waits_for_kernel() {
    let mut uring = Uring::new(2).unwrap();
    let (read, _write) = io::pipe().unwrap();
    let pipe = uring.add_file(read.into());
    let page = HeapMemory::pages(1);
    uring.read_stream(pipe, whole(page), 1).unwrap();
    uring.flush().unwrap();
    assert_eq!(uring.busy(), 1);
    drop(uring);
}

#[test]
fn polled_ring_rejects_unpollable_operations_and_wait_returns() {
    let mut uring = Uring::polled(4).unwrap();
    // The page cache cannot be polled.
    let file = uring.add_file(tempfile::tempfile().unwrap().into());
    uring.read(file, 0, [whole(PrivateBuf::page_aligned(4096))], 1).unwrap();
    uring.wait(None).unwrap();
    assert_eq!(uring.reap(|d| assert_eq!(d.result, Err(95), "EOPNOTSUPP")), 1);
    uring.sync_data(file, 2).unwrap();
    uring.wait(None).unwrap();
    assert_eq!(uring.reap(|d| assert_eq!(d.result, Err(22), "EINVAL")), 1);
    uring.wait(Some(Duration::ZERO)).unwrap();
    assert_eq!((uring.poll().unwrap(), uring.busy(), uring.free_slots()), (false, 0, 4));
}

#[test]
fn main_file_is_registered_once_and_works_as_any_file() {
    let mut uring = DisabledUring::new(4).unwrap();
    let files = [(); 2].map(|()| tempfile::tempfile().unwrap());
    let (main, second) = (files[0].try_clone().unwrap(), files[1].try_clone().unwrap());
    // An unregistered file is added first, so that its index differs from the registered one.
    let (pipe, _write) = io::pipe().unwrap();
    uring.add_file(pipe.into());
    let ids = [uring.add_main_file(main.into()), uring.add_main_file(second.into())];
    assert_eq!(ids.map(|id| id.registered), [true, false]);
    let mut uring = uring.enable(Operations::ALL).unwrap();
    let run = |uring: &mut Uring<PrivateBuf>, moved| {
        uring.wait(None).unwrap();
        assert_eq!(uring.reap(|d| assert_eq!(d.result, Ok(moved))), 1);
    };
    for (id, byte) in ids.into_iter().zip([3, 4]) {
        let mut buf = PrivateBuf::zeroed(4096);
        buf.as_mut_slice().fill(byte);
        uring.write(id, 0, [whole(buf)], 0).unwrap();
        run(&mut uring, 4096);
        uring.sync_data(id, 0).unwrap();
        run(&mut uring, 0);
        uring.allocate(id, 2 | 1, 0, 512, 0).unwrap();
        run(&mut uring, 0);
        let halves = [0, 2048].map(|_| whole(PrivateBuf::zeroed(2048)));
        uring.read(id, 0, halves, 0).unwrap();
        run(&mut uring, 4096);
    }
    for (file, byte) in files.iter().zip([3, 4]) {
        let mut got = [1; 1024];
        std::os::unix::fs::FileExt::read_exact_at(file, &mut got, 0).unwrap();
        assert_eq!((&got[..512], &got[512..]), (&[0; 512][..], &[byte; 512][..]));
    }
}

#[test]
fn lock_on_main_file_is_released_with_ring() {
    let file = tempfile::NamedTempFile::new().unwrap();
    for round in 0..50 {
        let locked = std::fs::File::open(file.path()).unwrap();
        locked.try_lock().unwrap_or_else(|e| panic!("round {round}: {e}"));
        let mut uring = DisabledUring::<PrivateBuf>::new(4).unwrap();
        let id = uring.add_main_file(locked.into());
        let mut uring = uring.enable(Operations::ALL).unwrap();
        uring.sync_data(id, 0).unwrap();
        uring.flush().unwrap();
    }
}

/// Executes one operation. Returns the number of bytes moved, and its buffers.
fn one<B: IoBuf>(
    uring: &mut Uring<B>,
    begin: impl FnOnce(&mut Uring<B>) -> Result<(), Full>,
) -> (Result<u32, Errno>, Vec<IoSeg<B>>) {
    begin(uring).unwrap();
    uring.wait(None).unwrap();
    let mut over = None;
    assert_eq!(uring.reap(|d| over = Some((d.result, d.segments.drain(..).collect()))), 1);
    over.unwrap()
}

#[test]
fn registered_buffer_is_used_for_contiguous_segments_inside_it() {
    let mut uring = Uring::new(4).unwrap();
    let file = uring.add_file(tempfile::tempfile().unwrap().into());
    let mut pages: Vec<PrivatePage> = PrivatePage::pool(8).collect();
    // The last two pages are not registered.
    uring.register(pages[0].stretch(6).unwrap()).unwrap();
    let again = uring.register(pages[6].stretch(2).unwrap()).unwrap_err();
    assert_eq!(again.raw_os_error(), Some(16), "EBUSY, and the first stays");
    for (n, page) in pages.iter_mut().enumerate() {
        page.bytes().fill(n as u8 + 1);
    }
    let mut pages: Vec<Option<PrivatePage>> = pages.into_iter().map(Some).collect();
    let cases: [(&[usize], u64); 6] =
        [(&[0, 1, 2], 1), (&[5], 1), (&[4, 5, 6], 0), (&[0, 2], 0), (&[7], 0), (&[3, 4, 5], 1)];
    for (numbers, registered) in cases {
        let bytes = numbers.len() * PAGE_SIZE;
        let mut segments: Vec<_> =
            numbers.iter().map(|n| whole(pages[*n].take().unwrap())).collect();
        for write in [true, false] {
            let before = uring.on_registered();
            let (result, back) = one(&mut uring, |uring| match write {
                true => uring.write(file, 512, segments, 0),
                false => uring.read(file, 512, segments, 0),
            });
            assert_eq!(result, Ok(bytes as u32), "{numbers:?}");
            assert_eq!(uring.on_registered() - before, registered, "{numbers:?}");
            segments = back;
            for (n, seg) in numbers.iter().zip(&mut segments) {
                assert!(seg.buf.bytes().iter().all(|b| *b == *n as u8 + 1), "{n}");
                // The data is read back and compared.
                if write {
                    seg.buf.bytes().fill(0);
                }
            }
        }
        for (n, seg) in numbers.iter().zip(segments) {
            pages[*n] = Some(seg.buf);
        }
    }
    // A segment that does not start at the first byte, and the rest of a short transfer.
    let page = pages[1].take().unwrap();
    let seg = IoSeg { buf: page, offset: 1024, len: 2048 };
    let before = uring.on_registered();
    let (result, _) = one(&mut uring, |uring| uring.write_rest(file, 0, 512, [seg], 0));
    assert_eq!((result, uring.on_registered() - before), (Ok(1536), 1));
}

#[test]
fn registered_memory_outlives_its_pool_until_ring_is_dropped() {
    let mut uring = Uring::new(4).unwrap();
    let file = uring.add_file(tempfile::tempfile().unwrap().into());
    let mut pages = PrivatePage::pool(2);
    let page = pages.next().unwrap();
    uring.register(page.stretch(2).unwrap()).unwrap();
    drop(pages);
    let (result, mut back) = one(&mut uring, |uring| uring.write(file, 0, [whole(page)], 0));
    assert_eq!((result, uring.on_registered()), (Ok(4096), 1));
    drop(uring);
    back[0].buf.bytes().fill(1);
}

#[test]
fn try_read_completes_immediately_with_eagain_or_data() {
    for mut uring in [Uring::new(4).unwrap(), Uring::gathering(4).unwrap()] {
        let (read, mut write) = io::pipe().unwrap();
        let pipe = uring.add_file(read.into());
        let tried = |uring: &mut Uring<PrivateBuf>| {
            uring.try_read_stream(pipe, whole(PrivateBuf::zeroed(8)), 7).unwrap();
            uring.flush().unwrap();
            let mut result = None;
            assert_eq!(uring.reap(|done| result = Some((done.token, done.result))), 1);
            result.unwrap()
        };
        assert_eq!(tried(&mut uring), (7, Err(11)), "EAGAIN");
        io::Write::write_all(&mut write, b"abc").unwrap();
        assert_eq!(tried(&mut uring), (7, Ok(3)));
    }
}

#[test]
fn wait_for_several_completions_ends_at_count_or_timeout() {
    for mut uring in [Uring::<PrivateBuf>::new(4).unwrap(), Uring::gathering(4).unwrap()] {
        let (read, mut write) = io::pipe().unwrap();
        let pipe = uring.add_file(read.into());
        uring.poll_readable(pipe, 1).unwrap();
        io::Write::write_all(&mut write, b"x").unwrap();
        let (begin, time) = (Instant::now(), Duration::from_millis(20));
        uring.wait_for(2, time).unwrap();
        assert!(begin.elapsed() >= time);
        uring.poll_readable(pipe, 2).unwrap();
        uring.wait_for(2, Duration::from_secs(100)).unwrap();
        assert!(begin.elapsed() < Duration::from_secs(50));
        assert_eq!(uring.reap(|_| ()), 2);
    }
}

#[test]
fn what_a_gathering_ring_has_left_is_finished_by_a_flush_or_a_poll() {
    let mut uring = Uring::<PrivateBuf>::gathering(4).unwrap();
    assert!(uring.gathering, "kernels since 6.1");
    let (read, mut write) = io::pipe().unwrap();
    let pipe = uring.add_file(read.into());
    for flushes in [true, false] {
        uring.poll_readable(pipe, 1).unwrap();
        uring.flush().unwrap();
        if flushes {
            io::Write::write_all(&mut write, b"x").unwrap();
            assert!(!uring.has_done(), "completion before the kernel was entered");
            uring.flush().unwrap();
        }
        assert!(uring.poll().unwrap());
        assert_eq!(uring.reap(|done| assert_eq!(done.token, 1)), 1);
    }
}

const EAGAIN: i32 = 11;
const ENOMEM: i32 = 12;
const EBUSY: i32 = 16;
const EINVAL: i32 = 22;

#[test]
fn transient_kernel_error_delays_operations_and_loses_none() {
    for errno in [EAGAIN, ENOMEM, EBUSY, 4] {
        for failures in [1, 6] {
            let mut uring = Uring::new(4).unwrap();
            let file = uring.add_file(tempfile::tempfile().unwrap().into());
            uring.failures = vec![errno; failures];
            let page = || whole(PrivateBuf::zeroed(4096));
            uring.write(file, 0, [page()], 1).unwrap();
            uring.flush().unwrap();
            uring.write(file, 4096, [page()], 2).unwrap();
            let (mut calls, mut found) = (0, Vec::new());
            while found.len() < 2 {
                calls += 1;
                let timeout = (calls % 2 == 0).then_some(Duration::from_secs(5));
                uring.wait(timeout).unwrap();
                uring.reap(|done| found.push((done.token, done.result)));
            }
            found.sort_unstable();
            assert_eq!(found, [(1, Ok(4096)), (2, Ok(4096))], "{errno}");
            assert!(uring.failures.is_empty() && calls <= failures + 2, "{calls} calls, {errno}");
            assert_eq!((uring.busy(), uring.unsubmitted), (0, false));
        }
    }
}

#[test]
fn persistent_transient_errors_back_off_and_are_never_fatal() {
    let mut uring = Uring::<PrivateBuf>::new(4).unwrap();
    let (read, _write) = io::pipe().unwrap();
    let pipe = uring.add_file(read.into());
    uring.poll_readable(pipe, 1).unwrap();
    uring.failures = vec![ENOMEM; 100];
    let begin = Instant::now();
    for _ in 0..12 {
        uring.wait(None).unwrap();
    }
    // No pause for three failures, then 1 ms, doubled each time up to 128 ms.
    assert!(begin.elapsed() >= Duration::from_millis(127 + 128 + 128));
    assert_eq!((uring.failures.len(), uring.poll().unwrap()), (88, false));
    uring.failures.clear();
    uring.wait(Some(Duration::ZERO)).unwrap();
    assert_eq!(uring.backoff, Backoff::default());
}

#[test]
fn backoff_after_transient_error_is_bounded_by_wait_and_skipped_with_completions() {
    let mut uring = Uring::<PrivateBuf>::new(4).unwrap();
    (0..20).for_each(|_| assert!(uring.backoff.pause_for_ever() < STUCK));
    uring.failures = vec![EBUSY; 2];
    let file = uring.add_file(tempfile::tempfile().unwrap().into());
    let begin = Instant::now();
    uring.wait_for(1, Duration::from_micros(1)).unwrap();
    assert_eq!(uring.failures.len(), 1);
    uring.failures.clear();
    uring.sync_data(file, 1).unwrap();
    uring.wait(None).unwrap();
    (0..20).for_each(|_| assert!(uring.backoff.pause_for_ever() < STUCK));
    uring.failures = vec![EBUSY];
    uring.wait(None).unwrap();
    assert!(uring.has_done() && uring.failures.is_empty());
    assert!(begin.elapsed() < Duration::from_secs(10));
}

#[test]
fn permanent_kernel_error_is_reported() {
    let mut uring = Uring::<PrivateBuf>::new(4).unwrap();
    uring.failures = vec![EINVAL; 2];
    assert_eq!(uring.wait(None).unwrap_err().raw_os_error(), Some(EINVAL));
    let timed = uring.wait_for(1, Duration::from_secs(1)).unwrap_err();
    assert_eq!(timed.raw_os_error(), Some(EINVAL));
}

const EACCES: i32 = 13;

/// Every kind of ring, before it is enabled.
fn disabled() -> Vec<(&'static str, DisabledUring<PrivateBuf>)> {
    vec![
        ("normal", DisabledUring::new(4).unwrap()),
        ("gathering", DisabledUring::gathering(4).unwrap()),
        ("kernel thread", DisabledUring::with_kernel_thread(4, Duration::from_millis(1)).unwrap()),
        ("polled", DisabledUring::polled(4).unwrap()),
    ]
}

#[test]
fn enabled_ring_denies_every_operation_it_was_not_enabled_for() {
    const OPENAT: u8 = opcode::OpenAt::CODE;
    const CONNECT: u8 = opcode::Connect::CODE;
    for operations in [Operations::POLL, Operations::READ.and(Operations::SYNC), Operations::ALL] {
        for (kind, ring) in disabled() {
            let mut uring = ring.enable(operations).unwrap();
            let permitted: Vec<_> = operations.opcodes().collect();
            let mut denied = Vec::new();
            for opcode in 0..=u8::MAX {
                let (result, is_permitted) =
                    (uring.attempt(opcode).unwrap(), permitted.contains(&opcode));
                if result == -EINVAL && !is_permitted && opcode > CONNECT {
                    // Beyond the last one of this kernel.
                    break;
                }
                assert_eq!(result == -EACCES, !is_permitted, "{kind}: {opcode}");
                denied.extend((!is_permitted).then_some(opcode));
            }
            assert!(denied.contains(&OPENAT) && denied.contains(&CONNECT), "{kind}: {denied:?}");
            for attempt in uring.attempt_register() {
                assert_eq!(attempt.unwrap_err().raw_os_error(), Some(EACCES), "{kind}");
            }
        }
    }
}

#[test]
fn ring_executes_nothing_before_it_is_enabled() {
    const EBADFD: i32 = 77;
    for (kind, mut ring) in disabled() {
        let error = ring.uring.attempt(opcode::Nop::CODE).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(EBADFD), "{kind}");
    }
}

#[test]
fn ring_enabled_on_another_thread_than_its_creator_belongs_to_that_thread() {
    const EEXIST: i32 = 17;
    let ring = DisabledUring::<PrivateBuf>::gathering(4).unwrap();
    let file = tempfile::tempfile().unwrap();
    let thread = std::thread::spawn(move || {
        let mut uring = ring.enable(Operations::SYNC).unwrap();
        let id = uring.add_file(file.into());
        assert_eq!(one(&mut uring, |uring| uring.sync_data(id, 1)).0, Ok(0));
        uring
    });
    let mut uring = thread.join().unwrap();
    let error = uring.attempt(opcode::Fsync::CODE).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(EEXIST));
}

#[test]
fn ring_with_registered_files_only_denies_others() {
    let files = [(); 2].map(|()| tempfile::tempfile().unwrap());
    let (main, other) = (files[0].try_clone().unwrap(), files[1].try_clone().unwrap());
    let mut ring = DisabledUring::<PrivateBuf>::new(4).unwrap();
    let ids = [ring.add_main_file(main.into()), ring.add_file(other.into())];
    let ring = ring.with_registered_files_only();
    let mut uring = ring.enable(Operations::ALL).unwrap();
    let results = ids.map(|id| one(&mut uring, |uring| uring.sync_data(id, 1)).0);
    assert_eq!(results, [Ok(0), Err(EACCES)]);
    // Without a registered file, nothing is demanded.
    let mut ring = DisabledUring::<PrivateBuf>::new(4).unwrap();
    let id = ring.add_file(files[0].try_clone().unwrap().into());
    let mut uring = ring.with_registered_files_only().enable(Operations::SYNC).unwrap();
    assert_eq!(one(&mut uring, |uring| uring.sync_data(id, 1)).0, Ok(0));
}

#[test]
fn memory_is_registered_only_by_a_ring_that_may() {
    let pages: Vec<PrivatePage> = PrivatePage::pool(1).collect();
    for (operations, permitted) in [(Operations::ALL, true), (Operations::READ, false)] {
        let mut uring = DisabledUring::<PrivateBuf>::new(4).unwrap().enable(operations).unwrap();
        let registered = uring.register(pages[0].stretch(1).unwrap());
        match permitted {
            true => registered.unwrap(),
            false => assert_eq!(registered.unwrap_err().raw_os_error(), Some(EACCES)),
        }
    }
}

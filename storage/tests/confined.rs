//! Disks under the system call filter of their process: a call that is missing in the filter kills it.
//! Each disk is used by this test program again, since a filter cannot be removed.

mod support;

use pvio_blkback::engine::{EngineError, Io};
use pvio_confinement::calls::ioctls;
use pvio_confinement::{Applied, Enforcement, Layer, Missing, Outcome, ProcessKind, Reason};
use pvio_confinement::{SystemCalls, calls::table};
use pvio_ring::IoSeg;
use pvio_ring::shm::{HeapMemory, Region};
use pvio_storage::calls;
use pvio_storage::engine::wait::DiskEngine;
use pvio_storage::image::{Disk, HandedFiles, Image, resolve};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use support::{alone, has, text, tool};

/// Disk that a child process uses.
const DISK: &str = "PVIO_TEST_CONFINED_DISK";

/// Returns a directory for images; none in a child process, which could not remove it.
fn directory() -> Option<tempfile::TempDir> {
    std::env::var_os(DISK).is_none().then(|| tempfile::tempdir().unwrap())
}

/// Runs `test`, the calling test, once for each disk in a child process. Returns the disk in the
/// child process.
fn each(test: &str, disks: &[String]) -> Option<Disk> {
    if let Ok(disk) = std::env::var(DISK) {
        return Some(disk.parse().unwrap());
    }
    for disk in disks {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", test, "--nocapture", "--test-threads=1"]).env(DISK, disk);
        let output = child.output().unwrap();
        let out = String::from_utf8_lossy(&output.stdout);
        let err = String::from_utf8_lossy(&output.stderr);
        // SIGSYS is 31.
        let (status, signal) = (output.status, output.status.signal());
        assert!(status.success(), "{disk}: {status}, signal {signal:?}\n{out}\n{err}");
        assert!(out.contains("1 passed"), "{disk}: {out}");
        out.lines().filter(|line| line.starts_with("SKIPPED:")).for_each(|line| println!("{line}"));
    }
    None
}

/// Installs the filter of a kind of process. Returns false if the kernel has none.
fn confine(kind: ProcessKind) -> bool {
    let mut applied = Applied::default();
    SystemCalls::of(kind).install(Enforcement::Kill, &mut applied);
    match applied.outcome(Layer::SystemCalls) {
        Outcome::Applied(_) => true,
        Outcome::Missing(Missing { reason: Reason::NotBuilt, detail }) => {
            println!("SKIPPED: no system call filters: {detail}");
            false
        }
        other => panic!("{other}"),
    }
}

fn segment(byte: u8, len: usize) -> IoSeg<HeapMemory> {
    let buf = HeapMemory::pages(len.div_ceil(4096));
    buf.write_bytes(0, &vec![byte; len]).unwrap();
    IoSeg { buf, offset: 0, len }
}

/// Writes, reads back, discards, zeroes and flushes.
fn use_disk(engine: &mut DiskEngine<HeapMemory>) {
    const SECTORS: u64 = (1 << 20) / 512;
    for (byte, sector) in [(1, 0), (2, SECTORS + 3), (3, 3 * SECTORS)] {
        alone(engine, Io::Write { sector }, Some(segment(byte, 64 << 10))).unwrap();
        let read = segment(0, 64 << 10);
        alone(engine, Io::Read { sector }, Some(IoSeg { buf: read.buf.clone(), ..read })).unwrap();
        let mut first = [0];
        read.buf.read_bytes(0, &mut first).unwrap();
        assert_eq!(first, [byte]);
        alone(engine, Io::Flush, None).unwrap();
    }
    let (sector, sectors) = (SECTORS, SECTORS);
    for io in [
        Io::Discard { sector, sectors, secure: false },
        Io::WriteZeroes { sector, sectors },
        Io::Discard { sector, sectors, secure: true },
        Io::Flush,
    ] {
        let done = alone(engine, io, None);
        assert!(matches!(done, Ok(()) | Err(EngineError::Unsupported)), "{io:?}: {done:?}");
    }
    // Large requests make the allocator grow and shrink.
    for _ in 0..4 {
        let _ = alone(engine, Io::Read { sector: 0 }, Some(segment(0, 2 << 20)));
    }
}

fn create(format: &str, options: &str, path: &Path) {
    let options = if options.is_empty() { vec![] } else { vec!["-o", options] };
    let args = [&["create", "-q", "-f", format][..], &options, &[text(path), "8M"]].concat();
    tool("qemu-img", &args);
}

#[test]
fn disk_is_served_under_the_filter_of_its_process() {
    let test = "disk_is_served_under_the_filter_of_its_process";
    let (dir, mut disks) = (directory(), vec!["ram:8M".to_owned()]);
    if let Some(dir) = &dir {
        let path = |name: &str| dir.path().join(name);
        std::fs::File::create(path("a.raw")).unwrap().set_len(8 << 20).unwrap();
        disks.push(format!("raw:{}", text(&path("a.raw"))));
        if has("qemu-img", "qemu-utils") {
            for (format, qemu, options) in [
                ("qcow2", "qcow2", ""),
                ("vhd", "vpc", "subformat=dynamic,force_size=on"),
                ("vmdk", "vmdk", "subformat=monolithicSparse"),
            ] {
                let image = path(&format!("a.{format}"));
                create(qemu, options, &image);
                disks.push(format!("{format}:{}", text(&image)));
            }
        }
    }
    let Some(disk) = each(test, &disks) else { return };
    let image = Image::open_as(&disk).unwrap();
    let mut engine = image.engine(8).unwrap();
    if confine(ProcessKind::Disk) {
        use_disk(&mut engine);
    }
    drop(engine);
    drop(image);
}

#[test]
fn image_is_resolved_under_the_filter_of_the_helper() {
    let test = "image_is_resolved_under_the_filter_of_the_helper";
    let (dir, mut disks) = (directory(), Vec::new());
    if let Some(dir) = &dir {
        let path = |name: &str| dir.path().join(name);
        std::fs::File::create(path("a.raw")).unwrap().set_len(8 << 20).unwrap();
        disks.push(format!("raw:{}", text(&path("a.raw"))));
        if has("qemu-img", "qemu-utils") {
            create("qcow2", "", &path("base.qcow2"));
            let options = "backing_file=base.qcow2,backing_fmt=qcow2";
            create("qcow2", options, &path("top.qcow2"));
            create("vpc", "subformat=dynamic,force_size=on", &path("a.vhd"));
            create("vmdk", "subformat=twoGbMaxExtentSparse", &path("a.vmdk"));
            for (format, name) in [("qcow2", "top.qcow2"), ("vhd", "a.vhd"), ("vmdk", "a.vmdk")] {
                disks.push(format!("{format}:{}", text(&path(name))));
            }
        }
    }
    let Some(disk) = each(test, &disks) else { return };
    let named = HandedFiles::open_named(&disk).unwrap();
    if confine(ProcessKind::ImageHelper) {
        resolve(&disk, &named).unwrap();
    }
}

#[test]
fn filter_of_a_disk_has_the_calls_of_its_storage() {
    let permitted = SystemCalls::of(ProcessKind::Disk);
    for name in calls::FILTER.iter().copied().flatten() {
        let has = permitted.calls().iter().any(|call| call.name == *name);
        // Architectures without it use `ppoll`.
        let is_legacy = *name == "poll" && table::LEGACY.is_empty();
        assert!(has || is_legacy, "{name}");
    }
    assert!(calls::RUN_IOCTLS.iter().all(|request| ioctls::DISK.contains(request)));
    assert!(calls::OPEN_IOCTLS.iter().all(|request| ioctls::IMAGE_HELPER.contains(request)));
}

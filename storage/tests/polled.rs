//! Disks with polled reads and writes, on machines with a suitable device, and error messages on
//! others.

mod support;

use pvio_blkback::engine::Io;
use pvio_ring::IoSeg;
use pvio_ring::error::{Remedy, Report};
use pvio_ring::shm::{HeapMemory, Region};
use pvio_storage::engine::wait::DiskEngine;
use pvio_storage::image::{Disk, Image, ImageError};
use std::fs;
use std::path::{Path, PathBuf};
use support::alone;

const BYTES: usize = 16384;

fn open(options: &str, path: &Path) -> Result<Image, ImageError> {
    Image::open_as(&format!("[{options}]{}", path.display()).parse::<Disk>().unwrap())
}

fn refusal(options: &str, path: &Path) -> (&'static str, String) {
    let error = open(options, path).expect_err("image was opened");
    let words = format!("{}; {}", Report(&error), error.remedy().unwrap_or_default());
    (error.code(), words)
}

fn file(dir: &Path, data: bool) -> PathBuf {
    let path = dir.join(if data { "data.img" } else { "hole.img" });
    fs::write(&path, if data { vec![5; 1 << 20] } else { Vec::new() }).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_len(1 << 20).unwrap();
    fs::File::open(&path).unwrap().sync_all().unwrap();
    path
}

fn one(engine: &mut DiskEngine<HeapMemory>, io: Io, page: Option<&HeapMemory>) {
    let segment = page.map(|page| IoSeg { buf: page.clone(), offset: 0, len: BYTES });
    assert_eq!(alone(engine, io, segment), Ok(()), "{io:?}");
}

fn bytes(engine: &mut DiskEngine<HeapMemory>, sector: u64) -> Vec<u8> {
    let page = HeapMemory::pages(BYTES / 4096);
    one(engine, Io::Read { sector }, Some(&page));
    let mut bytes = vec![0; BYTES];
    page.read_bytes(0, &mut bytes).unwrap();
    bytes
}

/// Returns the block devices of this machine that have poll queues.
fn devices() -> Vec<PathBuf> {
    let all = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let polls = |dir: &PathBuf| {
        fs::read_to_string(dir.join("queue/io_poll")).is_ok_and(|said| said.trim() == "1")
    };
    let node = |dir: PathBuf| Path::new("/dev").join(dir.file_name().unwrap_or_default());
    all.map(|entry| entry.path()).filter(polls).map(node).filter(|dev| dev.exists()).collect()
}

#[test]
fn iopoll_with_buffered_io_or_ram_disk_is_rejected() {
    let dir = tempfile::tempdir().unwrap();
    for options in ["io=iopoll", "io=iopoll,buffered"] {
        let (code, words) = refusal(options, &file(dir.path(), true));
        assert_eq!(code, "image-iopoll-buffered");
        assert!(words.contains("write [io=iopoll,direct]"), "{words}");
    }
    let ram = Image::open_as(&"[io=iopoll,direct]ram:1M".parse::<Disk>().unwrap());
    let error = ram.expect_err("iopoll on a RAM disk");
    assert_eq!(error.code(), "image-io-mode");
    assert!(error.to_string().contains("only for raw disks"), "{error}");
}

/// Detected by the trial read: memory is not a device.
#[test]
fn iopoll_on_file_system_without_polling_is_rejected() {
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else {
        return println!("SKIPPED: no /dev/shm; mount a tmpfs there");
    };
    let path = file(dir.path(), true);
    match open("io=normal,direct", &path) {
        Err(ImageError::NoDirect(_)) => {
            return println!("SKIPPED: this tmpfs has no O_DIRECT; take Linux 6.6 or later");
        }
        other => drop(other.unwrap()),
    }
    let (code, words) = refusal("io=iopoll,direct", &path);
    assert_eq!(code, "image-iopoll", "{words}");
    assert!(words.contains("os error 95") && words.contains("leave io=iopoll out"), "{words}");
}

/// Without poll queues the file is rejected; with them, data is written and read back.
#[test]
fn iopoll_file_is_served_or_rejected_with_advice() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for data in [true, false] {
        let path = file(dir.path(), data);
        let image = match open("io=iopoll,direct", &path) {
            Err(error) if matches!(error, ImageError::NoPoll { .. } | ImageError::NoDirect(_)) => {
                assert!(error.remedy().is_some(), "{error}: has no remedy");
                println!("SKIPPED: {error}");
                continue;
            }
            other => other.unwrap(),
        };
        let mut engine = image.engine(8).unwrap();
        let page = HeapMemory::pages(BYTES / 4096);
        page.write_bytes(0, &[8; BYTES]).unwrap();
        one(&mut engine, Io::Write { sector: 64 }, Some(&page));
        one(&mut engine, Io::Flush, None);
        assert_eq!(bytes(&mut engine, 64), [8; BYTES]);
        assert_eq!(bytes(&mut engine, 128), [if data { 5 } else { 0 }; BYTES]);
        one(&mut engine, Io::Discard { sector: 64, sectors: 8, secure: false }, None);
        assert_eq!(bytes(&mut engine, 64)[..4096], [0; 4096]);
    }
}

/// Only read: their contents do not belong to the test.
#[test]
fn iopoll_device_reads_same_data_as_without_polling() {
    let devices = devices();
    if devices.is_empty() {
        return println!(
            "SKIPPED: no block device here has queues that are polled; take a machine with an NVMe \
             disk and nvme.poll_queues=2, or modprobe null_blk poll_queues=1"
        );
    }
    for device in devices {
        let (polled, plain) = (open("io=iopoll,direct,ro", &device), open("direct,ro", &device));
        let [mut polled, mut plain] =
            [polled, plain].map(|image| image.unwrap().engine(8).unwrap());
        for sector in [0, 2048, 4096] {
            assert_eq!(bytes(&mut polled, sector), bytes(&mut plain, sector), "{device:?}");
        }
    }
}

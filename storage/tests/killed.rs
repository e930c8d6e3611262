//! Flushed data survives a crash of the process: servers of every kind of image are killed at any
//! time while they write.

mod support;

use pvio_blkback::engine::{BlockEngine, Io};
use pvio_ring::IoSeg;
use pvio_ring::shm::{HeapMemory, Region};
use pvio_storage::engine::wait::{DiskEngine, WaitEngine};
use pvio_storage::image::{Image, ImageError, ImageOptions, Spec};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use support::{Rng, has, text, tool};

/// Set in the process that will be killed.
const DISK: &str = "PVIO_TEST_DISK_TO_WRITE";
const SECTORS: u64 = 32 << 11;
/// Bytes of a write.
const LEN: usize = 12288;

/// Returns the sector of the write with this number: different ones, in no particular order.
fn place(number: u64) -> u64 {
    const PLACES: u64 = SECTORS / 24;
    assert!(number < PLACES, "block number at a wrong offset");
    number * 7919 % PLACES * 24
}

fn data(number: u64) -> Vec<u8> {
    let mut rng = Rng(number);
    (0..LEN).map(|_| rng.next() as u8).collect()
}

fn all(engine: &mut DiskEngine<HeapMemory>, ios: &[(Io, Option<HeapMemory>)]) {
    for (tag, (io, page)) in ios.iter().enumerate() {
        let seg = page.clone().map(|buf| IoSeg { buf, offset: 0, len: LEN });
        engine.submit(tag as u32, *io, &mut seg.into_iter().collect()).unwrap();
    }
    engine.kick();
    let mut left = ios.len();
    while left > 0 {
        engine.wait_due(None).unwrap();
        engine.reap(&mut |_, result, _| {
            result.unwrap();
            left -= 1;
        });
    }
}

fn page(number: u64) -> HeapMemory {
    let page = HeapMemory::pages(3);
    page.write_bytes(0, &data(number)).unwrap();
    page
}

/// Writes until it is killed, and prints the numbers that a flush has covered.
fn write_on(disk: &str) -> ! {
    let image = Image::open_disk(&disk.parse().unwrap(), ImageOptions::default()).unwrap();
    let mut engine = image.engine::<HeapMemory>(8).unwrap();
    for round in 0.. {
        let numbers = round * 3..round * 3 + 3;
        let write = |n| (Io::Write { sector: place(n) }, Some(page(n)));
        all(&mut engine, &numbers.clone().map(write).collect::<Vec<_>>());
        all(&mut engine, &[(Io::Flush, None)]);
        println!("flushed {}", numbers.end);
    }
    unreachable!("process is killed");
}

#[test]
fn flushed_data_survives_killed_process_in_every_format() {
    if let Ok(disk) = std::env::var(DISK) {
        write_on(&disk);
    }
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (kind, options) in [
        ("raw", "preallocation=off"),
        ("qcow2", "cluster_size=4k"),
        ("qcow2", "cluster_size=64k,lazy_refcounts=on"),
        ("qcow2", "cluster_size=4k,compat=0.10"),
        ("vhd", "force_size=on"),
        ("vmdk", "subformat=monolithicSparse"),
    ] {
        for patience in [1, 2, 3, 5, 8, 13, 21] {
            let path = dir.path().join("image");
            let word = if kind == "vhd" { "vpc" } else { kind };
            tool("qemu-img", &["create", "-f", word, "-o", options, text(&path), "32M"]);
            let disk = format!("{kind}:{}", text(&path));
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args([
                    "--exact",
                    "flushed_data_survives_killed_process_in_every_format",
                    "--nocapture",
                ])
                .env(DISK, &disk)
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            let mut out = BufReader::new(child.stdout.take().unwrap()).lines();
            let told = |line: std::io::Result<String>| -> Option<u64> {
                line.unwrap().strip_prefix("flushed ").map(|n| n.parse().unwrap())
            };
            let mut flushed = 0;
            for number in out.by_ref().filter_map(told).take(patience) {
                flushed = number;
            }
            child.kill().unwrap();
            child.wait().unwrap();
            // Output that was not read before the kill counts as well.
            flushed = out.filter_map(told).last().unwrap_or(flushed);
            assert!(flushed >= patience as u64 * 3);
            check(&disk.parse().unwrap(), flushed);
            if kind == "qcow2" {
                // Opening it for writing has repaired it.
                let check = Command::new("qemu-img").args(["check", text(&path)]).output().unwrap();
                let told = String::from_utf8_lossy(&check.stdout);
                // 3: leaked clusters, which lose no data.
                assert!(matches!(check.status.code(), Some(0 | 3)), "{kind} {options}: {told}");
            }
        }
    }
}

/// Opens a disk as soon as it is no longer in use. The kernel closes an io_uring's files some time
/// after its process has ended, and a process that another test is starting has all descriptors
/// until exec.
fn open(spec: &Spec, options: ImageOptions) -> Result<Image, ImageError> {
    loop {
        match Image::open_disk(spec, options) {
            Err(ImageError::Busy(_)) => std::thread::sleep(std::time::Duration::from_millis(2)),
            opened => return opened,
        }
    }
}

fn check(spec: &Spec, flushed: u64) {
    let image = open(spec, ImageOptions::default()).unwrap();
    let mut engine = image.engine::<HeapMemory>(8).unwrap();
    for number in 0..flushed {
        let page = HeapMemory::pages(3);
        all(&mut engine, &[(Io::Read { sector: place(number) }, Some(page.clone()))]);
        let mut found = vec![0; LEN];
        page.read_bytes(0, &mut found).unwrap();
        assert!(found == data(number), "{spec}: number {number} of {flushed}");
    }
}

#[test]
fn dirty_qcow2_refcounts_are_repaired_before_first_write() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    for options in ["refcount_bits=16", "refcount_bits=1", "refcount_bits=4", "refcount_bits=64"] {
        let options = format!("cluster_size=4k,{options}");
        tool("qemu-img", &["create", "-f", "qcow2", "-o", &options, text(&path), "32M"]);
        tool("qemu-io", &["-c", "write -P 1 0 300k", "-c", "write -P 2 20M 300k", text(&path)]);
        if !options.ends_with("=1") {
            tool("qemu-img", &["snapshot", "-c", "s", text(&path)]);
        }
        // Not closed, and its counts were never written: all but the first are zero.
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[79] |= 1;
        let field = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
        let block = field(field(48));
        bytes[block + 1..block + 1000].fill(0);
        std::fs::write(&path, &bytes).unwrap();
        let check = Command::new("qemu-img").args(["check", text(&path)]).output().unwrap();
        assert_eq!(check.status.code(), Some(2), "qemu-img check finds errors before the repair");
        // Reading needs no counts, and opening for writing repairs them.
        let spec: Spec = format!("qcow2:{}", text(&path)).parse().unwrap();
        let read = ImageOptions { read_only: true, direct: false };
        drop(open(&spec, read).unwrap());
        assert!(std::fs::read(&path).unwrap() == bytes, "image changed although it was only read");
        let image = open(&spec, ImageOptions::default()).unwrap();
        let mut engine = image.engine::<HeapMemory>(8).unwrap();
        for number in 0..100 {
            all(&mut engine, &[(Io::Write { sector: place(number) }, Some(page(number)))]);
        }
        drop((engine, image));
        let told = tool("qemu-img", &["check", text(&path)]);
        assert!(String::from_utf8_lossy(&told.stdout).contains("No errors"), "{options}");
        let image = open(&spec, read).unwrap();
        let mut engine = image.engine::<HeapMemory>(8).unwrap();
        let found = HeapMemory::pages(3);
        all(&mut engine, &[(Io::Read { sector: 1 }, Some(found.clone()))]);
        let mut bytes = vec![0; LEN];
        found.read_bytes(0, &mut bytes).unwrap();
        // Number 0 is there.
        assert!(bytes[..LEN - 512] == data(0)[512..] && bytes[LEN - 512..].iter().all(|b| *b == 1));
    }
}

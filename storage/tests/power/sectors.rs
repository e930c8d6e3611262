//! Every sector of a disk after a power loss, in images of every format: it contains what was
//! flushed, or something that was written since.

use super::files::HostFile;
use super::fuse::{OneFile, put};
use super::support::{Rng, has, text, tool};
use pvio_blkback::engine::{BlockEngine, Io};
use pvio_ring::IoSeg;
use pvio_ring::shm::{HeapMemory, Region};
use pvio_storage::engine::record::{Loss, Record};
use pvio_storage::engine::wait::{DiskEngine, WaitEngine};
use pvio_storage::image::{Image, ImageError};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

const SECTOR: usize = 512;

/// A kind of image.
struct Sample {
    name: &'static str,
    /// The name of its format in pvio and in QEMU.
    format: &'static str,
    qemu: &'static str,
    options: &'static str,
    /// Bytes of its disk.
    size: u64,
    /// Preparation with `qemu-img` and `qemu-io` before it is served.
    begin: Begin,
}

#[derive(Clone, Copy, PartialEq)]
enum Begin {
    /// It is empty.
    Empty,
    /// It has data, from a raw image.
    Filled,
    /// It has compressed data.
    Packed,
    /// It has data, and a snapshot that shares it.
    Snapshot,
    /// Its backing file, a raw image, has data.
    Chain,
}

const MB: u64 = 1 << 20;

const fn qcow2(name: &'static str, options: &'static str, size: u64, begin: Begin) -> Sample {
    Sample { name, format: "qcow2", qemu: "qcow2", options, size, begin }
}

const SAMPLES: &[Sample] = &[
    qcow2("plain", "cluster_size=64k", 8 * MB, Begin::Empty),
    qcow2("4k", "cluster_size=4k", 8 * MB, Begin::Empty),
    // More tables than the library caches, and a table of reference counts that grows.
    qcow2("small", "cluster_size=512,refcount_bits=64", 6 * MB, Begin::Empty),
    qcow2("old", "compat=0.10,cluster_size=4k", 4 * MB, Begin::Empty),
    qcow2("filled", "cluster_size=4k", 4 * MB, Begin::Filled),
    qcow2("packed", "cluster_size=4k", 4 * MB, Begin::Packed),
    qcow2("snapshot", "cluster_size=4k", 4 * MB, Begin::Snapshot),
    // Nothing is overwritten in place, and no write order is needed.
    Sample {
        name: "vmdk",
        format: "vmdk",
        qemu: "vmdk",
        options: "subformat=monolithicSparse",
        size: 8 * MB,
        begin: Begin::Empty,
    },
    Sample {
        name: "vhd",
        format: "vhd",
        qemu: "vpc",
        options: "subformat=dynamic,force_size=on",
        size: 16 * MB,
        begin: Begin::Empty,
    },
    Sample {
        name: "raw",
        format: "raw",
        qemu: "raw",
        options: "preallocation=off",
        size: 4 * MB,
        begin: Begin::Filled,
    },
    qcow2("chain", "cluster_size=16k", 4 * MB, Begin::Chain),
];

/// A possible value of a sector.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Value {
    /// The initial value.
    First,
    Zeroes,
    /// The data of the write with that number.
    Written(u64),
}

fn content(sector: u64, value: Value, begin: &[u8]) -> Vec<u8> {
    match value {
        Value::First => begin[sector as usize * SECTOR..][..SECTOR].to_vec(),
        Value::Zeroes => vec![0; SECTOR],
        Value::Written(number) => {
            let mut rng = Rng(sector << 32 | number);
            (0..SECTOR / 8).flat_map(|_| rng.next().to_le_bytes()).collect()
        }
    }
}

/// An operation, and the point of the record at which it was submitted; for flushes, at which it
/// completed.
enum Step {
    Write(usize, u64, u64, u64),
    Discard(usize, u64, u64),
    Zero(usize, u64, u64),
    Flush(usize),
}

/// Executes all operations concurrently.
fn all(engine: &mut DiskEngine<HeapMemory>, ios: Vec<(Io, Vec<u8>)>) -> Vec<Vec<u8>> {
    let mut buffers = Vec::new();
    for (tag, (io, data)) in ios.iter().enumerate() {
        let buf = HeapMemory::pages(data.len().div_ceil(4096).max(1));
        buf.write_bytes(0, data).unwrap();
        buffers.push(buf.clone());
        let mut segments = match data.len() {
            0 => vec![],
            len => vec![IoSeg { buf, offset: 0, len }],
        };
        engine.submit(tag as u32, *io, &mut segments).unwrap();
    }
    engine.kick();
    let mut left = ios.len();
    while left > 0 {
        engine.wait_due(None).unwrap();
        engine.reap(&mut |tag, result, _| {
            result.unwrap_or_else(|e| panic!("{:?}: {e}", ios[tag as usize].0));
            left -= 1;
        });
    }
    let read = |((_, data), buf): (&(Io, Vec<u8>), HeapMemory)| {
        let mut found = vec![0; data.len()];
        buf.read_bytes(0, &mut found).unwrap();
        found
    };
    ios.iter().zip(buffers).map(read).collect()
}

/// Opens a disk as soon as it is no longer in use: a process that another test is starting has all
/// descriptors until exec.
fn open(spec: &str) -> Image {
    loop {
        match Image::open_as(&spec.parse().unwrap()) {
            Err(ImageError::Busy(_)) => std::thread::sleep(Duration::from_millis(2)),
            opened => return opened.unwrap_or_else(|e| panic!("{spec}: {e}")),
        }
    }
}

/// Returns the whole disk, as served after it is opened again.
pub fn served(spec: &str, size: u64) -> Vec<u8> {
    let image = open(spec);
    assert_eq!(image.geometry().sectors * 512, size);
    let mut engine = image.engine::<HeapMemory>(64).unwrap();
    let part =
        |at: u64| (Io::Read { sector: at / 512 }, vec![0; (size - at).min(256 << 10) as usize]);
    all(&mut engine, (0..size).step_by(256 << 10).map(part).collect()).concat()
}

/// Checks a qcow2 image that was opened and closed with `qemu-img`.
pub fn is_sound(image: &Path, when: &str) {
    let check = Command::new("qemu-img").args(["check", text(image)]).output().unwrap();
    let told = String::from_utf8_lossy(&check.stdout);
    // 3: leaked clusters, which lose no data.
    assert!(matches!(check.status.code(), Some(0 | 3)), "{when}: {told}");
}

/// Creates an image. Returns the contents of its disk.
fn make(sample: &Sample, dir: &Path, image: &Path) -> Vec<u8> {
    let (source, size) = (dir.join("source.img"), sample.size.to_string());
    let mut begin = vec![0; sample.size as usize];
    if sample.begin != Begin::Empty {
        let mut rng = Rng(7);
        // With zeroes in between, and compressible data.
        for (i, part) in begin.chunks_mut(8 << 10).enumerate().filter(|(i, _)| i % 5 != 0) {
            part.iter_mut()
                .for_each(|byte| *byte = rng.next() as u8 & if i % 2 == 0 { 3 } else { 0xff });
        }
    }
    fs::write(&source, &begin).unwrap();
    match sample.begin {
        Begin::Empty => {
            let args = ["create", "-f", sample.qemu, "-o", sample.options, text(image), &size];
            tool("qemu-img", &args);
        }
        Begin::Chain => {
            let options =
                format!("{},backing_file={},backing_fmt=raw", sample.options, text(&source));
            tool("qemu-img", &["create", "-f", sample.qemu, "-o", &options, text(image)]);
        }
        Begin::Filled | Begin::Packed | Begin::Snapshot => {
            let mut args = vec!["convert", "-O", sample.qemu, "-o", sample.options];
            args.extend((sample.begin == Begin::Packed).then_some("-c"));
            args.extend([text(&source), text(image)]);
            tool("qemu-img", &args);
            if sample.begin == Begin::Snapshot {
                tool("qemu-img", &["snapshot", "-c", "s", text(image)]);
            }
        }
    }
    begin
}

/// Works on a disk, in batches in which no two operations touch the same sectors.
fn work(spec: &str, size: u64, record: &Record, seed: u64) -> Vec<Step> {
    let image = open(spec);
    let discards = image.geometry().discard.is_some();
    let mut engine = image.engine::<HeapMemory>(64).unwrap();
    let mut rng = Rng(seed);
    let mut steps = Vec::new();
    for number in 1..60 {
        let mut ios = Vec::new();
        let count = 1 + rng.below(8);
        let part = size / 512 / count;
        let before = record.now();
        let flush = rng.below(3) == 0;
        for i in 0..count {
            let most = if rng.below(4) == 0 { 256 } else { 12 };
            let len = (1 + rng.below(most)).min(part);
            let sector = i * part + rng.below(part - len + 1);
            match rng.below(12) {
                0 if discards => {
                    let len = (len * 8).min(part);
                    let sector = i * part + rng.below(part - len + 1);
                    steps.push(Step::Discard(before, sector, len));
                    ios.push((Io::Discard { sector, sectors: len, secure: false }, vec![]));
                }
                1 => {
                    steps.push(Step::Zero(before, sector, len));
                    ios.push((Io::WriteZeroes { sector, sectors: len }, vec![]));
                }
                _ => {
                    steps.push(Step::Write(before, sector, len, number));
                    let data = (sector..sector + len)
                        .flat_map(|sector| content(sector, Value::Written(number), &[]))
                        .collect();
                    ios.push((Io::Write { sector }, data));
                }
            }
        }
        if rng.below(4) == 0 {
            // Concurrent with the writes, so that it covers none of them for certain.
            ios.push((Io::Flush, vec![]));
        }
        all(&mut engine, ios);
        if flush {
            all(&mut engine, vec![(Io::Flush, vec![])]);
            steps.push(Step::Flush(record.now()));
        }
    }
    steps
}

/// Returns the possible values of each sector after a power loss.
fn allowed(steps: &[Step], sectors: u64, moment: usize) -> Vec<BTreeSet<Value>> {
    let mut certain = vec![BTreeSet::from([Value::First]); sectors as usize];
    let mut loose: Vec<Vec<(Value, bool)>> = vec![Vec::new(); sectors as usize];
    let add = |loose: &mut Vec<Vec<(Value, bool)>>, sector: u64, len: u64, value, sure| {
        for held in &mut loose[sector as usize..][..len as usize] {
            held.push((value, sure));
        }
    };
    for step in steps {
        match *step {
            Step::Write(begun, sector, len, number) if begun <= moment => {
                add(&mut loose, sector, len, Value::Written(number), true);
            }
            Step::Zero(begun, sector, len) if begun <= moment => {
                add(&mut loose, sector, len, Value::Zeroes, true);
            }
            // Discarded data may stay.
            Step::Discard(begun, sector, len) if begun <= moment => {
                add(&mut loose, sector, len, Value::Zeroes, false);
            }
            Step::Flush(over) if over <= moment => {
                for (certain, loose) in certain.iter_mut().zip(&mut loose) {
                    for (value, sure) in loose.drain(..) {
                        if sure {
                            certain.clear();
                        }
                        certain.insert(value);
                    }
                }
            }
            _ => {}
        }
    }
    for (certain, loose) in certain.iter_mut().zip(&loose) {
        certain.extend(loose.iter().map(|(value, _)| *value));
    }
    certain
}

/// Loses power repeatedly while an image is in use.
fn lose_power(sample: &Sample, seed: u64, losses: usize) {
    let dir = tempfile::tempdir().unwrap();
    let (host, image) = (dir.path().join("host"), dir.path().join("image"));
    let disk = make(sample, dir.path(), &image);
    let begin = fs::read(&image).unwrap();
    let record = Arc::new(Record::default());
    fs::create_dir(&host).unwrap();
    let file = HostFile::new(begin.clone(), record.clone());
    let session = fuser::spawn_mount(OneFile(file), &host, &fuser::Config::default()).unwrap();
    // Its backing file is in the parent directory.
    let roots = text(dir.path());
    let spec = format!("[image-root={roots}]{}:{}", sample.format, text(&host.join("disk")));
    let steps = work(&spec, sample.size, &record, seed);
    session.umount_and_join().unwrap();

    let mut rng = Rng(seed ^ 0x5eed);
    let last = record.now();
    let flushes = record.flushes();
    let mut exact = 0;
    for i in 0..losses {
        let moment = match i % 3 {
            0 => flushes[rng.below(flushes.len() as u64) as usize],
            _ => rng.below(last as u64 + 1) as usize,
        };
        let loss = match i % 4 {
            0 => Loss::All,
            1 => Loss::Nothing,
            _ => Loss::Some(rng.next()),
        };
        let mut file = begin.clone();
        record.surviving_writes(moment, loss, &mut |at, data| put(&mut file, at, data));
        fs::write(&image, &file).unwrap();
        let when = format!("{} seed {seed}, {moment} of {last}, {loss:?}", sample.name);
        let found = served(&format!("{}:{}", sample.format, text(&image)), sample.size);
        if sample.format == "qcow2" {
            is_sound(&image, &when);
        }
        let allowed = allowed(&steps, sample.size / 512, moment);
        for ((sector, found), allowed) in (0..).zip(found.chunks(SECTOR)).zip(&allowed) {
            exact += usize::from(allowed.len() == 1);
            let fits = allowed.iter().any(|value| content(sector, *value, &disk) == found);
            let zeroes = found.iter().all(|byte| *byte == 0);
            assert!(fits, "{when}: sector {sector} (zeroes: {zeroes}) may hold {allowed:?}");
        }
    }
    // Checks that the test was exact enough.
    assert!(exact > losses * (sample.size / 512) as usize / 4, "{exact}");
    eprintln!("{}: {last} events, {} flushes of the host", sample.name, flushes.len());
}

#[test]
fn sector_after_power_loss_holds_flushed_or_later_write() {
    if !super::ext4::can_mount() || !has("qemu-img", "qemu-utils") {
        return;
    }
    let _turn = super::TURN.lock();
    let losses = std::env::var("PVIO_TEST_LOSSES").map_or(24, |n| n.parse().unwrap());
    for sample in SAMPLES {
        for seed in 0..2 {
            lose_power(sample, seed, losses);
        }
    }
}

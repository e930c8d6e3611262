//! Damaged images of every format, including QEMU's samples: truncated, or with changed bytes.
//! Whatever they contain, inspecting and serving one ends with a result.

mod support;

use pvio_blkback::engine::{BlockEngine, Io};
use pvio_ring::IoSeg;
use pvio_ring::shm::{HeapMemory, Region};
use pvio_storage::engine::wait::WaitEngine;
use pvio_storage::image::inspect::{Inspection, inspect};
use pvio_storage::image::{
    Disk, Format, HandedFiles, Image, ImageError, ImageOptions, LockState, Spec, resolve,
};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};
use support::{Rng, alone, has, text, tool};

/// Source locations of panics.
static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

struct Sample {
    name: &'static str,
    format: Format,
    file: PathBuf,
    bytes: Vec<u8>,
}

/// Creates images that use every feature of their format.
fn samples(dir: &Path) -> Vec<Sample> {
    let mut rng = Rng(1);
    let mut data: Vec<u8> = (0..3 << 20).map(|_| rng.next() as u8).collect();
    data[1 << 20..2 << 20].fill(0);
    let source = dir.join("source.img");
    std::fs::write(&source, &data).unwrap();
    let kinds = [
        ("plain", Format::Qcow2, "cluster_size=4k"),
        ("packed", Format::Qcow2, "cluster_size=64k"),
        ("old", Format::Qcow2, "compat=0.10"),
        ("dynamic", Format::Vhd, "subformat=dynamic"),
        ("fixed", Format::Vhd, "subformat=fixed"),
        ("flat", Format::Vmdk, "subformat=monolithicFlat"),
        ("sparse", Format::Vmdk, "subformat=monolithicSparse"),
        ("stream", Format::Vmdk, "subformat=streamOptimized"),
    ];
    let make = |(name, format, options): (&'static str, Format, &str)| {
        let word = if format == Format::Vhd { "vpc" } else { format.word() };
        let file = dir.join(format!("{name}.{}", format.word()));
        let mut args = vec!["convert", "-O", word, "-o", options, text(&source), text(&file)];
        if name == "packed" {
            args.insert(1, "-c");
        }
        tool("qemu-img", &args);
        if name == "plain" {
            tool("qemu-img", &["snapshot", "-c", "s", text(&file)]);
            tool("qemu-io", &["-c", "write -P 7 1M 256k", text(&file)]);
        }
        let bytes = std::fs::read(&file).unwrap();
        Sample { name, format, file, bytes }
    };
    kinds.into_iter().map(make).collect()
}

/// Inspects an image, serves it, and executes a few operations.
fn try_all(format: Format, path: &Path, rng: &mut Rng) {
    let spec = Spec::file(format, path);
    let _ = inspect(&spec).map(|found| found.problem.map(|p| p.to_string()));
    if format == Format::Qcow2 {
        let snapshot = Some("s".into());
        use_it(&Spec::File { format, path: path.into(), snapshot }, true, rng);
    }
    use_it(&spec, false, rng);
    use_it(&spec, true, rng);
}

/// Opens the files of a disk, whose threads of the use before may still end and hold its lock.
fn open_named(disk: &Disk) -> HandedFiles {
    let begin = Instant::now();
    loop {
        match HandedFiles::open_named(disk) {
            Err(ImageError::Busy(_)) if begin.elapsed() < Duration::from_secs(30) => {
                std::thread::sleep(Duration::from_millis(5));
            }
            named => return named.unwrap(),
        }
    }
}

fn use_it(spec: &Spec, read_only: bool, rng: &mut Rng) {
    let options = ImageOptions { read_only, direct: false };
    let mut disk = Disk::from(spec.clone());
    disk.options.read_only = Some(read_only);
    let named = open_named(&disk);
    let resolved = resolve(&disk, &named).map(|resolved| resolved.geometry);
    drop(named);
    let image = Image::open_disk(spec, options);
    match (&resolved, &image) {
        (Ok(geometry), Ok(image)) => assert_eq!(*geometry, image.geometry(), "{disk}"),
        // The parts of an image that is repaired are checked in another order.
        (Err(_), Err(_)) if !read_only => {}
        (Err(resolving), Err(opening)) => assert_eq!(resolving.code(), opening.code(), "{disk}"),
        (Err(error), Ok(_)) => panic!("{disk} is not resolved, but opened: {error}"),
        // An image that was not closed is checked in full when it is repaired.
        (Ok(_), Err(error)) => assert!(!read_only, "{disk} is resolved, but not opened: {error}"),
    }
    let Ok(image) = image else { return };
    let mut engine = image.engine::<HeapMemory>(16).unwrap();
    let sectors = image.geometry().sectors;
    let mut begun = 0;
    for tag in 0..12 {
        let sector = rng.below(sectors);
        let len = (sectors - sector).min(8) as usize * 512;
        let segment = IoSeg { buf: HeapMemory::pages(1), offset: 0, len };
        let (io, mut segments) = match tag % 6 {
            0 if !read_only => (Io::Write { sector }, vec![segment]),
            1 if !read_only => (Io::Flush, vec![]),
            2 if !read_only => {
                (Io::Discard { sector, sectors: sectors - sector, secure: false }, vec![])
            }
            _ => (Io::Read { sector }, vec![segment]),
        };
        engine.submit(tag, io, &mut segments).unwrap();
        begun += 1;
    }
    engine.kick();
    while begun > 0 {
        engine.wait_due(None).unwrap();
        engine.reap(&mut |_, _, _| begun -= 1);
    }
}

/// Records panics, including those that are caught.
fn watch_panics() {
    std::panic::set_hook(Box::new(|info| {
        let at = info.location().map(ToString::to_string).unwrap_or_default();
        eprintln!("a panic at {at}: {info}");
        PANICS.lock().unwrap().push(at);
    }));
}

/// Returns the number of caught panics of the library. Panics of pvio fail the test.
fn panics(what: &str) -> usize {
    // The lock is released before a panic here, which is recorded as well.
    let panics = PANICS.lock().unwrap().clone();
    assert_eq!(panics.iter().find(|at| !at.contains("/imago-")), None, "{what}");
    panics.len()
}

/// Truncates the bytes by a little or by much, or changes some of them.
fn damage(bytes: &mut Vec<u8>, round: u32, rng: &mut Rng) {
    let len = bytes.len() as u64;
    if round.is_multiple_of(4) {
        let keep = match round % 8 {
            0 => rng.below(len),
            _ => len - 1 - rng.below(len.min(4096)),
        };
        return bytes.truncate(keep as usize);
    }
    // Headers and tables are at the beginning, footers at the end.
    for _ in 0..1 + rng.below(6) {
        let at = match rng.below(4) {
            0 => rng.below(len.min(128)),
            1 => rng.below(len.min(64 << 10)),
            2 => len - 1 - rng.below(len.min(512)),
            _ => rng.below(len),
        };
        let byte = &mut bytes[at as usize];
        *byte = match rng.below(3) {
            0 => *byte ^ (1 << rng.below(8)),
            1 => 0xff,
            _ => rng.next() as u8,
        };
    }
}

/// Inspects a file that is no longer in use. A program that the other test starts concurrently
/// inherits all descriptors, and with them the locks, until exec.
fn looked_at(format: Format, path: &Path) -> Inspection {
    let start = Instant::now();
    loop {
        let looked = inspect(&Spec::file(format, path)).unwrap();
        if looked.files[0].lock == LockState::Free {
            return looked;
        }
        assert!(start.elapsed() < Duration::from_secs(5), "{path:?}: {:?}", looked.files[0].lock);
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn rounds(usual: u32) -> u32 {
    std::env::var("PVIO_TEST_ROUNDS").map_or(usual, |n| n.parse().unwrap())
}

#[test]
fn damaged_image_is_served_or_rejected_without_panic() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    watch_panics();
    let dir = tempfile::tempdir().unwrap();
    let mut rng = Rng(2);
    let (mut refused, mut served) = (0, 0);
    for sample in samples(dir.path()) {
        let path = &sample.file;
        for round in 0..rounds(240) {
            let mut bytes = sample.bytes.clone();
            damage(&mut bytes, round, &mut rng);
            std::fs::write(path, &bytes).unwrap();
            let looked = looked_at(sample.format, path);
            *(if looked.problem.is_some() { &mut refused } else { &mut served }) += 1;
            try_all(sample.format, path, &mut rng);
            panics(&format!("{} in round {round}", sample.name));
        }
        std::fs::write(path, &sample.bytes).unwrap();
    }
    let held_off = panics("the end");
    eprintln!("{refused} rejected, {served} served; {held_off} panics of the library caught");
    assert!(refused > 100 && served > 100, "{refused} rejected, {served} served");
}

/// The samples of QEMU's tests that pvio supports, and the sizes of their disks in bytes. For the
/// last one, QEMU uses the smaller CHS size that Virtual PC's BIOS could address (136363130880);
/// Hyper-V, tapdisk and pvio use the size in the image.
const READ: [(&str, Format, u64); 5] = [
    ("grub_mbr.raw", Format::Raw, 512),
    ("iotest-version3.vmdk", Format::Vmdk, 16 << 30),
    ("d2v-zerofilled.vhd", Format::Vhd, 263_454_720),
    ("hyperv2012r2-dynamic.vhd", Format::Vhd, 136_365_211_648),
    ("virtualpc-dynamic.vhd", Format::Vhd, 136_365_211_648),
];
/// Larger images are not damaged, because each attempt takes a copy.
const SMALL: u64 = 4 << 20;

/// Samples of supported formats are served, with the bytes that QEMU reads; all others are rejected
/// in every supported format. Then all of them are damaged and tried again.
#[test]
fn qemu_sample_images_are_served_or_rejected_without_panic() {
    let Some(samples) = std::env::var_os("PVIO_QEMU_SAMPLES").map(PathBuf::from) else {
        return println!(
            "SKIPPED: no sample images of QEMU's; `cargo xtask test unit` fetches them, or name a \
             folder with them (tests/qemu-iotests/sample_images, unpacked) in PVIO_QEMU_SAMPLES"
        );
    };
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    watch_panics();
    let dir = tempfile::tempdir().unwrap();
    let (mut rng, mut damaged) = (Rng(3), 0);
    let mut names: Vec<_> =
        std::fs::read_dir(&samples).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert!(READ.iter().all(|(name, ..)| names.iter().any(|n| n == name)), "{names:?}");
    for name in names {
        let (sample, copy) = (samples.join(&name), dir.path().join(&name));
        let known = READ.iter().find(|(known, ..)| name == *known);
        for format in [Format::Raw, Format::Qcow2, Format::Vmdk, Format::Vhd] {
            tool("cp", &["--sparse=always", text(&sample), text(&copy)]);
            let spec = Spec::file(format, &copy);
            let opened = Image::open_disk(&spec, ImageOptions { read_only: true, direct: false });
            match known {
                Some((_, theirs, bytes)) if *theirs == format => {
                    let image = opened.unwrap_or_else(|e| panic!("{name:?}: {e}"));
                    assert_eq!(image.geometry().sectors * 512, *bytes, "{name:?}");
                    holds_what_qemu_finds(image, format, &copy, &mut rng);
                }
                // Any bytes are a raw disk, if they are whole sectors.
                _ if format == Format::Raw => {
                    let whole = std::fs::metadata(&copy).unwrap().len().is_multiple_of(512);
                    assert_eq!(opened.map(drop).is_ok(), whole, "{name:?}");
                }
                _ => {
                    let error = opened.map(drop).expect_err("it is of another format");
                    assert!(error.to_string().contains(text(&copy)), "{name:?}: {error}");
                }
            }
            try_all(format, &copy, &mut rng);
            panics(&format!("{name:?} as {}", format.word()));
            if std::fs::metadata(&sample).unwrap().len() > SMALL {
                continue;
            }
            let whole = std::fs::read(&sample).unwrap();
            for round in 0..rounds(16) {
                let mut bytes = whole.clone();
                damage(&mut bytes, round, &mut rng);
                std::fs::write(&copy, &bytes).unwrap();
                try_all(format, &copy, &mut rng);
                panics(&format!("{name:?} as {}, round {round}", format.word()));
                damaged += 1;
            }
        }
        std::fs::remove_file(&copy).unwrap();
    }
    eprintln!("{damaged} damaged images");
}

/// Compares parts of a disk with the conversion of the image by `qemu-img`.
fn holds_what_qemu_finds(image: Image, format: Format, path: &Path, rng: &mut Rng) {
    let word = if format == Format::Vhd { "vpc" } else { format.word() };
    let raw = path.with_extension("as-raw");
    tool("qemu-img", &["convert", "-f", word, "-O", "raw", text(path), text(&raw)]);
    let file = std::fs::File::open(&raw).unwrap();
    let sectors = (file.metadata().unwrap().len() / 512).min(image.geometry().sectors);
    let mut engine = image.engine::<HeapMemory>(1).unwrap();
    let page = HeapMemory::pages(1);
    // The first ones are where file systems begin, the others at random.
    for i in 0..400 {
        let sector = if i < 200 { (i * 8) % sectors } else { rng.below(sectors) };
        let len = (sectors - sector).min(8) as usize * 512;
        let segment = IoSeg { buf: page.clone(), offset: 0, len };
        let read = alone(&mut engine, Io::Read { sector }, Some(segment));
        assert_eq!(read, Ok(()), "{path:?} at {sector}");
        let (mut ours, mut theirs) = ([0; 4096], [0; 4096]);
        page.read_bytes(0, &mut ours[..len]).unwrap();
        file.read_exact_at(&mut theirs[..len], sector * 512).unwrap();
        assert!(ours[..len] == theirs[..len], "{path:?} at sector {sector}");
    }
    std::fs::remove_file(raw).unwrap();
}

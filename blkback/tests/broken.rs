//! Broken images of every format: cut short, or with flipped bytes. Whatever is in them, looking at
//! one and serving one ends with an answer.
#![cfg(feature = "std")]

mod support;

use pvio_blkback::engine::wait::WaitEngine;
use pvio_blkback::engine::{BlockEngine, Io};
use pvio_blkback::image::inspect::inspect;
use pvio_blkback::image::{Format, Image, ImageOptions, LockState, Spec};
use pvio_ring::IoSeg;
use pvio_ring::shm::HeapMemory;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use support::{Rng, has, text, tool};

/// Where in our sources, or in whose, a panic was.
static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

struct Sample {
    name: &'static str,
    format: Format,
    file: PathBuf,
    bytes: Vec<u8>,
}

/// Images with something of everything in them.
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

/// Looks at it, serves it, and does a little with it.
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

fn use_it(spec: &Spec, read_only: bool, rng: &mut Rng) {
    let options = ImageOptions { read_only, direct: false };
    let Ok(image) = Image::open_disk(spec, options) else { return };
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
        engine.wait(None).unwrap();
        engine.reap(&mut |_, _, _| begun -= 1);
    }
}

#[test]
fn a_broken_image_ends_with_an_answer() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    std::panic::set_hook(Box::new(|info| {
        let at = info.location().map(ToString::to_string).unwrap_or_default();
        eprintln!("a panic at {at}: {info}");
        PANICS.lock().unwrap().push(at);
    }));
    let dir = tempfile::tempdir().unwrap();
    let mut rng = Rng(2);
    let (mut refused, mut served) = (0, 0);
    for sample in samples(dir.path()) {
        let path = &sample.file;
        let len = sample.bytes.len() as u64;
        let rounds = std::env::var("PVIO_TEST_ROUNDS").map_or(240, |n| n.parse().unwrap());
        for round in 0..rounds {
            let mut bytes = sample.bytes.clone();
            if round % 4 == 0 {
                // Short by a little, or by much.
                let keep = if round % 8 == 0 {
                    rng.below(len)
                } else {
                    len - 1 - rng.below(len.min(4096))
                };
                bytes.truncate(keep as usize);
            } else {
                // Headers and tables are at the beginning, and footers at the end.
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
            std::fs::write(path, &bytes).unwrap();
            let looked = inspect(&Spec::file(sample.format, path)).unwrap();
            assert_eq!(looked.files[0].lock, LockState::Free);
            *(if looked.problem.is_some() { &mut refused } else { &mut served }) += 1;
            try_all(sample.format, path, &mut rng);
            let panics = PANICS.lock().unwrap();
            let ours = panics.iter().find(|at| !at.contains("/imago-"));
            assert_eq!(ours, None, "{} in round {round}", sample.name);
        }
        std::fs::write(path, &sample.bytes).unwrap();
    }
    let panics = PANICS.lock().unwrap();
    eprintln!(
        "{refused} refused, {served} served; {} panics of the library held off",
        panics.len()
    );
    assert!(refused > 100 && served > 100, "{refused} refused, {served} served");
}

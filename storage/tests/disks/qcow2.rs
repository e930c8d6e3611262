//! qcow2 images created by `qemu-img`, used by a guest through the whole stack, and checked by
//! `qemu-img` afterwards.

use crate::support::{Deed, Machine, Rng, has, text, tool, workload};
use pvio_storage::image::{Image, ImageOptions};
use pvio_xenbus::handshake::vbd::Mode;
use std::path::Path;

/// Returns the disk in an image as `qemu-img` reads it.
fn converted(image: &Path) -> Vec<u8> {
    let raw = image.with_extension("converted");
    tool("qemu-img", &["convert", "-O", "raw", text(image), text(&raw)]);
    std::fs::read(raw).unwrap()
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = Rng(seed);
    (0..len).map(|_| rng.next() as u8).collect()
}

#[test]
fn qcow2_written_by_guest_matches_qemu_img_conversion() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (name, options) in [
        ("plain", "cluster_size=64k"),
        ("small", "cluster_size=512,refcount_bits=1"),
        ("large", "cluster_size=2M"),
        ("lazy", "lazy_refcounts=on"),
        ("old", "compat=0.10"),
        ("full", "preallocation=metadata"),
    ] {
        let image = dir.path().join(format!("{name}.qcow2"));
        let size = 24 << 20;
        tool("qemu-img", &["create", "-f", "qcow2", "-o", options, text(&image), "24M"]);
        let mut model = vec![0; size];
        for seed in 0..2 {
            let mut guest =
                Machine::new().disk(&format!("qcow2:{}", text(&image)), Mode::ReadWrite);
            assert_eq!(guest.session().size(), size as u64);
            workload(&mut guest, &mut model, seed, 30, name != "old");
            assert!(guest.everything() == model, "{name}");
            guest.close();
            tool("qemu-img", &["check", text(&image)]);
        }
        assert!(converted(&image) == model, "{name}");
    }
}

#[test]
fn qcow2_chain_is_read_through_and_only_top_image_is_written() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let mut model = noise(1, 8 << 20);
    std::fs::write(path("base.img"), &model).unwrap();
    // A compressed image in the middle, and a top image that is larger than its backing file.
    tool(
        "qemu-img",
        &["create", "-f", "qcow2", "-F", "raw", "-b", "base.img", text(&path("mid.qcow2"))],
    );
    let mut guest =
        Machine::new().disk(&format!("qcow2:{}", text(&path("mid.qcow2"))), Mode::ReadWrite);
    workload(&mut guest, &mut model, 2, 20, false);
    guest.close();
    tool(
        "qemu-img",
        &[
            "convert",
            "-c",
            "-O",
            "qcow2",
            "-o",
            "backing_file=base.img,backing_fmt=raw",
            text(&path("mid.qcow2")),
            text(&path("packed.qcow2")),
        ],
    );
    tool(
        "qemu-img",
        &[
            "create",
            "-f",
            "qcow2",
            "-F",
            "qcow2",
            "-b",
            "packed.qcow2",
            text(&path("top.qcow2")),
            "12M",
        ],
    );
    let below = [path("base.img"), path("packed.qcow2")].map(|p| std::fs::read(p).unwrap());
    model.resize(12 << 20, 0);
    let mut guest =
        Machine::new().disk(&format!("qcow2:{}", text(&path("top.qcow2"))), Mode::ReadWrite);
    assert!(guest.everything() == model);
    workload(&mut guest, &mut model, 3, 40, true);
    assert!(guest.everything() == model);
    guest.close();
    tool("qemu-img", &["check", text(&path("top.qcow2"))]);
    assert!(converted(&path("top.qcow2")) == model);
    assert!(below == [path("base.img"), path("packed.qcow2")].map(|p| std::fs::read(p).unwrap()));
}

#[test]
fn qcow2_discard_frees_host_blocks_and_reuses_clusters() {
    use rustix::fs::{SeekFrom, seek};
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.qcow2");
    for options in ["compat=1.1", "compat=0.10", "cluster_size=4k"] {
        tool("qemu-img", &["create", "-f", "qcow2", "-o", options, text(&image), "16M"]);
        let file = std::fs::File::open(&image).unwrap();
        // Not the allocated blocks of the file: the file system may need a block to record a hole.
        let room = || {
            file.sync_all().unwrap();
            let (mut room, mut at) = (0, 0);
            while let Ok(data) = seek(&file, SeekFrom::Data(at)) {
                at = seek(&file, SeekFrom::Hole(data)).unwrap();
                room += at - data;
            }
            room
        };
        let empty = room();
        let mut guest = Machine::new().disk(&format!("qcow2:{}", text(&image)), Mode::ReadWrite);
        let data = noise(4, 32 << 10);
        for round in 0..2 {
            for i in 0..(16 << 20) / data.len() as u64 {
                guest.one(Deed::Write(i * 64, data.clone()));
            }
            guest.one(Deed::Flush);
            let full = room();
            assert!(full >= empty + (16 << 20), "{options}: {full}");
            let length = file.metadata().unwrap().len();
            // A part of a cluster, then many whole clusters, then everything.
            guest.one(Deed::Discard(8, 64));
            guest.one(Deed::Flush);
            // The host's file system uses a block to record the hole.
            assert!(room() <= full - (28 << 10), "{options}");
            assert_eq!(guest.one(Deed::Read(0, 8)), data[..4096]);
            assert!(guest.one(Deed::Read(8, 64)).iter().all(|b| *b == 0));
            guest.one(Deed::Discard(1024, 16384));
            guest.one(Deed::Flush);
            assert!(room() <= full - (8 << 20), "{options}");
            guest.one(Deed::Discard(0, 32768));
            guest.one(Deed::Flush);
            // Only tables are left.
            assert!(room() <= empty + (1 << 20), "{options}: {} of {full}", room());
            assert!(guest.everything().iter().all(|b| *b == 0));
            // Clusters are reused in place: the file does not grow.
            assert!(round == 0 || file.metadata().unwrap().len() == length, "{options}");
        }
        guest.close();
        tool("qemu-img", &["check", text(&image)]);
        assert!(converted(&image) == vec![0; 16 << 20]);
    }
}

#[test]
fn qcow2_snapshot_reads_old_data_after_later_writes() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    // Compressed clusters, zeroes, data, and data of the backing file.
    let mut base = noise(5, 6 << 20);
    base[1 << 20..2 << 20].fill(0);
    base[2 << 20..3 << 20].fill(7);
    std::fs::write(path("base.img"), &base).unwrap();
    tool(
        "qemu-img",
        &["convert", "-c", "-O", "qcow2", text(&path("base.img")), text(&path("a.qcow2"))],
    );
    let spec = format!("qcow2:{}", text(&path("a.qcow2")));
    let mut model = base;
    let mut states = Vec::new();
    for (seed, name) in [(1, "first"), (2, "the second"), (3, "third")] {
        let mut guest = Machine::new().disk(&spec, Mode::ReadWrite);
        workload(&mut guest, &mut model, seed, 10, true);
        guest.close();
        tool("qemu-img", &["snapshot", "-c", name, text(&path("a.qcow2"))]);
        states.push((name, model.clone()));
    }
    // Clusters that snapshots share are not written in place.
    let mut guest = Machine::new().disk(&spec, Mode::ReadWrite);
    workload(&mut guest, &mut model, 4, 30, true);
    assert!(guest.everything() == model);
    guest.close();
    tool("qemu-img", &["check", text(&path("a.qcow2"))]);
    for (name, model) in states {
        let spec = format!("qcow2@{name}:{}", text(&path("a.qcow2")));
        let mut guest = Machine::new().disk(&spec, Mode::ReadOnly);
        assert!(guest.everything() == model, "{name}");
        guest.close();
    }
}

#[test]
fn image_lock_is_honoured_between_pvio_and_qemu() {
    if !has("qemu-img", "qemu-utils") || !has("qemu-io", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (format, name) in [("qcow2", "a.qcow2"), ("raw", "a.img")] {
        let path = dir.path().join(name);
        tool("qemu-img", &["create", "-f", format, text(&path), "1M"]);
        let refused = || {
            let tried = std::process::Command::new("qemu-io")
                .args(["-f", format, "-c", "read 0 512", text(&path)])
                .output()
                .unwrap();
            (!tried.status.success()).then(|| String::from_utf8(tried.stderr).unwrap())
        };
        let guest = Machine::new().disk(&format!("{format}:{}", text(&path)), Mode::ReadWrite);
        let told = refused().expect("qemu-io opened an image in use");
        assert!(told.contains("lock"), "{told}");
        guest.close();
        assert_eq!(refused(), None);

        let mut qemu = std::process::Command::new("qemu-io")
            .args(["-f", format, text(&path)])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // It replies after it has opened the image.
        let stdin = qemu.stdin.as_mut().unwrap();
        std::io::Write::write_all(stdin, b"read 0 512\n").unwrap();
        let mut line = String::new();
        let mut out = std::io::BufReader::new(qemu.stdout.take().unwrap());
        std::io::BufRead::read_line(&mut out, &mut line).unwrap();
        let spec = format!("{format}:{}", text(&path)).parse().unwrap();
        let error = Image::open_disk(&spec, ImageOptions::default()).unwrap_err();
        assert_eq!(error.code(), "image-busy", "{error}");
        drop(qemu.stdin.take());
        assert!(qemu.wait().unwrap().success());
        Image::open_disk(&spec, ImageOptions::default()).unwrap();
    }
}

/// No program creates such an image, but the format permits it.
#[test]
fn qcow2_snapshot_of_image_with_data_file_is_rejected() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (image, data) = (dir.path().join("a.qcow2"), dir.path().join("a.data"));
    let options = format!("data_file={}", text(&data));
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, text(&image), "4M"]);
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 7 0 64k", text(&image)]);
    let mut bytes = std::fs::read(&image).unwrap();
    let table = bytes.len().next_multiple_of(65536);
    let l1 = bytes[36..48].to_vec();
    let mut snapshot = [&l1[4..12], &l1[..4]].concat();
    snapshot.extend([0, 1, 0, 1]);
    snapshot.extend([0; 20]);
    snapshot.extend(16u32.to_be_bytes());
    snapshot.extend([0; 8]);
    snapshot.extend((4u64 << 20).to_be_bytes());
    snapshot.extend(b"1s");
    bytes.resize(table, 0);
    bytes.extend(snapshot);
    bytes.resize(table + 65536, 0);
    bytes[60..64].copy_from_slice(&1u32.to_be_bytes());
    bytes[64..72].copy_from_slice(&(table as u64).to_be_bytes());
    std::fs::write(&image, &bytes).unwrap();
    let open = |spec: String| {
        let options = ImageOptions { read_only: true, direct: false };
        Image::open_disk(&spec.parse().unwrap(), options)
    };
    let image = text(&image);
    let error = open(format!("qcow2@s:{image}")).unwrap_err();
    assert_eq!(error.code(), "image-feature", "{error}");
    assert!(error.to_string().contains("data in another file"), "{error}");
    // The image itself is served.
    open(format!("qcow2:{image}")).unwrap();
}

//! Every format and kind of storage.

use crate::confined::{Confined, Outcome};
use crate::support::{Rng, has, text, tool};
use crate::{contents, resolved, when_free};
use pvio_storage::image::{Disk, Image};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const SIZE: usize = 6 << 20;

/// Serves a disk in a confined process to its end.
pub fn served(disk: &Disk) -> Outcome {
    let (named, resolved) = resolved(disk);
    let confined = Confined::start(disk, &named, &resolved);
    // The process has its own.
    drop((named, resolved));
    assert_eq!(confined.opened(), Ok(()), "{disk}");
    confined.proceed();
    confined.finish()
}

/// Serves a disk with these options, and compares with what this process reads from the same files
/// before and afterwards.
fn same_bytes(options: &str, disk: &str) {
    let before = contents(disk);
    let outcome = served(&format!("[{options}]{disk}").parse().unwrap());
    assert!(outcome.before == before, "[{options}]{disk}: other bytes than by paths");
    assert!(contents(disk) == outcome.after, "[{options}]{disk}: other bytes after writing");
    let writes = options.starts_with("rw");
    assert_eq!(outcome.after != before, writes, "[{options}]{disk}: writes have no effect");
}

/// A file of data and holes.
fn source(dir: &Path) -> PathBuf {
    let path = dir.join("source.img");
    let mut rng = Rng(1);
    let mut bytes: Vec<u8> = (0..SIZE).map(|_| rng.next() as u8).collect();
    bytes[1 << 20..4 << 20].fill(0);
    fs::write(&path, bytes).unwrap();
    path
}

fn converted(from: &Path, format: &str, options: &str, name: &str) -> PathBuf {
    let image = from.with_file_name(name);
    let mut args = vec!["convert", "-O", format];
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    args.extend([text(from), text(&image)]);
    tool("qemu-img", &args);
    image
}

#[test]
fn raw_file_from_descriptor_has_same_bytes() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let dir = dir.path();
    let image = source(dir);
    for options in ["ro", "rw", "ro,direct", "rw,direct", "rw,sector=4096"] {
        same_bytes(options, &format!("raw:{}", text(&image)));
    }
    let outcome = served(&format!("[rw,overlay]raw:{}", text(&image)).parse().unwrap());
    let now = contents(&format!("raw:{}", text(&image)));
    assert!(outcome.before == now && outcome.after != now);
}

#[test]
fn qcow2_chain_from_descriptors_has_same_bytes() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let dir = dir.path();
    let raw = source(dir);
    let image = |name: &str| dir.join(name);
    let over = |below: &str, format: &str, name: &str| {
        let new = image(name);
        let args = ["create", "-q", "-f", "qcow2", "-F", format, "-b", below, text(&new)];
        tool("qemu-img", &args);
        let data = ["-f", "qcow2", "-c", "write -P 7 2M 200k", text(&new)];
        tool("qemu-io", &data);
    };
    over("source.img", "raw", "middle.qcow2");
    over("middle.qcow2", "qcow2", "top.qcow2");
    tool("qemu-img", &["snapshot", "-c", "s", text(&image("top.qcow2"))]);
    let top = format!("qcow2:{}", text(&image("top.qcow2")));
    for options in ["ro", "rw", "ro,direct", "rw,direct"] {
        same_bytes(options, &top);
    }
    same_bytes("ro", &format!("qcow2@s:{}", text(&image("top.qcow2"))));
    let compressed = image("compressed.qcow2");
    tool("qemu-img", &["convert", "-c", "-O", "qcow2", text(&raw), text(&compressed)]);
    same_bytes("ro", &format!("qcow2:{}", text(&compressed)));
    same_bytes("rw", &format!("qcow2:{}", text(&compressed)));
    let data = format!("data_file={},data_file_raw=on", text(&image("data.img")));
    let split = converted(&raw, "qcow2", &data, "split.qcow2");
    same_bytes("ro", &format!("qcow2:{}", text(&split)));
    let old = converted(&raw, "qcow2", "compat=0.10", "old.qcow2");
    same_bytes("rw", &format!("qcow2:{}", text(&old)));
    tool("qemu-img", &["check", "-q", text(&old)]);
    tool("qemu-img", &["check", "-q", text(&image("top.qcow2"))]);
    let below = converted(&raw, "qcow2", "", "below.qcow2");
    let outcome = served(&format!("[rw]overlay:qcow2:{}", text(&below)).parse().unwrap());
    assert!(outcome.before == fs::read(&raw).unwrap() && outcome.after != outcome.before);
}

#[test]
fn vmdk_extents_from_descriptors_have_same_bytes() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let dir = dir.path();
    let raw = source(dir);
    for kind in ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"]
    {
        let name = format!("{kind}.vmdk");
        let image = converted(&raw, "vmdk", &format!("subformat={kind}"), &name);
        for options in ["ro", "rw", "rw,direct"] {
            same_bytes(options, &format!("vmdk:{}", text(&image)));
        }
    }
    let image = converted(&raw, "vmdk", "subformat=streamOptimized", "stream.vmdk");
    same_bytes("ro", &format!("vmdk:{}", text(&image)));
}

#[test]
fn vhd_from_descriptor_has_same_bytes() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let dir = dir.path();
    let raw = source(dir);
    for kind in ["dynamic", "fixed"] {
        let options = format!("subformat={kind},force_size=on");
        let image = converted(&raw, "vpc", &options, &format!("{kind}.vhd"));
        for options in ["ro", "rw", "ro,direct", "rw,direct"] {
            same_bytes(options, &format!("vhd:{}", text(&image)));
        }
    }
}

/// A loop device over a file; detached when it is dropped.
struct Loop(String);

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn block_device_from_descriptor_has_same_bytes_and_geometry() {
    if !has("losetup", "mount") {
        return;
    }
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let image = source(dir.path());
    let made = Command::new("losetup").args(["--find", "--show", text(&image)]).output().unwrap();
    if !made.status.success() {
        println!("SKIPPED: no loop device; run as root, with /dev/loop-control");
        return;
    }
    let device = Loop(String::from_utf8(made.stdout).unwrap().trim().to_owned());
    for options in ["ro", "rw", "ro,direct", "rw,direct"] {
        let disk = format!("raw:{}", device.0);
        let disk_with_options: Disk = format!("[{options}]{disk}").parse().unwrap();
        let local = when_free(|| Image::open_as(&disk_with_options)).geometry();
        assert_eq!(local.discard.is_some(), options.starts_with("rw"), "{options}");
        let (named, resolved) = resolved(&disk_with_options);
        assert_eq!(resolved.geometry, local, "{options}");
        drop((named, resolved));
        same_bytes(options, &disk);
    }
}

/// An image that changes between the two processes.
#[test]
fn changed_image_is_rejected_with_its_code() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let raw = source(dir.path());
    let other = dir.path().join("other.img");
    fs::copy(&raw, &other).unwrap();
    let image = dir.path().join("a.qcow2");
    let create = |path: &Path, below: &str, size: &str| {
        let args = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", below, "-u"];
        tool("qemu-img", &[&args[..], &[text(path), size]].concat());
    };
    let disk: Disk = format!("[ro]qcow2:{}", text(&image)).parse().unwrap();
    for (below, size) in [("other.img", "6M"), ("source.img", "7M")] {
        create(&image, "source.img", "6M");
        let (named, resolved) = resolved(&disk);
        let changed = dir.path().join("changed.qcow2");
        create(&changed, below, size);
        // In place, despite the lock.
        fs::write(&image, fs::read(&changed).unwrap()).unwrap();
        let confined = Confined::start(&disk, &named, &resolved);
        assert_eq!(confined.opened(), Err("image-changed".into()), "{below} {size}");
    }
}

/// A raw disk may be resized between the two processes, and later.
#[test]
fn raw_file_that_has_grown_is_opened_with_its_present_size() {
    let dir = tempfile::tempdir().unwrap();
    let raw = source(dir.path());
    let disk: Disk = format!("[ro]raw:{}", text(&raw)).parse().unwrap();
    let (named, resolved) = resolved(&disk);
    fs::File::options().write(true).open(&raw).unwrap().set_len(SIZE as u64 * 2).unwrap();
    let confined = Confined::start(&disk, &named, &resolved);
    assert_eq!(confined.opened(), Ok(()));
    confined.proceed();
    assert_eq!(confined.finish().before.len(), SIZE * 2);
}

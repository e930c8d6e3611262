//! Images of every format on block devices, which neither grow nor start out zeroed.

use crate::device::Loop;
use crate::support::{Deed, Machine, Rng, has, text, tool, workload};
use pvio_ring::proto::blkif::Status;
use pvio_storage::image::inspect::inspect;
use pvio_storage::image::{Image, ImageOptions, Spec};
use pvio_xenbus::handshake::vbd::Mode;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The contents of a device before an image is written to it.
const RUBBISH: u8 = 0xa5;

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = Rng(seed);
    (0..len).map(|_| rng.next() as u8).collect()
}

/// Returns a device of `bytes` bytes with an image at its beginning.
fn device(dir: &Path, image: &Path, bytes: u64) -> Option<Loop> {
    let medium = dir.join("medium");
    std::fs::write(&medium, vec![RUBBISH; bytes as usize]).unwrap();
    let content = std::fs::read(image).unwrap();
    File::options().write(true).open(&medium).unwrap().write_all_at(&content, 0).unwrap();
    Loop::over(&medium)
}

/// Returns the disk on a device as QEMU reads it.
fn converted(dir: &Path, format: &str, device: &Loop) -> Vec<u8> {
    let raw = dir.join("converted");
    tool("blockdev", &["--flushbufs", &device.0]);
    tool("qemu-img", &["convert", "-f", format, "-O", "raw", &device.0, text(&raw)]);
    std::fs::read(raw).unwrap()
}

#[test]
fn image_on_block_device_written_by_guest_matches_qemu_img_conversion() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    for (name, word, options, bytes) in [
        ("qcow2", "qcow2", "compat=1.1", 40 << 20),
        ("qcow2", "qcow2", "compat=0.10", 40 << 20),
        ("qcow2", "qcow2", "cluster_size=4k,lazy_refcounts=on", 40 << 20),
        ("vhd", "vpc", "subformat=dynamic,force_size=on", 40 << 20),
        // Its footer is at the end of the device.
        ("vhd", "vpc", "subformat=fixed,force_size=on", 0),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (source, image) = (dir.path().join("source"), dir.path().join("image"));
        // Data, holes, and an end inside a block.
        let mut model = noise(1, 21 << 20);
        model[3 << 20..9 << 20].fill(0);
        std::fs::write(&source, &model).unwrap();
        tool("qemu-img", &["convert", "-O", word, "-o", options, text(&source), text(&image)]);
        let bytes = bytes.max(std::fs::metadata(&image).unwrap().len());
        let Some(device) = device(dir.path(), &image, bytes) else { return };
        let disk = format!("{name}:{}", device.0);
        let found = inspect(&disk.parse::<Spec>().unwrap()).unwrap();
        assert!(found.problem.is_none(), "{disk} {options}: {:?}", found.problem);
        for seed in 0..2 {
            let mut guest = Machine::new().disk(&disk, Mode::ReadWrite);
            assert_eq!(guest.session().size(), model.len() as u64);
            assert!(guest.everything() == model, "{options}");
            workload(&mut guest, &mut model, seed, 30, true);
            assert!(guest.everything() == model, "{options}");
            guest.close();
            assert!(converted(dir.path(), word, &device) == model, "{options}");
            if word == "qcow2" {
                tool("qemu-img", &["check", "-f", "qcow2", &device.0]);
            }
        }
        let mut guest = Machine::new().disk(&disk, Mode::ReadOnly);
        assert!(guest.everything() == model, "{options}");
        guest.close();
    }
}

#[test]
fn dynamic_vhd_on_full_device_fails_write_and_exposes_no_old_data() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    let options = "subformat=dynamic,force_size=on";
    tool("qemu-img", &["create", "-f", "vpc", "-o", options, text(&image), "32M"]);
    // Space for four blocks of 2 MiB, but not for a fifth.
    let Some(device) = device(dir.path(), &image, 10 << 20) else { return };
    let mut guest = Machine::new().disk(&format!("vhd:{}", device.0), Mode::ReadWrite);
    let mut model = vec![0; 32 << 20];
    for block in [3u64, 0, 9, 5] {
        let sector = block * 4096 + 17;
        guest.one(Deed::Write(sector, vec![7; 512]));
        model[sector as usize * 512..][..512].fill(7);
    }
    assert_eq!(guest.all(&[Deed::Write(11 * 4096, vec![7; 512])])[0].0, Status::Error);
    assert!(guest.everything() == model);
    guest.close();
    assert!(converted(dir.path(), "vpc", &device) == model);
    let mut guest = Machine::new().disk(&format!("vhd:{}", device.0), Mode::ReadWrite);
    assert!(guest.everything() == model);
    guest.close();
}

#[test]
fn vmdk_on_block_device_is_read_only_except_flat_extents() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (source, image) = (dir.path().join("source"), dir.path().join("a.vmdk"));
    let mut model = noise(2, 9 << 20);
    std::fs::write(&source, &model).unwrap();
    let convert = |kind: &str| {
        let options = format!("subformat={kind}");
        tool("qemu-img", &["convert", "-O", "vmdk", "-o", &options, text(&source), text(&image)]);
    };
    for kind in ["monolithicSparse", "streamOptimized"] {
        convert(kind);
        let Some(device) = device(dir.path(), &image, 20 << 20) else { return };
        let disk = format!("vmdk:{}", device.0);
        let mut guest = Machine::new().disk(&disk, Mode::ReadOnly);
        assert!(guest.everything() == model, "{kind}");
        guest.close();
        // The image would have to grow.
        let error = Image::open_disk(&disk.parse().unwrap(), ImageOptions::default()).unwrap_err();
        assert_eq!(error.code(), "image-only-read", "{error}");
    }
    convert("monolithicFlat");
    let extent = dir.path().join("a-flat.vmdk");
    let Some(device) = device(dir.path(), &extent, 20 << 20) else { return };
    std::fs::remove_file(&extent).unwrap();
    std::os::unix::fs::symlink(&device.0, &extent).unwrap();
    let mut guest = Machine::new().disk(&format!("vmdk:{}", text(&image)), Mode::ReadWrite);
    assert!(guest.everything() == model);
    workload(&mut guest, &mut model, 3, 20, true);
    guest.close();
    tool("blockdev", &["--flushbufs", &device.0]);
    let medium = std::fs::read(dir.path().join("medium")).unwrap();
    assert!(medium[..model.len()] == model);
    assert!(medium[model.len()..].iter().all(|byte| *byte == RUBBISH));
}

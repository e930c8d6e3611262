//! VHD and VMDK images made by `qemu-img`, and overlays over any kind of disk.
#![cfg(feature = "std")]

mod support;

use pvio_blkback::image::{Image, ImageOptions, Spec};
use pvio_ring::proto::blkif::Status;
use pvio_xenbus::handshake::vbd::Mode;
use std::path::Path;
use support::{Deed, Machine, Rng, has, text, tool, workload};

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = Rng(seed);
    (0..len).map(|_| rng.next() as u8).collect()
}

fn converted(format: &str, image: &Path) -> Vec<u8> {
    let raw = image.with_extension("converted");
    tool("qemu-img", &["convert", "-f", format, "-O", "raw", text(image), text(&raw)]);
    std::fs::read(raw).unwrap()
}

#[test]
fn a_vhd_is_read_and_written_as_qemu_does() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for kind in ["dynamic", "fixed"] {
        let (source, image) =
            (dir.path().join("source.img"), dir.path().join(format!("{kind}.vhd")));
        // Data, holes, and an end inside a block.
        let mut model = noise(1, 21 << 20);
        model[3 << 20..9 << 20].fill(0);
        std::fs::write(&source, &model).unwrap();
        let options = format!("subformat={kind},force_size=on");
        tool("qemu-img", &["convert", "-O", "vpc", "-o", &options, text(&source), text(&image)]);
        for seed in 0..2 {
            let mut guest = Machine::new().disk(&format!("vhd:{}", text(&image)), Mode::ReadWrite);
            assert_eq!(guest.session().size(), model.len() as u64);
            assert!(guest.everything() == model, "{kind}");
            workload(&mut guest, &mut model, seed, 30, true);
            assert!(guest.everything() == model, "{kind}");
            guest.close();
            assert!(converted("vpc", &image) == model, "{kind}");
        }
    }
}

#[test]
fn sectors_a_block_does_not_hold_read_as_zeroes() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    // XenServer's tools mark each sector; QEMU marks whole blocks. One of theirs, from QEMU's:
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.vhd");
    tool("qemu-img", &["create", "-f", "vpc", "-o", "force_size=on", text(&image), "4M"]);
    tool("qemu-io", &["-f", "vpc", "-c", "write -P 5 0 2M", text(&image)]);
    let mut bytes = std::fs::read(&image).unwrap();
    let bitmap = bytes.windows(512).position(|w| w.iter().all(|b| *b == 0xff)).unwrap();
    let bitmap = bitmap.next_multiple_of(512);
    bytes[bitmap..bitmap + 512].fill(0);
    bytes[bitmap] = 0x81;
    std::fs::write(&image, bytes).unwrap();
    let mut guest = Machine::new().disk(&format!("vhd:{}", text(&image)), Mode::ReadWrite);
    guest.one(Deed::Write(3, vec![6; 512]));
    let found = guest.one(Deed::Read(0, 16));
    let expected = [5, 0, 0, 6, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(found.chunks(512).map(|s| s[0]).collect::<Vec<_>>(), expected);
    guest.close();
}

#[test]
fn a_flat_vmdk_is_read_and_the_others_are_refused() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (source, image) = (dir.path().join("source.img"), dir.path().join("a.vmdk"));
    let model = noise(2, 5 << 20);
    std::fs::write(&source, &model).unwrap();
    let convert = |kind: &str| {
        let options = format!("subformat={kind}");
        tool("qemu-img", &["convert", "-O", "vmdk", "-o", &options, text(&source), text(&image)]);
    };
    convert("monolithicFlat");
    let mut guest = Machine::new().disk(&format!("vmdk:{}", text(&image)), Mode::ReadOnly);
    assert!(guest.everything() == model);
    guest.close();
    let spec = Spec::file(pvio_blkback::image::Format::Vmdk, &image);
    let open = |read_only| {
        Image::open_disk(&spec, ImageOptions { read_only, direct: false }).unwrap_err().code()
    };
    assert_eq!(open(false), "image-only-read");
    convert("monolithicSparse");
    assert_eq!(open(true), "image-feature");
    // A descriptor that names a file of the host.
    let named = format!(
        "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n\
         createType=\"monolithicFlat\"\nRW 1 FLAT \"{}\" 0\n",
        "/etc/passwd"
    );
    std::fs::write(&image, named).unwrap();
    assert_eq!(open(true), "image-feature");
}

#[test]
fn what_is_discarded_of_a_raw_disk_is_a_hole() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.img");
    let mut model = noise(6, 4 << 20);
    std::fs::write(&image, &model).unwrap();
    let file = std::fs::File::open(&image).unwrap();
    file.sync_all().unwrap();
    let room = || file.metadata().unwrap().blocks() * 512;
    let before = room();
    let mut guest = Machine::new().disk(&format!("raw:{}", text(&image)), Mode::ReadWrite);
    guest.one(Deed::Discard(2048, 4096));
    model[1 << 20..3 << 20].fill(0);
    assert!(guest.everything() == model);
    guest.close();
    assert!(std::fs::read(&image).unwrap() == model);
    let given_back = before - room();
    assert!(given_back >= 2 << 20, "{given_back} bytes are given back");
    // Where that is switched off, nothing is offered, and the image stays as it is.
    std::fs::write(&image, noise(6, 4 << 20)).unwrap();
    let params = format!("raw:[discard=off]{}", text(&image));
    let mut guest = Machine::new().disk(&params, Mode::ReadWrite);
    assert_ne!(guest.all(&[Deed::Discard(2048, 4096)])[0].0, Status::Okay);
    assert!(guest.everything() == noise(6, 4 << 20));
    guest.close();
}

#[test]
fn an_overlay_takes_what_is_written_and_leaves_what_is_below() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let below = noise(3, 6 << 20);
    std::fs::write(path("a.img"), &below).unwrap();
    for (format, name) in [("qcow2", "a.qcow2"), ("vpc", "a.vhd"), ("vmdk", "a.vmdk")] {
        let options = match format {
            "vmdk" => "subformat=monolithicFlat",
            "vpc" => "force_size=on",
            _ => "compat=1.1",
        };
        let (from, to) = (path("a.img"), path(name));
        tool("qemu-img", &["convert", "-O", format, "-o", options, text(&from), text(&to)]);
    }
    for kind in ["raw", "qcow2", "vhd", "vmdk"] {
        let name = if kind == "raw" { "a.img".into() } else { format!("a.{kind}") };
        let params = format!("overlay:{kind}:{}", text(&path(&name)));
        let before = std::fs::read(path(&name)).unwrap();
        let mut model = below.clone();
        let mut guest = Machine::new().disk(&params, Mode::ReadWrite);
        workload(&mut guest, &mut model, 4, 40, true);
        assert!(guest.everything() == model, "{kind}");
        guest.close();
        assert!(std::fs::read(path(&name)).unwrap() == before, "{kind}");
        // And the next begins anew.
        let mut guest = Machine::new().disk(&params, Mode::ReadWrite);
        assert!(guest.everything() == below, "{kind}");
        guest.close();
    }
    let mut guest = Machine::new().disk("overlay:ram:2M", Mode::ReadWrite);
    workload(&mut guest, &mut vec![0; 2 << 20], 5, 20, true);
    guest.close();
    let params = format!("overlay:raw:{}", text(&path("a.img")));
    let mut guest = Machine::new().disk(&params, Mode::ReadOnly);
    assert_eq!(guest.all(&[Deed::Write(0, vec![1; 512])])[0].0, Status::Error);
    guest.close();
}

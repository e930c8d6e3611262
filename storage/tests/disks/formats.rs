//! VHD and VMDK images created by `qemu-img`, and overlays over any kind of disk.

use crate::support::{Deed, Guest, Machine, Rng, has, text, tool, workload};
use pvio_ring::proto::blkif::Status;
use pvio_storage::image::{Image, ImageOptions, Spec};
use pvio_xenbus::handshake::vbd::Mode;
use std::path::Path;

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
fn vhd_written_by_guest_matches_qemu_img_conversion() {
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
fn vhd_sectors_unset_in_block_bitmap_read_as_zeroes() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    // XenServer's tools mark each sector in the bitmap; QEMU marks whole blocks. This converts an
    // image of QEMU's to one like XenServer's.
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

/// Converts a raw image to VMDK with `qemu-img`.
fn vmdk(kind: &str, source: &Path, image: &Path) {
    let options = format!("subformat={kind}");
    tool("qemu-img", &["convert", "-O", "vmdk", "-o", &options, text(source), text(image)]);
}

#[test]
fn vmdk_written_by_guest_matches_qemu_img_conversion() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    for kind in ["monolithicFlat", "twoGbMaxExtentFlat", "monolithicSparse", "twoGbMaxExtentSparse"]
    {
        let dir = tempfile::tempdir().unwrap();
        let (source, image) = (dir.path().join("source.img"), dir.path().join("a.vmdk"));
        // Data, holes, and an end inside a grain.
        let mut model = noise(2, (21 << 20) + 512 * 9);
        model[3 << 20..9 << 20].fill(0);
        std::fs::write(&source, &model).unwrap();
        vmdk(kind, &source, &image);
        let id = || {
            let text = String::from_utf8_lossy(&std::fs::read(&image).unwrap()).into_owned();
            let at = text.find("\nCID=").unwrap();
            text[at..at + 13].to_owned()
        };
        for seed in 0..2 {
            let before = id();
            let mut guest = Machine::new().disk(&format!("vmdk:{}", text(&image)), Mode::ReadWrite);
            assert_eq!(guest.session().size(), model.len() as u64);
            assert!(guest.everything() == model, "{kind}");
            assert_eq!(id(), before, "content id is unchanged by reads");
            workload(&mut guest, &mut model, seed, 40, true);
            assert!(guest.everything() == model, "{kind}");
            guest.close();
            assert_ne!(id(), before, "{kind}");
            assert!(converted("vmdk", &image) == model, "{kind}");
            if kind.ends_with("Sparse") {
                let check = tool("qemu-img", &["check", "-f", "vmdk", text(&image)]);
                assert!(String::from_utf8_lossy(&check.stdout).contains("No errors"), "{kind}");
            }
        }
        let mut guest = Machine::new().disk(&format!("vmdk:{}", text(&image)), Mode::ReadOnly);
        assert!(guest.everything() == model, "{kind}");
        guest.close();
    }
}

#[test]
fn vmdk_with_several_extents_is_written_across_their_boundaries() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for kind in ["twoGbMaxExtentSparse", "twoGbMaxExtentFlat"] {
        let image = dir.path().join(format!("{kind}.vmdk"));
        let options = format!("subformat={kind}");
        tool("qemu-img", &["create", "-f", "vmdk", "-o", &options, text(&image), "5G"]);
        let mut guest = Machine::new().disk(&format!("vmdk:{}", text(&image)), Mode::ReadWrite);
        assert_eq!(guest.session().size(), 5 << 30);
        // Across each extent boundary, and at both ends.
        let (data, sectors) = (noise(8, 8192), 5 << 21);
        let places = [0, (2 << 21) - 3, (4 << 21) - 8, sectors - 16];
        for place in places {
            guest.one(Deed::Write(place, data.clone()));
        }
        guest.one(Deed::Flush);
        let holds = |guest: &mut Guest| {
            places.iter().all(|place| guest.one(Deed::Read(*place, 16)) == data)
        };
        assert!(holds(&mut guest));
        guest.close();
        for place in places {
            // QEMU reads the same data in each place.
            let out = dir.path().join("part");
            let (skip, from) = (format!("skip={place}"), format!("if={}", text(&image)));
            let to = format!("of={}", text(&out));
            // `count` includes the skipped blocks.
            let count = format!("count={}", place + 16);
            let args = ["dd", "-f", "vmdk", "-O", "raw", "bs=512", &skip, &count, &from, &to];
            tool("qemu-img", &args);
            assert!(std::fs::read(&out).unwrap() == data, "{kind} {place}");
        }
        let mut guest = Machine::new().disk(&format!("vmdk:{}", text(&image)), Mode::ReadOnly);
        assert!(holds(&mut guest));
        guest.close();
    }
}

#[test]
fn stream_optimized_vmdk_is_read_and_not_writable() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (source, image) = (dir.path().join("source.img"), dir.path().join("a.vmdk"));
    let mut model = noise(9, (9 << 20) + 512 * 5);
    model[1 << 20..2 << 20].fill(7);
    model[3 << 20..5 << 20].fill(0);
    std::fs::write(&source, &model).unwrap();
    vmdk("streamOptimized", &source, &image);
    let params = format!("vmdk:{}", text(&image));
    let read = |model: &[u8]| {
        let mut guest = Machine::new().disk(&params, Mode::ReadOnly);
        assert!(guest.everything() == model);
        for sector in [0, 127, 2047, 6143] {
            let there = &model[sector as usize * 512..][..4096];
            assert!(guest.one(Deed::Read(sector, 8)) == there);
        }
        guest.close();
    };
    read(&model);
    // VMware's own tools write such images: only the last header has the offset of the directory.
    let mut bytes = std::fs::read(&image).unwrap();
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    let header = bytes[..512].to_vec();
    let marker = |kind: u8| {
        let mut marker = vec![0; 512];
        (marker[0], marker[12]) = (u8::from(kind == 3), kind);
        marker
    };
    bytes[56..64].fill(0xff);
    bytes.extend([marker(3), header, marker(0)].concat());
    std::fs::write(&image, &bytes).unwrap();
    read(&model);
    let spec = Spec::file(pvio_storage::image::Format::Vmdk, &image);
    let error = Image::open_disk(&spec, ImageOptions::default()).unwrap_err();
    assert_eq!(error.code(), "image-only-read");
}

#[test]
fn vmdk_with_zeroed_grains_and_missing_tables_is_read_and_written() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.vmdk");
    let options = "subformat=monolithicSparse,zeroed_grain=on";
    tool("qemu-img", &["create", "-f", "vmdk", "-o", options, text(&image), "128M"]);
    let data = "write -P 5 0 256k";
    tool("qemu-io", &["-f", "vmdk", "-c", data, "-c", "write -z 64k 64k", text(&image)]);
    // The last table of each directory does not exist, as with some programs.
    let mut bytes = std::fs::read(&image).unwrap();
    let field = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    let directories = [field(48) * 512, field(56) * 512];
    for directory in directories {
        bytes[directory + 12..directory + 16].fill(0);
    }
    std::fs::write(&image, bytes).unwrap();
    let mut model = vec![0; 128 << 20];
    model[..256 << 10].fill(5);
    model[64 << 10..128 << 10].fill(0);
    let params = format!("vmdk:{}", text(&image));
    let mut guest = Machine::new().disk(&params, Mode::ReadWrite);
    assert!(guest.everything() == model);
    for (sector, byte) in [(130, 6), (200_000, 7), (262_143, 8)] {
        guest.one(Deed::Write(sector, vec![byte; 512]));
        model[sector as usize * 512..][..512].fill(byte);
    }
    assert!(guest.everything() == model);
    guest.close();
    assert!(converted("vmdk", &image) == model);
}

#[test]
fn malformed_vmdk_is_rejected_with_error_code() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (source, image) = (dir.path().join("source.img"), dir.path().join("a.vmdk"));
    std::fs::write(&source, noise(2, 5 << 20)).unwrap();
    let spec = Spec::file(pvio_storage::image::Format::Vmdk, &image);
    let open = |read_only| {
        Image::open_disk(&spec, ImageOptions { read_only, direct: false }).unwrap_err().code()
    };
    // A descriptor that names a file of the host.
    for (kind, name) in [("FLAT", "/etc/passwd"), ("SPARSE", "../a"), ("FLAT", "..")] {
        let named = format!(
            "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n\
             createType=\"custom\"\nRW 1 {kind} \"{name}\" 0\n",
        );
        std::fs::write(&image, named).unwrap();
        assert_eq!(open(true), "image-outside-root", "{name}");
    }
    vmdk("monolithicSparse", &source, &image);
    let whole = std::fs::read(&image).unwrap();
    let changed = |at: usize, with: &[u8]| {
        let mut bytes = whole.clone();
        bytes[at..at + with.len()].copy_from_slice(with);
        std::fs::write(&image, bytes).unwrap();
        [open(true), open(false)]
    };
    let field = |at: usize| u64::from_le_bytes(whole[at..at + 8].try_into().unwrap()) as usize;
    let directory = field(56) * 512;
    let table = u32::from_le_bytes(whole[directory..directory + 4].try_into().unwrap()) as usize;
    for (what, at, with, code) in [
        ("version", 4, &[4u8][..], "image-feature"),
        ("size", 12, &[0xff; 8], "image-corrupt"),
        ("no size", 12, &[0; 8], "image-corrupt"),
        ("grain", 20, &[3], "image-corrupt"),
        ("no grain", 20, &[0], "image-corrupt"),
        ("large grain", 23, &[0xff; 5], "image-corrupt"),
        ("descriptor", 36, &[0xff; 8], "image-corrupt"),
        ("entries", 44, &[0; 4], "image-corrupt"),
        ("many entries", 44, &[0xff; 4], "image-corrupt"),
        ("directory", 56, &[0xfe; 8], "image-truncated"),
        ("directory behind the end", 56, &[0, 0, 0xff], "image-truncated"),
        ("text", 73, b"\n \n\n", "image-corrupt"),
        ("directory in the header", 56, &[0; 8], "image-corrupt"),
        ("table behind the end", directory, &[0xff; 4], "image-truncated"),
        ("grain behind the end", table * 512, &[0xff; 4], "image-truncated"),
        ("two grains in one place", table * 512, &whole[table * 512 + 4..][..4], "image-corrupt"),
        ("grain in its table", table * 512, &(table as u32).to_le_bytes(), "image-corrupt"),
    ] {
        assert_eq!(changed(at, with), [code; 2], "{what}");
    }
    // A parent.
    let text_at = whole.windows(18).position(|w| w == b"parentCID=ffffffff").unwrap();
    assert_eq!(changed(text_at + 10, b"12345678"), ["image-feature"; 2]);
    // One of several extents, on its own.
    assert_eq!(changed(28, &[0; 16]), ["image-feature"; 2]);
}

#[test]
fn discard_on_raw_image_punches_hole() {
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
    assert!(given_back >= 2 << 20, "{given_back} bytes were freed");
    // With discard switched off, it is not advertised, and the image does not change.
    std::fs::write(&image, noise(6, 4 << 20)).unwrap();
    let params = format!("raw:[discard=off]{}", text(&image));
    let mut guest = Machine::new().disk(&params, Mode::ReadWrite);
    assert_ne!(guest.all(&[Deed::Discard(2048, 4096)])[0].0, Status::Okay);
    assert!(guest.everything() == noise(6, 4 << 20));
    guest.close();
}

#[test]
fn overlay_keeps_writes_and_leaves_lower_image_unchanged() {
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
        // The next session starts with the original data.
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

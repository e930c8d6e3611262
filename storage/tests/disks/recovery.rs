//! Images that were not closed by their last writer, or that lost a part without data.

use crate::support::{Machine, Rng, has, text, tool, workload};
use pvio_storage::image::{Format, Image, ImageError, ImageOptions, Spec};
use pvio_xenbus::handshake::vbd::Mode;
use std::path::Path;
use std::process::Command;

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = Rng(seed);
    (0..len).map(|_| rng.next() as u8).collect()
}

fn open(format: Format, path: &Path, read_only: bool) -> Result<Image, ImageError> {
    Image::open_disk(&Spec::file(format, path), ImageOptions { read_only, direct: false })
}

/// Returns the disk as a guest reads it with read-only access.
fn read(disk: &str) -> Vec<u8> {
    let mut guest = Machine::new().disk(disk, Mode::ReadOnly);
    let found = guest.everything();
    guest.close();
    found
}

/// Returns the disk in an image as QEMU reads it.
fn converted(format: &str, image: &Path) -> Vec<u8> {
    let raw = image.with_extension("converted");
    tool("qemu-img", &["convert", "-f", format, "-O", "raw", text(image), text(&raw)]);
    std::fs::read(raw).unwrap()
}

#[test]
fn dynamic_vhd_without_valid_footer_is_served_by_its_copy() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (source, image) = (dir.path().join("source"), dir.path().join("a.vhd"));
    let whole = noise(1, 9 << 20);
    std::fs::write(&source, &whole).unwrap();
    let options = "subformat=dynamic,force_size=on";
    tool("qemu-img", &["convert", "-O", "vpc", "-o", options, text(&source), text(&image)]);
    let sound = std::fs::read(&image).unwrap();
    let footer = sound.len() - 512;
    let disk = format!("vhd:{}", text(&image));
    type Damage = fn(&mut Vec<u8>, usize);
    let damages: [(&str, Damage); 5] = [
        ("missing", |bytes, footer| bytes.truncate(footer)),
        ("cut", |bytes, footer| bytes.truncate(footer + 100)),
        ("zeroed", |bytes, footer| bytes[footer..].fill(0)),
        ("flipped", |bytes, footer| bytes[footer + 50] ^= 1),
        ("behind", |bytes, _| bytes.extend([0x5a; 4097])),
    ];
    for (name, damage) in damages {
        let mut bytes = sound.clone();
        damage(&mut bytes, footer);
        std::fs::write(&image, &bytes).unwrap();
        assert!(read(&disk) == whole, "{name}");
        assert!(
            std::fs::read(&image).unwrap() == bytes,
            "{name}: image changed although it was only read"
        );
        let mut model = whole.clone();
        let mut guest = Machine::new().disk(&disk, Mode::ReadWrite);
        workload(&mut guest, &mut model, 2, 20, true);
        assert!(guest.everything() == model, "{name}");
        guest.close();
        let bytes = std::fs::read(&image).unwrap();
        assert!(bytes[bytes.len() - 512..] == sound[footer..], "{name}: footer was not rewritten");
        assert!(converted("vpc", &image) == model, "{name}");
        assert!(read(&disk) == model, "{name}");
    }
    // A missing block is detected, and so is a missing footer without a copy.
    std::fs::write(&image, &sound[..footer - 512]).unwrap();
    for read_only in [true, false] {
        let error = open(Format::Vhd, &image, read_only).unwrap_err();
        assert_eq!(error.code(), "image-truncated", "{error}");
    }
    let mut bytes = sound;
    bytes[footer + 50] ^= 1;
    bytes[50] ^= 1;
    std::fs::write(&image, &bytes).unwrap();
    for read_only in [true, false] {
        assert_eq!(open(Format::Vhd, &image, read_only).unwrap_err().code(), "image-corrupt");
    }
}

/// Creates a qcow2 image with some data with `qemu-img`.
fn qcow2(dir: &Path, options: &str) -> (std::path::PathBuf, Vec<u8>) {
    let (source, image) = (dir.join("source"), dir.join("a.qcow2"));
    let mut whole = noise(3, 5 << 20);
    whole[1 << 20..2 << 20].fill(0);
    std::fs::write(&source, &whole).unwrap();
    tool("qemu-img", &["convert", "-O", "qcow2", "-o", options, text(&source), text(&image)]);
    (image, whole)
}

fn field(bytes: &[u8], at: usize) -> usize {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize
}

#[test]
fn qcow2_with_leaked_clusters_beyond_its_end_is_served() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for options in ["compat=1.1", "compat=0.10", "cluster_size=4k"] {
        let (image, mut model) = qcow2(dir.path(), options);
        let mut bytes = std::fs::read(&image).unwrap();
        // Clusters that were allocated and never used.
        let block = field(&bytes, field(&bytes, 48));
        let cluster = 1usize << u32::from_be_bytes(bytes[20..24].try_into().unwrap());
        let first = bytes.len().div_ceil(cluster);
        for leaked in first..first + 3 {
            bytes[block + leaked * 2 + 1] = 1;
        }
        std::fs::write(&image, &bytes).unwrap();
        let check = Command::new("qemu-img").args(["check", text(&image)]).output().unwrap();
        let found = check.status.code();
        assert!(
            matches!(found, Some(0 | 3)),
            "{options}: qemu-img check found more than leaks: {check:?}"
        );
        let disk = format!("qcow2:{}", text(&image));
        assert!(read(&disk) == model, "{options}");
        for seed in 0..2 {
            let mut guest = Machine::new().disk(&disk, Mode::ReadWrite);
            assert!(guest.everything() == model, "{options}");
            workload(&mut guest, &mut model, seed, 20, true);
            guest.close();
            let check = Command::new("qemu-img").args(["check", text(&image)]).output().unwrap();
            assert!(matches!(check.status.code(), Some(0 | 3)), "{options}: {check:?}");
            assert!(converted("qcow2", &image) == model, "{options}");
        }
        // A truncated image refers to missing clusters.
        let bytes = std::fs::read(&image).unwrap();
        std::fs::write(&image, &bytes[..bytes.len() / 2]).unwrap();
        for read_only in [true, false] {
            let error = open(Format::Qcow2, &image, read_only).unwrap_err();
            let code = error.code();
            assert!(matches!(code, "image-truncated" | "image-corrupt"), "{options}: {error}");
        }
    }
}

#[test]
fn dirty_qcow2_is_read_without_repair() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    for options in ["lazy_refcounts=on", "lazy_refcounts=on,cluster_size=4k"] {
        let (image, model) = qcow2(dir.path(), options);
        tool("qemu-img", &["snapshot", "-c", "s", text(&image)]);
        let mut bytes = std::fs::read(&image).unwrap();
        // Marked as not closed; no count is correct.
        let block = field(&bytes, field(&bytes, 48));
        bytes[block..block + 2048].fill(0);
        bytes[79] = 1;
        std::fs::write(&image, &bytes).unwrap();
        assert!(read(&format!("qcow2:{}", text(&image))) == model, "{options}");
        assert!(read(&format!("qcow2@s:{}", text(&image))) == model, "{options}");
        let mut above = model.clone();
        let disk = format!("overlay:qcow2:{}", text(&image));
        let mut guest = Machine::new().disk(&disk, Mode::ReadWrite);
        workload(&mut guest, &mut above, 4, 20, true);
        assert!(guest.everything() == above, "{options}");
        guest.close();
        // An image that is written has it as its backing file.
        let top = path("top.qcow2");
        let args = ["create", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "a.qcow2"];
        tool("qemu-img", &[&args[..], &[text(&top), "5M"]].concat());
        let mut above = model.clone();
        let disk = format!("qcow2:{}", text(&top));
        let mut guest = Machine::new().disk(&disk, Mode::ReadWrite);
        workload(&mut guest, &mut above, 5, 20, true);
        assert!(guest.everything() == above, "{options}");
        guest.close();
        assert!(
            std::fs::read(&image).unwrap() == bytes,
            "{options}: image changed although it was only read"
        );
        // An image marked as corrupt is neither served nor repaired.
        bytes[79] = 3;
        std::fs::write(&image, &bytes).unwrap();
        for read_only in [true, false] {
            let error = open(Format::Qcow2, &image, read_only).unwrap_err();
            assert_eq!(error.code(), "image-corrupt", "{error}");
        }
        assert!(std::fs::read(&image).unwrap() == bytes, "{options}");
    }
}

#[test]
fn vmdk_with_non_utf8_descriptor_is_served() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    // The extent's name in the descriptor, and possible names in the file system.
    let (latin, utf8) = (b"caf\xe9-flat.vmdk".as_slice(), "caf\u{e9}-flat.vmdk".as_bytes());
    for (encoding, descriptor, extent) in [
        ("windows-1252", "caf\u{e9}.vmdk".as_bytes(), utf8),
        ("windows-1252", b"caf\xe9.vmdk".as_slice(), latin),
        ("UTF-8", b"caf\xe9.vmdk", latin),
        ("no-such-encoding", b"caf\xe9.vmdk", latin),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut model = noise(6, 3 << 20);
        std::fs::write(dir.path().join(OsStr::from_bytes(extent)), &model).unwrap();
        let mut text = b"# Disk DescriptorFile\nversion=1\n# \xff\xfe \xe9\n".to_vec();
        text.extend(format!("encoding=\"{encoding}\"\n").bytes());
        text.extend(b"CID=12345678\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n");
        text.extend(b"RW 6144 FLAT \"");
        text.extend(latin);
        text.extend(b"\" 0\n");
        let path = dir.path().join(OsStr::from_bytes(descriptor));
        std::fs::write(&path, &text).unwrap();
        // The toolstack names it in UTF-8.
        let link = dir.path().join("link.vmdk");
        let named = if std::str::from_utf8(descriptor).is_ok() { &path } else { &link };
        let _ = std::os::unix::fs::symlink(&path, &link);
        for read_only in [true, false] {
            open(Format::Vmdk, &path, read_only).unwrap_or_else(|e| panic!("{encoding}: {e}"));
        }
        assert!(read(&format!("vmdk:{}", named.to_str().unwrap())) == model, "{encoding}");
        if named == &path {
            let disk = format!("vmdk:{}", named.to_str().unwrap());
            let mut guest = Machine::new().disk(&disk, Mode::ReadWrite);
            workload(&mut guest, &mut model, 7, 10, false);
            guest.close();
            let found = std::fs::read(dir.path().join(OsStr::from_bytes(extent))).unwrap();
            assert!(found == model, "{encoding}");
            // The content id was changed in place, and nothing else.
            let after = std::fs::read(&path).unwrap();
            let at = text.windows(5).position(|w| w == b"\nCID=").unwrap() + 5;
            assert!(after[at..at + 8] != text[at..at + 8], "{encoding}");
            text[at..at + 8].copy_from_slice(&after[at..at + 8]);
            assert!(after == text, "{encoding}");
        }
    }
}

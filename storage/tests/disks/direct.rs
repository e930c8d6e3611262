//! Disks with `O_DIRECT` on storage with sectors of 4096 bytes.

use crate::device::Loop;
use crate::support::{Deed, Guest, Machine, Rng, has, text, tool, workload};
use pvio_ring::error::Remedy;
use pvio_storage::image::{Disk, Image, ImageError};
use pvio_xenbus::handshake::vbd::Mode;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A mounted ext4 file system on such storage.
struct Mounted {
    at: PathBuf,
    _device: Loop,
}

impl Mounted {
    /// Returns `None`, with a message, if it cannot be created.
    fn new(dir: &Path) -> Option<Self> {
        if !has("mkfs.ext4", "e2fsprogs") {
            return None;
        }
        let (medium, at) = (dir.join("medium"), dir.join("mounted"));
        std::fs::File::create(&medium).unwrap().set_len(128 << 20).unwrap();
        let device = Loop::with_sectors(4096, &medium)?;
        tool("mkfs.ext4", &["-q", "-b", "4096", &device.0]);
        std::fs::create_dir(&at).unwrap();
        let mounted = Command::new("mount").args([&device.0, text(&at)]).output().unwrap();
        if !mounted.status.success() {
            let why = String::from_utf8_lossy(&mounted.stderr);
            println!("SKIPPED: ext4 cannot be mounted ({}); run as root", why.trim());
            return None;
        }
        Some(Self { at, _device: device })
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.at).status();
    }
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = Rng(seed);
    (0..len).map(|_| rng.next() as u8).collect()
}

fn open(disk: &str) -> Result<Image, ImageError> {
    Image::open_as(&disk.parse::<Disk>().unwrap())
}

/// Reads the whole disk and writes sectors of 4096 bytes, including the last one.
fn use_it(guest: &mut Guest, model: &mut [u8]) {
    assert!(guest.everything() == model);
    let last = model.len() as u64 / 4096 - 1;
    for (n, number) in [0, 5, 6, last - 1, last].into_iter().enumerate() {
        let data = noise(n as u64 + 10, 4096);
        model[number as usize * 4096..][..4096].copy_from_slice(&data);
        guest.one(Deed::Write(number * 8, data));
    }
    guest.one(Deed::Flush);
    assert!(guest.everything() == model);
}

#[test]
fn device_with_4096_byte_sectors_is_served_to_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let medium = dir.path().join("medium");
    let mut model = noise(1, (4 << 20) + 4096);
    std::fs::write(&medium, &model).unwrap();
    let Some(device) = Loop::with_sectors(4096, &medium) else { return };
    let geometry = open(&format!("[direct]raw:{}", device.0)).unwrap().geometry();
    assert_eq!((geometry.sector_size, geometry.physical_sector_size), (4096, 4096));
    let mut guest = Machine::new().disk(&format!("raw:[direct]{}", device.0), Mode::ReadWrite);
    use_it(&mut guest, &mut model);
    guest.close();
    tool("blockdev", &["--flushbufs", &device.0]);
    assert!(std::fs::read(&medium).unwrap() == model);
    let error = open(&format!("[direct,sector=512]raw:{}", device.0)).unwrap_err();
    assert_eq!(error.code(), "image-sectors", "{error}");
}

#[test]
fn file_on_4096_byte_sectors_is_served_to_its_end_or_rejected_with_advice() {
    let dir = tempfile::tempdir().unwrap();
    let Some(mounted) = Mounted::new(dir.path()) else { return };
    let path = mounted.at.join("a.img");
    let mut model = noise(2, (4 << 20) + 4096);
    std::fs::write(&path, &model).unwrap();
    let named = format!("raw:{}", text(&path));
    let geometry = |options: &str| open(&format!("[{options}]{named}")).unwrap().geometry();
    // With the page cache, sectors of 512 bytes are possible.
    assert_eq!(geometry("buffered").sector_size, 512);
    assert_eq!(geometry("direct").sector_size, 4096);
    let mut guest = Machine::new().disk(&format!("raw:[direct]{}", text(&path)), Mode::ReadWrite);
    use_it(&mut guest, &mut model);
    guest.close();
    assert!(std::fs::read(&path).unwrap() == model);
    let error = open(&format!("[direct,sector=512]{named}")).unwrap_err();
    assert_eq!(error.code(), "image-sectors", "{error}");
    // The disk ends within a sector of 4096 bytes.
    model.extend(noise(3, 512));
    std::fs::write(&path, &model).unwrap();
    let error = open(&format!("[direct]{named}")).unwrap_err();
    assert_eq!(error.code(), "image-direct-size", "{error}");
    assert!(error.remedy().unwrap_or_default().contains("direct out"), "{error}");
    let mut guest = Machine::new().disk(&format!("raw:[buffered]{}", text(&path)), Mode::ReadWrite);
    assert!(guest.everything() == model);
    guest.close();
}

#[test]
fn image_of_every_format_on_4096_byte_sectors_is_served_with_o_direct() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let Some(mounted) = Mounted::new(dir.path()) else { return };
    for (name, word, options) in [
        ("qcow2", "qcow2", "compat=1.1"),
        ("qcow2", "qcow2", "cluster_size=512"),
        ("vhd", "vpc", "subformat=dynamic,force_size=on"),
        ("vhd", "vpc", "subformat=fixed,force_size=on"),
        ("vmdk", "vmdk", "subformat=monolithicFlat"),
        ("vmdk", "vmdk", "subformat=monolithicSparse"),
    ] {
        let (source, image) = (mounted.at.join("source"), mounted.at.join(format!("a.{name}")));
        let mut model = noise(4, (5 << 20) + 4096);
        std::fs::write(&source, &model).unwrap();
        tool("qemu-img", &["convert", "-O", word, "-o", options, text(&source), text(&image)]);
        let disk = format!("{name}:[direct]{}", text(&image));
        let mut guest = Machine::new().disk(&disk, Mode::ReadWrite);
        use_it(&mut guest, &mut model);
        guest.close();
        // Its data can be read as a whole.
        let image_of = open(&format!("[direct]{name}:{}", text(&image))).unwrap();
        assert_eq!(image_of.first_data().unwrap(), Some(0), "{options}");
        let raw = mounted.at.join("converted");
        tool("qemu-img", &["convert", "-f", word, "-O", "raw", text(&image), text(&raw)]);
        assert!(std::fs::read(raw).unwrap() == model, "{options}");
    }
}

#[test]
fn image_on_device_with_4096_byte_sectors_is_served_in_512_byte_sectors() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    for (name, word, options) in [
        ("qcow2", "qcow2", "compat=1.1"),
        ("qcow2", "qcow2", "cluster_size=512"),
        ("vhd", "vpc", "subformat=dynamic,force_size=on"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (source, image) = (dir.path().join("source"), dir.path().join("image"));
        let mut model = noise(5, 9 << 20);
        std::fs::write(&source, &model).unwrap();
        tool("qemu-img", &["convert", "-O", word, "-o", options, text(&source), text(&image)]);
        std::fs::File::options().write(true).open(&image).unwrap().set_len(24 << 20).unwrap();
        let Some(device) = Loop::with_sectors(4096, &image) else { return };
        for (seed, how) in [(6, "buffered"), (7, "direct")] {
            let disk = format!("{name}:[{how}]{}", device.0);
            let mut guest = Machine::new().disk(&disk, Mode::ReadWrite);
            workload(&mut guest, &mut model, seed, 20, true);
            assert!(guest.everything() == model, "{options} {how}");
            guest.close();
            tool("blockdev", &["--flushbufs", &device.0]);
            let raw = dir.path().join("converted");
            tool("qemu-img", &["convert", "-f", word, "-O", "raw", &device.0, text(&raw)]);
            assert!(std::fs::read(raw).unwrap() == model, "{options} {how}");
        }
    }
}

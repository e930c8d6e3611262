//! Disks on block devices: their geometry, and discards by the device.

use crate::support::{Deed, Machine, has, text, tool, workload};
use pvio_storage::image::{Image, ImageOptions, Spec};
use pvio_xenbus::handshake::vbd::Mode;
use rustix::fs::{SeekFrom, seek};
use std::fs::{File, read_to_string};
use std::path::Path;
use std::process::Command;

const BYTES: usize = 16 << 20;

/// A loop device over a file; detached when it is dropped.
pub struct Loop(pub String);

impl Loop {
    /// Returns `None`, with a message, if loop devices are not available.
    pub fn over(file: &Path) -> Option<Self> {
        Self::with_sectors(512, file)
    }

    /// Creates a loop device with logical sectors of `bytes` bytes.
    pub fn with_sectors(bytes: u32, file: &Path) -> Option<Self> {
        if !has("losetup", "mount") {
            return None;
        }
        let size = bytes.to_string();
        let args = ["--sector-size", &size, "--find", "--show", text(file)];
        let made = Command::new("losetup").args(args).output().unwrap();
        if !made.status.success() {
            let why = String::from_utf8_lossy(&made.stderr);
            println!(
                "SKIPPED: no loop device ({}); run as root, with /dev/loop-control",
                why.trim()
            );
            return None;
        }
        Some(Self(String::from_utf8(made.stdout).unwrap().trim().to_owned()))
    }

    fn says(&self, what: &str) -> u32 {
        let name = self.0.trim_start_matches("/dev/");
        read_to_string(format!("/sys/block/{name}/{what}")).unwrap().trim().parse().unwrap()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn discard_on_loop_device_punches_holes_in_its_file() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let file = dir.path().join("a.img");
    std::fs::write(&file, vec![7; BYTES]).unwrap();
    let Some(device) = Loop::over(&file) else { return };

    let image = Image::open_disk(&device.0.parse::<Spec>().unwrap(), ImageOptions::default());
    let offered = image.unwrap().geometry().discard.expect("loop device supports discard");
    assert_eq!(offered.granularity, device.says("queue/discard_granularity").max(512));
    assert_eq!(offered.alignment, device.says("discard_alignment"));
    assert!(!offered.secure, "secure discard is not advertised for a file");

    let mut guest = Machine::new().disk(&format!("raw:{}", device.0), Mode::ReadWrite);
    guest.one(Deed::Discard(0, 4096));
    guest.one(Deed::Discard(8192, 8192));
    let mut model = vec![7; BYTES];
    model[..2 << 20].fill(0);
    model[4 << 20..8 << 20].fill(0);
    assert!(guest.everything() == model);
    // The first data and its end.
    let held = File::open(&file).unwrap();
    assert_eq!(seek(&held, SeekFrom::Data(0)), Ok(2 << 20));
    assert_eq!(seek(&held, SeekFrom::Hole(2 << 20)), Ok(4 << 20));
    assert_eq!(seek(&held, SeekFrom::Data(4 << 20)), Ok(8 << 20));
    // Discards among all other operations, by the discard threads and io_uring.
    workload(&mut guest, &mut model, 5, 60, true);
    assert!(guest.everything() == model);
    guest.close();
    tool("blockdev", &["--flushbufs", &device.0]);
    assert!(std::fs::read(&file).unwrap() == model, "file contents differ");
}

/// A read-only device has no discard, and its driver is not queried.
#[test]
fn read_only_device_does_not_advertise_discard() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.img");
    std::fs::write(&file, vec![7; 1 << 20]).unwrap();
    let Some(device) = Loop::over(&file) else { return };
    let spec: Spec = device.0.parse().unwrap();
    let image = Image::open_disk(&spec, ImageOptions { read_only: true, direct: false }).unwrap();
    assert_eq!(image.geometry().discard, None);
}

//! Disks that are resized, that free space, that are booted from.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::store::make_qcow2;
use super::{BOTH, Guests, PVIO, Scenario};
use crate::dom0::backend::Backend;
use crate::dom0::disk::{Disk, Medium};
use crate::dom0::guest::{Guest, Kind, Programs, Spec};
use crate::dom0::lab::{LONG, Lab, SHORT};
use crate::{pattern, sys};

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "disk-resize",
        proves: "an image that is enlarged and shrunk during I/O changes its size in the guest \
                 immediately",
        backends: PVIO,
        kinds: BOTH,
        guests: Guests::Own,
        run: resize,
    },
    Scenario {
        name: "disk-trim",
        proves: "fstrim in the guest frees space of a raw file and a qcow2 image, and qcow2 stays \
                 consistent",
        backends: PVIO,
        kinds: BOTH,
        guests: Guests::Own,
        run: trim,
    },
    Scenario {
        name: "boot-grub",
        proves: "GRUB reads kernel and ramdisk from the disk and hands the disk over to Linux",
        backends: PVIO,
        kinds: BOTH,
        guests: Guests::Own,
        run: boot,
    },
];

fn resize(lab: &mut Lab) -> Result<()> {
    let before = lab.settled()?;
    let disk = Disk::new(16, Backend::Pvio, Medium::File)?;
    let mut spec = Spec::new(lab.kind, lab.backend);
    spec.disks = vec![Disk::by_pvio("xvda", "rw", &disk.image.display().to_string())];
    let mut guest = Guest::start(&spec)?;
    guest.ask("disk-wait", json!("xvda"), SHORT)?;
    let image = fs::File::options().write(true).open(&disk.image)?;
    for mib in [24_u64, 40, 8] {
        let pattern = |write: bool| json!({ "name": "xvda", "seed": 7, "mib": 8, "write": write });
        guest.ask("disk-verify", pattern(true), LONG)?;
        image.set_len(mib << 20)?;
        guest.ask("disk-resized", json!(["xvda", mib << 11]), SHORT)?;
        guest.ask("disk-verify", pattern(false), LONG)?;
        // The added part must be zeros, whatever it contained before the disk was shrunk.
        guest.ask("disk-blank", json!({ "name": "xvda", "mib": 8 }), LONG)?;
        let order = json!({ "name": "xvda", "seed": mib, "requests": 60, "mib": mib });
        let sum = guest.ask("disk-scribble", order, LONG)?;
        ensure!(
            sum == disk.sum(mib)?,
            "checksum of the image of {mib} MiB differs from the guest's"
        );
        guest.ask("disk-blank", json!({ "name": "xvda", "mib": mib }), LONG)?;
    }
    lab.watched(guest, |guest| guest.power_off())?;
    lab.nothing_left(&before)
}

const MIB: u64 = 32;

/// Returns the MiB that a file occupies.
fn kept(path: &Path) -> Result<u64> {
    Ok(fs::metadata(path)?.blocks() / 2048)
}

fn trim(lab: &mut Lab) -> Result<()> {
    let before = lab.settled()?;
    let raw = Disk::new(MIB, Backend::Pvio, Medium::File)?;
    let mut bytes = vec![0; usize::try_from(MIB << 20)?];
    pattern::fill(&mut bytes, 3, 0);
    fs::write(&raw.image, &bytes)?;
    let qcow2 = Path::new("/tmp/trim.qcow2");
    make_qcow2(qcow2, MIB)?;
    let (from, to) = (raw.image.display().to_string(), qcow2.display().to_string());
    sys::succeed(&["qemu-img", "convert", "-f", "raw", "-O", "qcow2", &from, &to], LONG)?;
    let full = [kept(&raw.image)?, kept(qcow2)?];
    let images = [("xvda", raw.image.as_path()), ("xvdb", qcow2)];
    let mut spec = Spec::new(lab.kind, lab.backend);
    spec.programs = Programs::Tools;
    spec.disks = images
        .iter()
        .map(|(name, path)| Disk::by_pvio(name, "rw", &path.display().to_string()))
        .collect();
    let mut guest = Guest::start(&spec)?;
    for (name, _) in images {
        guest.ask("disk-wait", json!(name), SHORT)?;
        guest.program(&format!("mke2fs -q -F -t ext4 -E nodiscard /dev/{name}"))?;
        guest.ask("module", json!("ext4"), SHORT)?;
        guest.ask("mount", json!(["ext4", format!("/dev/{name}"), "/mnt"]), SHORT)?;
        let files = json!({ "folder": "/mnt", "seed": 5, "count": 20 });
        guest.ask("files-write", files.clone(), LONG)?;
        guest.program("fstrim -v /mnt")?;
        guest.ask("files-check", files, LONG)?;
        guest.ask("unmount", json!("/mnt"), SHORT)?;
        guest.program(&format!("e2fsck -f -n /dev/{name}"))?;
    }
    lab.watched(guest, |guest| guest.power_off())?;
    lab.nothing_left(&before)?;
    sys::succeed(&["qemu-img", "check", &to], SHORT)?;
    let left = [kept(&raw.image)?, kept(qcow2)?];
    lab.rows.push(json!({ "mib_before": full, "mib_after": left }));
    ensure!(full.iter().all(|mib| *mib >= MIB), "{full:?} of {MIB} MiB allocated before fstrim");
    ensure!(
        left.iter().all(|mib| *mib <= MIB / 2),
        "{left:?} of {full:?} MiB still allocated after fstrim"
    );
    Ok(fs::remove_file(qcow2)?)
}

const CONFIG: &str = "\
set timeout=0
linux /kernel console=hvc0 panic=-1 loglevel=5 pvio.from-disk
initrd /ramdisk
boot
";

fn boot(lab: &mut Lab) -> Result<()> {
    let before = lab.settled()?;
    let root = Path::new("/tmp/root");
    fs::create_dir_all(root.join("boot/grub"))?;
    fs::write(root.join("boot/grub/grub.cfg"), CONFIG)?;
    // GRUB only decompresses kernels for PVH.
    let kernel = if lab.kind == Kind::Pv { "/lab/vmlinux" } else { "/lab/vmlinuz" };
    fs::copy(kernel, root.join("kernel"))?;
    fs::copy("/lab/guest.cpio", root.join("ramdisk"))?;
    let disk = Disk::new(160, Backend::Pvio, Medium::File)?;
    let image = disk.image.display().to_string();
    let words = ["mke2fs", "-q", "-F", "-t", "ext2", "-d", "/tmp/root", &image];
    sys::succeed(&words, LONG)?;
    fs::remove_dir_all(root)?;
    let scratch = Disk::new(16, Backend::Pvio, Medium::File)?;
    let mut spec = Spec::new(lab.kind, lab.backend);
    spec.loader = Some(match lab.kind {
        Kind::Pv => "grub-x86_64-xen.bin",
        _ => "grub-i386-xen_pvh.bin",
    });
    spec.programs = Programs::Tools;
    spec.disks = vec![
        Disk::by_pvio("xvda", "rw", &image),
        Disk::by_pvio("xvdb", "rw", &scratch.image.display().to_string()),
    ];
    let mut guest = Guest::start(&spec)?;
    let words = guest.ask("command-line", json!(null), SHORT)?;
    let words = words.as_str().context("the kernel's command line")?;
    ensure!(words.contains("pvio.from-disk"), "the guest was not booted by GRUB: {words}");
    for (name, disk) in [("xvda", &disk), ("xvdb", &scratch)] {
        guest.ask("disk-wait", json!(name), SHORT)?;
        guest.ask("disk-blank", json!({ "name": name, "mib": 8 }), LONG)?;
        let order = json!({ "name": name, "seed": 13, "requests": 80, "mib": 8 });
        let sum = guest.ask("disk-scribble", order, LONG)?;
        ensure!(sum == disk.sum(8)?, "{name}: image checksum differs from the guest's");
    }
    lab.watched(guest, |guest| guest.power_off())?;
    lab.nothing_left(&before)
}

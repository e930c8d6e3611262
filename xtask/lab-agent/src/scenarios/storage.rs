//! The checks of disks on raw files and block devices, repeated for all other types of storage.

use std::fs;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::nic::undo::Undo;
use super::store::{StorageKind, Store};
use super::{BOTH, Guests, PVIO, Scenario};
use crate::dom0::disk::sum_of;
use crate::dom0::guest::Guest;
use crate::dom0::lab::{LONG, Lab, SHORT};
use crate::pattern;
use crate::sys::{self, modules, mount};

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "storage-raw",
        "raw file: attached and detached under I/O, fio, ext4, flushes, read-only",
        |lab| check_disks(lab, StorageKind::Raw),
    ),
    scenario("storage-direct", "the same with O_DIRECT, without dom0's page cache", |lab| {
        check_disks(lab, StorageKind::Direct)
    }),
    scenario(
        "storage-qcow2",
        "the same on a qcow2 image, which qemu-img finds consistent",
        |lab| check_disks(lab, StorageKind::Qcow2),
    ),
    scenario("storage-nbd", "the same on an export of qemu-nbd", |lab| {
        check_disks(lab, StorageKind::Nbd)
    }),
];

const fn scenario(
    name: &'static str,
    proves: &'static str,
    run: fn(&mut Lab) -> Result<()>,
) -> Scenario {
    Scenario { name, proves, backends: PVIO, kinds: BOTH, guests: Guests::Shared, run }
}

/// Size of each disk in MiB.
const MIB: u64 = 12;
const FOLDER: &str = "/tmp/storage";
/// Seed of the contents of the read-only disk.
const SEED: u64 = 78;

/// Mounts a file system in dom0 on a device that counts flushes; returns the device's name.
fn volume(undo: &mut Undo) -> Result<String> {
    modules::load("ext4")?;
    let image = "/tmp/storage.img";
    fs::File::create(image)?.set_len((8 * MIB) << 20)?;
    undo.later(move || drop(fs::remove_file(image)));
    sys::succeed(&["mke2fs", "-q", "-F", "-t", "ext4", image], SHORT)?;
    let device = sys::succeed(&["losetup", "--find", "--show", image], SHORT)?;
    let device = device.trim().to_owned();
    let loosened = device.clone();
    undo.later(move || drop(sys::run(&["losetup", "--detach", &loosened], SHORT)));
    mount::mount("ext4", &device, FOLDER, "")?;
    undo.later(|| {
        if let Err(error) = rustix::mount::unmount(FOLDER, rustix::mount::UnmountFlags::empty()) {
            println!("PVIO-LAB undo: {FOLDER}: {error}");
        }
    });
    Ok(device.trim_start_matches("/dev/").to_owned())
}

/// Returns the number of flushes that a block device of dom0 has completed.
fn flushes(device: &str) -> Result<u64> {
    let stat = fs::read_to_string(format!("/sys/block/{device}/stat"))?;
    stat.split_whitespace().nth(15).context("no flushes in stat")?.parse().context("stat")
}

fn check_disks(lab: &mut Lab, kind: StorageKind) -> Result<()> {
    let mut undo = Undo::default();
    let device = volume(&mut undo)?;
    let (store, fixed) = (Store::new(kind, FOLDER, 0, MIB)?, Store::new(kind, FOLDER, 1, MIB)?);
    let mut bytes = vec![0; usize::try_from(MIB << 20)?];
    pattern::fill(&mut bytes, SEED, 0);
    fixed.fill(&bytes)?;

    // Both are attached while another disk and a NIC are in use.
    let load = json!({ "disks": ["xvda"], "echoes": ["10.0.0.1"], "rest": 10 });
    lab.shared()?.guest.ask("load-start", load.clone(), SHORT)?;
    let before = lab.settled()?;
    let guest = &mut lab.shared()?.guest;
    let domain = guest.domain.to_string();
    for line in [store.line("xvdd", "rw", ""), fixed.line("xvde", "ro", "")] {
        sys::succeed(&["xl", "block-attach", &domain, &line], SHORT)?;
    }
    for name in ["xvdd", "xvde"] {
        guest.ask("disk-wait", json!(name), SHORT)?;
    }
    let scribble = json!({ "name": "xvdd", "seed": 47, "requests": 60, "mib": 8 });
    let sum = guest.ask("disk-scribble", scribble, LONG)?;
    stopped(guest)?;
    let held = sum_of(store.bytes()?, 8)?;
    ensure!(sum == held, "image checksum differs from the guest's");

    flush(guest, &store, &device)?;
    let fio = "fio --name=verify --filename=/dev/xvdd --rw=randrw --bsrange=4k-64k --size=4M \
               --direct=1 --ioengine=libaio --iodepth=8 --verify=crc32c --verify_fatal=1 \
               --do_verify=1 --randseed=3 --output-format=terse";
    let said = guest.program(fio)?;
    ensure!(said.contains(";verify;"), "fio reports no result: {said}");
    file_system(guest)?;
    let check = json!({ "name": "xvde", "seed": SEED, "mib": MIB, "write": false });
    guest.ask("disk-verify", check, LONG)?;
    guest.ask("disk-refuses-writes", json!("xvde"), SHORT)?;

    guest.ask("load-start", load, SHORT)?;
    for name in ["xvdd", "xvde"] {
        sys::succeed(&["xl", "block-detach", &domain, name], SHORT)?;
        guest.ask("disk-gone", json!(name), SHORT)?;
    }
    lab.nothing_left(&before)?;
    stopped(&mut lab.shared()?.guest)?;
    // The images must be consistent after that.
    store.sum(MIB)?;
    let image = store.bytes()?.display().to_string();
    sys::succeed(&["e2fsck", "-f", "-n", &image], SHORT)?;
    fixed.sum(MIB)?;
    ensure!(fs::read(fixed.bytes()?)? == bytes, "the read-only image changed");
    Ok(())
}

fn stopped(guest: &mut Guest) -> Result<()> {
    let rounds = guest.ask("load-stop", Value::Null, LONG).context("the load on other devices")?;
    ensure!(rounds.as_array().is_some_and(|it| it.iter().all(|n| *n != 0)), "no load: {rounds}");
    Ok(())
}

/// Checks that flushes and write-through data reach the underlying device and the image.
fn flush(guest: &mut Guest, store: &Store, device: &str) -> Result<()> {
    let before = flushes(device)?;
    let seen = guest.ask("disk-flush", json!("xvdd"), SHORT)?;
    ensure!(seen["cache"] == "write back", "the guest sees cache mode {}", seen["cache"]);
    let asked = seen["flushes"].as_u64().unwrap_or_default();
    ensure!(asked >= 2, "the guest's kernel sent {asked} flushes for fdatasync and O_DSYNC");
    let reached = flushes(device)? - before;
    ensure!(reached >= 2, "of {asked} flushes {reached} reached the device");
    let image = fs::File::open(store.bytes()?)?;
    let mut bytes = vec![0; 8192];
    for (seed, offset) in [(1, 0), (2, 8192)] {
        image.read_exact_at(&mut bytes, offset)?;
        let wrong = pattern::mismatch(&bytes, seed, offset);
        ensure!(wrong.is_none(), "data flushed at {offset} is not in the image");
    }
    Ok(())
}

/// Creates an ext4 file system in the guest, fills it, and verifies the files.
fn file_system(guest: &mut Guest) -> Result<()> {
    guest.ask("module", json!("ext4"), SHORT)?;
    guest.program("mke2fs -q -F -t ext4 -b 4096 /dev/xvdd")?;
    let files = json!({ "folder": "/mnt", "seed": 6, "count": 40 });
    for verb in ["files-write", "files-check"] {
        guest.ask("mount", json!(["ext4", "/dev/xvdd", "/mnt"]), SHORT)?;
        guest.ask(verb, files.clone(), LONG)?;
        guest.ask("unmount", json!("/mnt"), SHORT)?;
    }
    guest.program("e2fsck -f -n /dev/xvdd").map(drop)
}

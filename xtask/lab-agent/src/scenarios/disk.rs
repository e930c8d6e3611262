//! Disks: data integrity, file systems, flushes, read-only access.

use std::fs;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::{BOTH, DISKS, Guests, Scenario};
use crate::dom0::backend::Backend;
use crate::dom0::lab::{DISK_MIB, FIXED_MIB, FIXED_SEED, LONG, Lab, SHORT};
use crate::sys;

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "disk-verify",
        proves: "random writes of 512 B to 1 MiB read back correctly and are in the image",
        backends: DISKS,
        kinds: BOTH,
        guests: Guests::Shared,
        run: verify,
    },
    Scenario {
        name: "disk-fs",
        proves: "an ext4 file system created and filled by the guest is consistent in the guest \
                 and in the image",
        backends: DISKS,
        kinds: BOTH,
        guests: Guests::Shared,
        run: file_system,
    },
    Scenario {
        name: "disk-fio",
        proves: "fio's verified random I/O at depth 8 reads every block as written",
        backends: DISKS,
        kinds: BOTH,
        guests: Guests::Shared,
        run: fio,
    },
    Scenario {
        name: "disk-flush",
        proves: "fdatasync and O_DSYNC reach the backend's device, and the bytes are in the image",
        backends: DISKS,
        kinds: BOTH,
        guests: Guests::Shared,
        run: flush,
    },
    Scenario {
        name: "disk-readonly",
        proves: "a read-only disk reads correctly and cannot be written",
        // QEMU 7.2 does not offer it: "realization of device xen-disk failed: Block node is
        // read-only".
        backends: &[Backend::Pvio, Backend::Linux, Backend::PvioDm],
        kinds: BOTH,
        guests: Guests::Shared,
        run: read_only,
    },
];

fn verify(lab: &mut Lab) -> Result<()> {
    const MIB: u64 = 16;
    let shared = lab.shared()?;
    for (name, disk) in [("xvda", &shared.disk), ("xvdb", &shared.file)] {
        let size = shared.guest.ask("disk-wait", json!(name), SHORT)?;
        ensure!(size["sectors"] == DISK_MIB << 11, "{name} has {} sectors", size["sectors"]);
        // The expected checksum does not include data of another scenario.
        let blank = json!({ "name": name, "mib": MIB });
        shared.guest.ask("disk-blank", blank, LONG)?;
        let order = json!({ "name": name, "seed": 11, "requests": 300, "mib": MIB });
        let sum = shared.guest.ask("disk-scribble", order, LONG)?;
        ensure!(sum == disk.sum(MIB)?, "{name}: image checksum differs from the guest's");
    }
    Ok(())
}

fn file_system(lab: &mut Lab) -> Result<()> {
    let shared = lab.shared()?;
    let guest = &mut shared.guest;
    guest.ask("module", json!("ext4"), SHORT)?;
    guest.program("mke2fs -q -F -t ext4 -b 4096 /dev/xvdb")?;
    guest.ask("mount", json!(["ext4", "/dev/xvdb", "/mnt"]), SHORT)?;
    let files = json!({ "folder": "/mnt", "seed": 5, "count": 120 });
    guest.ask("files-write", files.clone(), LONG)?;
    guest.ask("unmount", json!("/mnt"), SHORT)?;
    guest.ask("mount", json!(["ext4", "/dev/xvdb", "/mnt"]), SHORT)?;
    guest.ask("files-check", files, LONG)?;
    guest.ask("unmount", json!("/mnt"), SHORT)?;
    guest.program("e2fsck -f -n /dev/xvdb")?;
    let image = shared.file.image.to_str().context("a path in UTF-8")?;
    sys::succeed(&["e2fsck", "-f", "-n", image], SHORT).map(drop)
}

fn fio(lab: &mut Lab) -> Result<()> {
    let words = "fio --name=verify --filename=/dev/xvda --rw=randrw --bsrange=4k-64k --size=8M \
                 --direct=1 --ioengine=libaio --iodepth=8 --verify=crc32c --verify_fatal=1 \
                 --do_verify=1 --randseed=3 --output-format=terse";
    let said = lab.shared()?.guest.program(words)?;
    ensure!(said.contains(";verify;"), "fio reports no result: {said}");
    Ok(())
}

fn flush(lab: &mut Lab) -> Result<()> {
    let backend = lab.backend;
    let shared = lab.shared()?;
    let device = shared.disk.device().map(str::to_owned);
    let flushed = || -> Result<Option<u64>> {
        let Some(device) = &device else { return Ok(None) };
        let name = device.trim_start_matches("/dev/");
        let stat = fs::read_to_string(format!("/sys/block/{name}/stat"))?;
        let count = stat.split_whitespace().nth(15).context("no flushes in stat")?;
        Ok(Some(count.parse()?))
    };
    let before = flushed()?;
    let seen = shared.guest.ask("disk-flush", json!("xvda"), SHORT)?;
    ensure!(seen["cache"] == "write back", "the guest sees cache mode {}", seen["cache"]);
    let asked = seen["flushes"].as_u64().unwrap_or_default();
    ensure!(asked >= 2, "the guest's kernel sent {asked} flushes for fdatasync and O_DSYNC");
    if let (Some(before), Some(after)) = (before, flushed()?) {
        ensure!(after >= before + 2, "of {asked} flushes {} reached the device", after - before);
    } else {
        ensure!(
            matches!(backend, Backend::Qdisk | Backend::PvioDm),
            "the disk is not on a block device"
        );
    }
    let image = fs::File::open(&shared.disk.image)?;
    let mut bytes = vec![0; 8192];
    for (seed, offset) in [(1, 0), (2, 8192)] {
        image.read_exact_at(&mut bytes, offset)?;
        let wrong = crate::pattern::mismatch(&bytes, seed, offset);
        ensure!(wrong.is_none(), "data flushed at {offset} is not in the image");
    }
    Ok(())
}

fn read_only(lab: &mut Lab) -> Result<()> {
    let shared = lab.shared()?;
    let seen = shared.guest.ask("disk-wait", json!("xvdc"), SHORT)?;
    ensure!(seen["read_only"] == true, "the guest sees a writable disk");
    let order = json!({ "name": "xvdc", "seed": FIXED_SEED, "mib": FIXED_MIB, "write": false });
    shared.guest.ask("disk-verify", order, LONG)?;
    shared.guest.ask("disk-refuses-writes", json!("xvdc"), SHORT)?;
    let bytes = fs::read(&shared.fixed.image)?;
    let wrong = crate::pattern::mismatch(&bytes, FIXED_SEED, 0);
    ensure!(wrong.is_none(), "the image changed");
    Ok(())
}

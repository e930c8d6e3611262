//! Disks on devices with special features: polled completions, secure discard.

use std::fs;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use super::nic::undo::Undo;
use super::{BOTH, Guests, PVIO, Scenario};
use crate::dom0::backend::Backend;
use crate::dom0::disk::{Disk, Medium, sum_of};
use crate::dom0::guest::{Guest, Programs, Spec};
use crate::dom0::lab::{LONG, Lab, SHORT, wait_until};
use crate::pattern;
use crate::sys::{self, modules};

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "disk-polled",
        proves: "io=iopoll on a device that is slow unless polled: fast, all data correct, \
                 discards reach the device",
        backends: PVIO,
        kinds: BOTH,
        guests: Guests::Own,
        run: polled,
    },
    Scenario {
        name: "disk-secure",
        proves: "a guest's secure discard becomes a secure discard of the device if the device \
                 supports it, and is rejected otherwise",
        backends: PVIO,
        kinds: BOTH,
        guests: Guests::Own,
        run: secure,
    },
];

/// Returns the number of discards that a block device of dom0 has completed; secure ones are
/// counted elsewhere.
fn discards(device: &str) -> Result<u64> {
    let stat = fs::read_to_string(format!("/sys/block/{device}/stat"))?;
    stat.split_whitespace().nth(11).context("no discards in stat")?.parse().context("stat")
}

/// Latency of a request on a queue of Linux's null device that is not polled.
const INTERRUPT: Duration = Duration::from_millis(300);
const REQUESTS: u32 = 40;

fn polled(lab: &mut Lab) -> Result<()> {
    let before = lab.settled()?;
    let mut undo = Undo::default();
    let words = format!(
        "nr_devices=1 gb=1 memory_backed=1 discard=1 submit_queues=1 poll_queues=1 irqmode=2 \
         completion_nsec={}",
        INTERRUPT.as_nanos()
    );
    modules::load_with("null_blk", &words)?;
    undo.later(|| {
        if let Err(error) = modules::unload("null_blk") {
            println!("PVIO-LAB undo: {error:#}");
        }
    });
    // So that dom0's reads of the device are few requests.
    fs::write("/sys/block/nullb0/queue/read_ahead_kb", "8192")?;
    let mut spec = Spec::new(lab.kind, lab.backend);
    spec.programs = Programs::Fio;
    spec.disks = vec![Disk::by_pvio("xvda", "rw", "[io=iopoll,direct]raw:/dev/nullb0")];
    let mut guest = Guest::start(&spec)?;
    guest.ask("disk-wait", json!("xvda"), SHORT)?;
    // The device splits longer requests, and those are not polled.
    let order = json!({
        "name": "xvda", "write": false, "size": 4096, "depth": 1, "requests": REQUESTS, "mib": 4,
    });
    let seconds = guest.ask("measure-disk", order, LONG)?.as_f64().context("seconds")?;
    let took = Duration::try_from_secs_f64(seconds)?;
    ensure!(
        took < INTERRUPT * REQUESTS / 2,
        "{REQUESTS} requests took {took:?}: completions were not polled"
    );
    lab.rows.push(json!({ "requests": REQUESTS, "seconds": seconds }));
    let order = json!({ "name": "xvda", "seed": 17, "requests": 30, "mib": 4 });
    let sum = guest.ask("disk-scribble", order, LONG)?;
    let words = "fio --name=verify --filename=/dev/xvda --rw=randrw --bsrange=4k-64k --offset=8M \
                 --size=2M --direct=1 --ioengine=libaio --iodepth=8 --verify=crc32c \
                 --verify_fatal=1 --do_verify=1 --randseed=3 --output-format=terse";
    let said = guest.program(words)?;
    ensure!(said.contains(";verify;"), "fio reports no result: {said}");

    // The device does not support write-zeroes, so only discards of the guest are counted.
    let seen = discards("nullb0")?;
    guest.program("blkdiscard -o 8M -l 2M /dev/xvda")?;
    ensure!(discards("nullb0")? > seen, "no discard reached the device");
    let held = sum_of(Path::new("/dev/nullb0"), 4)?;
    ensure!(sum == held, "image checksum differs from the guest's");
    zeroes("/dev/nullb0", 8 << 20, 2 << 20)?;
    lab.watched(guest, |guest| guest.power_off())?;
    lab.nothing_left(&before)
}

/// Checks that a range of a device or file is zeros.
fn zeroes(path: &str, at: u64, len: usize) -> Result<()> {
    let mut bytes = vec![1; len];
    File::open(path)?.read_exact_at(&mut bytes, at)?;
    match bytes.iter().position(|byte| *byte != 0) {
        None => Ok(()),
        Some(found) => bail!("{path}: byte {} is not zero after the discard", at + found as u64),
    }
}

/// Attaches a disk in pvio's memory to dom0, as the device below a guest's disk. It supports secure
/// discard.
fn device(undo: &mut Undo) -> Result<&'static str> {
    modules::load("xen-blkfront")?;
    undo.later(|| {
        if let Err(error) = modules::unload("xen-blkfront") {
            println!("PVIO-LAB undo: {error:#}");
        }
    });
    let words = ["xl", "block-attach", "0", &Disk::by_pvio("xvda", "rw", "[policy=copy]ram:32M")];
    sys::succeed(&words, SHORT)?;
    undo.later(|| {
        if let Err(error) = sys::succeed(&["xl", "block-detach", "0", "xvda"], SHORT) {
            println!("PVIO-LAB undo: {error:#}");
        }
    });
    let there = wait_until(SHORT, || Ok(Path::new("/dev/xvda").exists()))?;
    ensure!(there, "dom0 has no /dev/xvda");
    Ok("/dev/xvda")
}

const SEED: u64 = 19;

fn secure(lab: &mut Lab) -> Result<()> {
    let before = lab.settled()?;
    let mut undo = Undo::default();
    let device = device(&mut undo)?;
    let plain = Disk::new(16, Backend::Pvio, Medium::Device)?;
    let mut spec = Spec::new(lab.kind, lab.backend);
    spec.programs = Programs::Tools;
    spec.disks = vec![
        // dom0's blkfront grants the pages of its requests to its own backend. Pages that are mapped from
        // a guest cannot be granted.
        Disk::by_pvio("xvda", "rw", &format!("[direct,policy=persistent-or-map]raw:{device}")),
        Disk::by_pvio("xvdb", "rw", &format!("raw:{}", plain.device().context("a loop device")?)),
    ];
    let mut guest = Guest::start(&spec)?;
    for name in ["xvda", "xvdb"] {
        guest.ask("disk-wait", json!(name), SHORT)?;
        let order = json!({ "name": name, "seed": SEED, "mib": 8, "write": true });
        guest.ask("disk-verify", order, LONG)?;
    }
    let seen = discards("xvda")?;
    guest.program("blkdiscard -s -o 2M -l 4M /dev/xvda")?;
    ensure!(discards("xvda")? == seen, "secure discard reached the device as an ordinary discard");
    guest.program("blkdiscard -o 7M -l 1M /dev/xvda")?;
    ensure!(discards("xvda")? > seen, "ordinary discard did not reach the device");
    let refused = guest.program("blkdiscard -s -o 2M -l 4M /dev/xvdb");
    let words = refused.err().map(|error| format!("{error:#}")).unwrap_or_default();
    ensure!(
        words.contains("not supported"),
        "secure discard on a device without support: {words:?}"
    );
    lab.watched(guest, |guest| guest.power_off())?;

    zeroes(device, 2 << 20, 4 << 20)?;
    let mut bytes = vec![0; 2 << 20];
    for (path, at) in [(Path::new(device), 0), (&plain.image, 0), (&plain.image, 2 << 20)] {
        File::open(path)?.read_exact_at(&mut bytes, at)?;
        let wrong = pattern::mismatch(&bytes, SEED, at);
        ensure!(wrong.is_none(), "{}: data outside the discarded range changed", path.display());
    }
    drop(plain);
    drop(undo);
    lab.nothing_left(&before)
}

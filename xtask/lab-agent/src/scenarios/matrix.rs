//! Disks on each type of storage, with many configurations: number of queues, ring pages,
//! persistent grants, indirect requests, sector size.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::store::{StorageKind, Store, TMP};
use super::{BOTH, Guests, PVIO, Scenario};
use crate::dom0::guest::{Guest, Programs, Spec};
use crate::dom0::lab::{LONG, Lab, SHORT};
use crate::dom0::xs;

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "matrix-raw",
        "a raw file, in 10 configurations with 1 and 4 queues and rings of 1 to 16 pages",
        |lab| matrix(lab, StorageKind::Raw),
    ),
    scenario(
        "matrix-direct",
        "a block device with O_DIRECT, without dom0's page cache, in the same configurations",
        |lab| matrix(lab, StorageKind::Device),
    ),
    scenario(
        "matrix-qcow2",
        "a qcow2 image, in the same configurations; qemu-img finds it consistent",
        |lab| matrix(lab, StorageKind::Qcow2),
    ),
    scenario("matrix-nbd", "an export of qemu-nbd, in the same configurations", |lab| {
        matrix(lab, StorageKind::Nbd)
    }),
];

const fn scenario(
    name: &'static str,
    proves: &'static str,
    run: fn(&mut Lab) -> Result<()>,
) -> Scenario {
    Scenario { name, proves, backends: PVIO, kinds: BOTH, guests: Guests::Own, run }
}

/// Configuration of a disk.
struct Shape {
    queues: u32,
    order: u32,
    persistent: bool,
    indirect: bool,
    sector: u64,
}

impl Shape {
    /// Every pair of properties occurs in each combination of their values.
    fn all() -> impl Iterator<Item = Self> {
        (0..5).flat_map(|order| {
            [(0, 1), (1, 4)].map(|(many, queues)| Self {
                queues,
                order,
                persistent: (order + many) % 2 == 1,
                indirect: (order / 2 + many) % 2 == 1,
                sector: if order % 3 == 1 { 4096 } else { 512 },
            })
        })
    }

    fn words(&self) -> String {
        let policy = if self.persistent { "persistent-or-copy" } else { "copy" };
        format!(
            "queues={},ring-order={},policy={policy},indirect={},sector={}",
            self.queues,
            self.order,
            if self.indirect { 256 } else { 0 },
            self.sector
        )
    }

    /// Compares with the features that frontend and backend negotiated.
    fn agreed(&self, guest: &Guest, number: u32, seen: &Value) -> Result<()> {
        let front = format!("/local/domain/{}/device/vbd/{number}", guest.domain);
        let back = format!("/local/domain/0/backend/vbd/{}/{number}", guest.domain);
        let said = |path: String| -> Result<u32> {
            Ok(xs::read(&path)?.map_or(Ok(0), |text| text.parse())?)
        };
        let queues = said(format!("{front}/multi-queue-num-queues"))?.max(1);
        ensure!(queues == self.queues, "the guest uses {queues} queues");
        let order = said(format!("{front}/ring-page-order"))?;
        ensure!(order == self.order, "the guest uses ring page order {order}");
        let kept = said(format!("{back}/feature-persistent"))? == 1
            && said(format!("{front}/feature-persistent"))? == 1;
        ensure!(kept == self.persistent, "persistent grants: {kept}");
        let segments = seen["segments"].as_u64().context("segments")?;
        ensure!(
            (segments > 11) == self.indirect,
            "the guest submits requests of {segments} segments"
        );
        ensure!(
            seen["sector_size"] == self.sector,
            "the guest sees sectors of {} bytes",
            seen["sector_size"]
        );
        Ok(())
    }
}

const MIB: u64 = 8;
/// MiB at the start of the disk that the guest verifies; fio uses the rest.
const SUMMED: u64 = 6;

fn matrix(lab: &mut Lab, kept: StorageKind) -> Result<()> {
    let before = lab.settled()?;
    let mut spec = Spec::new(lab.kind, lab.backend);
    (spec.processors, spec.words) = (4, "pvio.ring-order=4".to_owned());
    spec.programs = Programs::Fio;
    let mut disks = Vec::new();
    for (i, shape) in Shape::all().enumerate() {
        let store = Store::new(kept, TMP, i, MIB)?;
        let name = format!("xvd{}", char::from(b'a' + u8::try_from(i)?));
        spec.disks.push(store.line(&name, "rw", &shape.words()));
        disks.push((name, shape, store));
    }
    let mut guest = Guest::start(&spec)?;
    let mut sums = Vec::new();
    for (i, (name, shape, _)) in disks.iter().enumerate() {
        let what = || format!("{name}: {}", shape.words());
        let seen = guest.ask("disk-wait", json!(name), SHORT).with_context(what)?;
        let number = 51_712 + 16 * u32::try_from(i)?;
        shape.agreed(&guest, number, &seen).with_context(what)?;
        let order = json!({ "name": name, "seed": 91 + i, "requests": 60, "mib": SUMMED });
        sums.push(guest.ask("disk-scribble", order, LONG).with_context(what)?);
    }
    // All disks concurrently, with several requests in flight for each.
    let mut words = "fio --rw=randrw --bsrange=4k-64k --offset=6M --size=2M --direct=1 \
                     --ioengine=libaio --iodepth=8 --verify=crc32c --verify_fatal=1 --do_verify=1 \
                     --randseed=3 --output-format=terse"
        .to_owned();
    for (name, ..) in &disks {
        words += &format!(" --name={name} --filename=/dev/{name}");
    }
    let said = guest.program(&words)?;
    let verified = disks.iter().all(|(name, ..)| said.contains(&format!(";{name};")));
    ensure!(verified, "fio does not report a result for every disk: {said}");
    lab.watched(guest, |guest| guest.power_off())?;
    lab.nothing_left(&before)?;
    for ((name, shape, store), sum) in disks.iter().zip(sums) {
        let held = store.sum(SUMMED).with_context(|| name.clone())?;
        ensure!(held == sum, "{name}, {}: image checksum differs from the guest's", shape.words());
        lab.rows.push(json!({ "disk": shape.words() }));
    }
    Ok(())
}

//! Disks kept in different things, each in many shapes: queues, pages of a ring, persistent grants,
//! indirect requests, sizes of a sector.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{BOTH, Guests, PVIO, Scenario};
use crate::dom0::disk::{Disk, Medium, sum_of};
use crate::dom0::guest::{Guest, Spec};
use crate::dom0::lab::{LONG, Lab, SHORT, wait_until};
use crate::dom0::xs;
use crate::sys;

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "matrix-raw",
        "a raw file, in 10 shapes of 1 and 4 queues and rings of 1 to 16 pages",
        |lab| matrix(lab, Kept::Raw),
    ),
    scenario(
        "matrix-direct",
        "a block device around dom0's page cache, in the same shapes",
        |lab| matrix(lab, Kept::Direct),
    ),
    scenario("matrix-qcow2", "a qcow2 image, in the same shapes; QEMU finds it sound", |lab| {
        matrix(lab, Kept::Qcow2)
    }),
    scenario("matrix-nbd", "an export of qemu-nbd, in the same shapes", |lab| {
        matrix(lab, Kept::Nbd)
    }),
];

const fn scenario(
    name: &'static str,
    proves: &'static str,
    run: fn(&mut Lab) -> Result<()>,
) -> Scenario {
    Scenario { name, proves, backends: PVIO, kinds: BOTH, guests: Guests::Own, run }
}

/// What a disk is kept in.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kept {
    Raw,
    Direct,
    Qcow2,
    Nbd,
}

/// How a disk is served.
struct Shape {
    queues: u32,
    order: u32,
    persistent: bool,
    indirect: bool,
    sector: u64,
}

impl Shape {
    /// Any two properties meet in each of their combinations.
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

    /// Compares with what both ends say they agreed on.
    fn agreed(&self, guest: &Guest, number: u32, seen: &Value) -> Result<()> {
        let front = format!("/local/domain/{}/device/vbd/{number}", guest.domain);
        let back = format!("/local/domain/0/backend/vbd/{}/{number}", guest.domain);
        let said = |path: String| -> Result<u32> {
            Ok(xs::read(&path)?.map_or(Ok(0), |text| text.parse())?)
        };
        let queues = said(format!("{front}/multi-queue-num-queues"))?.max(1);
        ensure!(queues == self.queues, "the guest uses {queues} queues");
        let order = said(format!("{front}/ring-page-order"))?;
        ensure!(order == self.order, "the guest's rings are of order {order}");
        let kept = said(format!("{back}/feature-persistent"))? == 1
            && said(format!("{front}/feature-persistent"))? == 1;
        ensure!(kept == self.persistent, "persistent grants: {kept}");
        let segments = seen["segments"].as_u64().context("segments")?;
        ensure!(
            (segments > 11) == self.indirect,
            "the guest makes requests of {segments} segments"
        );
        ensure!(seen["sector_size"] == self.sector, "its sectors are {}", seen["sector_size"]);
        Ok(())
    }
}

const MIB: u64 = 8;

fn matrix(lab: &mut Lab, kept: Kept) -> Result<()> {
    let before = lab.settled()?;
    let mut spec = Spec::new(lab.kind, lab.backend);
    (spec.processors, spec.words) = (4, "pvio.ring-order=4".to_owned());
    let mut disks = Vec::new();
    for (i, shape) in Shape::all().enumerate() {
        let store = Store::new(kept, i)?;
        let name = format!("xvd{}", char::from(b'a' + u8::try_from(i)?));
        let cache = if kept == Kept::Direct { "direct" } else { "buffered" };
        let (words, place) = (format!("{cache},{}", shape.words()), &store.place);
        spec.disks.push(format!(
            "format=raw,vdev={name},access=rw,backendtype=phy,script=block-pvio,target=[{words}]{place}"
        ));
        disks.push((name, shape, store));
    }
    let mut guest = Guest::start(&spec)?;
    let mut sums = Vec::new();
    for (i, (name, shape, _)) in disks.iter().enumerate() {
        let what = || format!("{name}: {}", shape.words());
        let seen = guest.ask("disk-wait", json!(name), SHORT).with_context(what)?;
        let number = 51_712 + 16 * u32::try_from(i)?;
        shape.agreed(&guest, number, &seen).with_context(what)?;
        let order = json!({ "name": name, "seed": 91 + i, "requests": 60, "mib": MIB });
        sums.push(guest.ask("disk-scribble", order, LONG).with_context(what)?);
    }
    lab.watched(guest, |guest| guest.power_off())?;
    lab.nothing_left(&before)?;
    for ((name, shape, store), sum) in disks.iter().zip(sums) {
        let held = store.sum().with_context(|| name.clone())?;
        ensure!(held == sum, "{name}, {}: something else is kept", shape.words());
        lab.rows.push(json!({ "disk": shape.words() }));
    }
    Ok(())
}

/// Where one disk's bytes are.
struct Store {
    disk: Disk,
    /// As pvio names it.
    place: String,
    qcow2: Option<PathBuf>,
    server: Option<Child>,
}

impl Store {
    fn new(kept: Kept, number: usize) -> Result<Self> {
        let medium = if kept == Kept::Direct { Medium::Device } else { Medium::File };
        let disk = Disk::new(MIB, crate::dom0::backend::Backend::Pvio, medium)?;
        let image = disk.image.display().to_string();
        let (mut qcow2, mut server) = (None, None);
        let place = match kept {
            Kept::Raw => format!("raw:{image}"),
            Kept::Direct => format!("raw:{}", disk.device().context("a loop device")?),
            Kept::Qcow2 => {
                let path = PathBuf::from(format!("/tmp/disk{number}.qcow2"));
                make_qcow2(&path, MIB)?;
                let place = format!("qcow2:{}", path.display());
                qcow2 = Some(path);
                place
            }
            Kept::Nbd => {
                let socket = format!("/run/nbd{number}.sock");
                let words = ["-t", "-e", "8", "-f", "raw", "-k", &socket, &image];
                server = Some(Command::new("qemu-nbd").args(words).spawn().context("qemu-nbd")?);
                let there = wait_until(SHORT, || Ok(Path::new(&socket).exists()))?;
                ensure!(there, "qemu-nbd does not listen");
                format!("nbd+unix:///?socket={socket}")
            }
        };
        Ok(Self { disk, place, qcow2, server })
    }

    /// The sum of what is kept.
    fn sum(&self) -> Result<Value> {
        let Some(qcow2) = &self.qcow2 else { return self.disk.sum(MIB) };
        let qcow2 = qcow2.display().to_string();
        sys::succeed(&["qemu-img", "check", "-q", &qcow2], SHORT)?;
        let image = self.disk.image.display().to_string();
        sys::succeed(&["qemu-img", "convert", "-O", "raw", &qcow2, &image], SHORT)?;
        sum_of(&self.disk.image, MIB)
    }
}

/// Makes an empty qcow2 image.
pub fn make_qcow2(path: &Path, mib: u64) -> Result<()> {
    let (path, size) = (path.display().to_string(), format!("{mib}M"));
    sys::succeed(&["qemu-img", "create", "-q", "-f", "qcow2", &path, &size], SHORT).map(drop)
}

impl Drop for Store {
    fn drop(&mut self) {
        if let Some(server) = &mut self.server {
            let _ = server.kill();
            let _ = server.wait();
        }
        if let Some(qcow2) = &self.qcow2 {
            let _ = fs::remove_file(qcow2);
        }
    }
}

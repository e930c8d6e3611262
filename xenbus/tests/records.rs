//! The table of each record lists exactly the keys that are read and written, and writing removes
//! the keys of an earlier record.
#![cfg(feature = "std")]

mod common;

use std::collections::BTreeSet;
use std::time::Duration;

use common::{BACK, FRONT, offer, queue, world};
use pvio_xenbus::handshake::common::{BackendKind, DeviceAddr};
use pvio_xenbus::handshake::{HandshakeError, vbd, vif};
use pvio_xenbus::wire::{Op, split_string};
use pvio_xenbus::{WatchEvent, Xenstore, XsError};
use pvio_xenstored::LocalClient;

const BASE: &str = "/record/0";

/// Keys below [`BASE`] that were read and written, as in a table.
struct Recorder {
    client: LocalClient,
    read: BTreeSet<String>,
    written: BTreeSet<String>,
}

impl Xenstore for Recorder {
    fn request(&mut self, op: Op, tx_id: u32, parts: &[&[u8]]) -> Result<Vec<u8>, XsError> {
        let keys = match op {
            Op::Read => Some(&mut self.read),
            Op::Write => Some(&mut self.written),
            _ => None,
        };
        if let Some(keys) = keys {
            let payload = parts.concat();
            let path = str::from_utf8(split_string(&payload).unwrap().0).unwrap();
            keys.extend(path.strip_prefix(BASE).unwrap().split('/').skip(1).map(listed));
        }
        self.client.request(op, tx_id, parts)
    }

    fn poll_event(&mut self) -> Result<Option<WatchEvent>, XsError> {
        self.client.poll_event()
    }

    fn wait_event(&mut self, timeout: Option<Duration>) -> Result<Option<WatchEvent>, XsError> {
        self.client.wait_event(timeout)
    }
}

/// Returns a key as tables list it.
fn listed(key: &str) -> String {
    for prefix in ["ring-ref", "queue-"] {
        if key.strip_prefix(prefix).is_some_and(|n| n.parse::<u32>().is_ok()) {
            return format!("{prefix}%u");
        }
    }
    key.into()
}

type Written = Result<(), HandshakeError>;

/// Writes each variant over each other one and reads it again. Together, the variants have all keys.
fn check<R: PartialEq + std::fmt::Debug>(
    name: &str,
    keys: &[&str],
    variants: &[R],
    write: impl Fn(&R, &mut Recorder) -> Written,
    read: impl Fn(&mut Recorder) -> Result<R, HandshakeError>,
) {
    let world = world();
    let (read_keys, written) = (BTreeSet::new(), BTreeSet::new());
    let mut xs = Recorder { client: world.dom0, read: read_keys, written };
    for variant in variants {
        let fresh = |xs: &mut Recorder| {
            xs.client.rm(BASE).unwrap();
            write(variant, xs).unwrap();
            xs.client.directory(BASE).unwrap()
        };
        let expected = fresh(&mut xs);
        for earlier in variants {
            xs.client.rm(BASE).unwrap();
            write(earlier, &mut xs).unwrap();
            write(variant, &mut xs).unwrap();
            assert_eq!(xs.client.directory(BASE).unwrap(), expected, "{name}: {earlier:?} remains");
            assert_eq!(read(&mut xs).as_ref(), Ok(variant), "{name}");
        }
    }
    let table: BTreeSet<String> = keys.iter().map(ToString::to_string).collect();
    assert_eq!(table.len(), keys.len(), "{name}: a key is listed twice");
    assert_eq!(xs.read, table, "{name}: the keys that are read");
    assert_eq!(xs.written, table, "{name}: the keys that are written");
}

fn addr(kind: BackendKind) -> DeviceAddr {
    DeviceAddr::new(kind, BACK, FRONT, 0)
}

#[test]
fn vbd_tables_list_the_keys_that_are_used() {
    let addr = addr(BackendKind::Vbd);
    let back = vbd::ToolstackBack::new(addr, "/srv/disk.img");
    let full = vbd::ToolstackBack {
        script: Some("block".into()),
        physical_device_path: Some("/dev/loop0".into()),
        options: Some("iops=5".into()),
        mode: vbd::Mode::ReadOnly,
        device_type: vbd::DeviceType::Cdrom,
        ..back.clone()
    };
    let write = |r: &vbd::ToolstackBack, xs: &mut Recorder| r.write(xs, BASE);
    let read = |xs: &mut Recorder| vbd::ToolstackBack::read(xs, BASE);
    check("ToolstackBack", vbd::ToolstackBack::KEYS, &[back, full], write, read);

    let front = vbd::ToolstackFront::new(addr, vbd::DeviceType::Disk);
    let write = |r: &vbd::ToolstackFront, xs: &mut Recorder| r.write(xs, BASE);
    let read = |xs: &mut Recorder| vbd::ToolstackFront::read(xs, BASE);
    check("ToolstackFront", vbd::ToolstackFront::KEYS, &[front], write, read);

    let offers = [vbd::BackOffer::default(), offer()];
    let write = |r: &vbd::BackOffer, xs: &mut Recorder| r.write(xs, BASE);
    let read = |xs: &mut Recorder| vbd::BackOffer::read(xs, BASE);
    check("BackOffer", vbd::BackOffer::KEYS, &offers, write, read);

    let disks = offers.map(|offer| vbd::BackDisk {
        sectors: 2048,
        info: vbd::DiskInfo::from_bits(5),
        sector_size: 512,
        physical_sector_size: 4096,
        offer,
    });
    let write = |r: &vbd::BackDisk, xs: &mut Recorder| r.write(xs, BASE);
    let read = |xs: &mut Recorder| vbd::BackDisk::read(xs, BASE);
    check("BackDisk", vbd::BackDisk::KEYS, &disks, write, read);

    let request = |protocol, queues| vbd::FrontRequest { protocol, persistent: true, queues };
    let requests = [
        request(None, vec![queue(1, 1)]),
        request(Some(vbd::Protocol::X86_32), vec![queue(1, 4)]),
        request(Some(vbd::Protocol::Arm), vec![queue(1, 1), queue(9, 1)]),
        request(None, vec![queue(1, 4), queue(9, 4), queue(17, 4)]),
    ];
    let write = |r: &vbd::FrontRequest, xs: &mut Recorder| r.write(xs, BASE);
    let read = |xs: &mut Recorder| vbd::FrontRequest::read(xs, BASE, &offer());
    check("FrontRequest", vbd::FrontRequest::KEYS, &requests, write, read);
}

#[test]
fn vif_tables_list_the_keys_that_are_used() {
    let addr = addr(BackendKind::Vif);
    let mac = "00:16:3e:01:02:03".parse().unwrap();
    let back = vif::ToolstackBack::new(addr, mac);
    let full = vif::ToolstackBack {
        rate: Some(vif::VifRate { bytes: 5, usec: 6 }),
        mtu: Some(9000),
        bridge: Some("xenbr0".into()),
        script: Some("vif-bridge".into()),
        vifname: Some("tap5".into()),
        kind: Some("vif".into()),
        ip: Some("192.0.2.1".into()),
        options: Some("guard=off".into()),
        ..back.clone()
    };
    let write = |r: &vif::ToolstackBack, xs: &mut Recorder| r.write(xs, BASE);
    let read = |xs: &mut Recorder| vif::ToolstackBack::read(xs, BASE);
    check("ToolstackBack", vif::ToolstackBack::KEYS, &[back, full], write, read);

    let front = vif::ToolstackFront::new(addr, mac);
    let full =
        vif::ToolstackFront { mtu: Some(1500), speed: Some(10_000_000_000), ..front.clone() };
    let write = |r: &vif::ToolstackFront, xs: &mut Recorder| r.write(xs, BASE);
    let read = |xs: &mut Recorder| vif::ToolstackFront::read(xs, BASE);
    check("ToolstackFront", vif::ToolstackFront::KEYS, &[front, full], write, read);

    let full = vif::BackOffer {
        max_queues: Some(4),
        split_event_channels: true,
        ctrl_ring: true,
        ..vif::BackOffer::default()
    };
    let offers = [vif::BackOffer::default(), full.clone()];
    let write = |r: &vif::BackOffer, xs: &mut Recorder| r.write(xs, BASE);
    let read = |xs: &mut Recorder| vif::BackOffer::read(xs, BASE);
    check("BackOffer", vif::BackOffer::KEYS, &offers, write, read);

    let queue = |n, split| vif::Queue {
        tx_ring_ref: n,
        rx_ring_ref: n + 1,
        events: if split {
            vif::EventChannels::Split { tx: n, rx: n + 1 }
        } else {
            vif::EventChannels::Shared(n)
        },
    };
    let shared = vif::FrontRequest { queues: vec![queue(1, false)], ..Default::default() };
    let ctrl = Some(vif::ControlRing { ring_ref: 40, event_channel: 41 });
    let requests = [
        shared.clone(),
        vif::FrontRequest { xdp_headroom: 256, sg: true, ctrl, ..shared },
        vif::FrontRequest {
            queues: vec![queue(1, true), queue(3, true)],
            ..vif::FrontRequest::default()
        },
    ];
    let write = |r: &vif::FrontRequest, xs: &mut Recorder| r.write(xs, BASE);
    let read = |xs: &mut Recorder| vif::FrontRequest::read(xs, BASE, &full);
    check("FrontRequest", vif::FrontRequest::KEYS, &requests, write, read);
}

//! Guests with other kernels than dom0's, and with firmware as the guest.

use std::fs;

use anyhow::{Result, ensure};
use serde_json::json;

use super::{BOTH, Guests, NICS, PVIO, Scenario};
use crate::dom0::disk::Medium;
use crate::dom0::guest::{Guest, KERNELS, Kind, Spec};
use crate::dom0::lab::{LONG, Lab, NIC, SHORT, Skip, address};
use crate::net::http;

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "kernel-5.10",
        proves: "a guest with Linux 5.10, whose disks appear before their queues, transfers disk \
                 and network data correctly",
        backends: NICS,
        kinds: BOTH,
        guests: Guests::Own,
        run: |lab| works(lab, "5.10"),
    },
    Scenario {
        name: "kernel-6.12",
        proves: "a guest with Linux 6.12 transfers disk and network data correctly",
        backends: NICS,
        kinds: BOTH,
        guests: Guests::Own,
        run: |lab| works(lab, "6.12"),
    },
    Scenario {
        name: "firmware-ipxe",
        proves: "iPXE's netfront loads two scripts and runs them: the received data is correct",
        backends: PVIO,
        kinds: &[Kind::Hvm],
        guests: Guests::Own,
        run: ipxe,
    },
];

fn works(lab: &mut Lab, kernel: &'static str) -> Result<()> {
    let missing = format!("{KERNELS}/{kernel}.missing");
    if let Ok(why) = fs::read_to_string(&missing) {
        return Err(Skip(format!("Linux {kernel} could not be fetched: {why}")).into());
    }
    let before = lab.settled()?;
    let (disk, line) = lab.disk("xvda", 16, Medium::Device)?;
    let mut spec = Spec::new(lab.kind, lab.backend);
    (spec.disks, spec.nics) = (vec![line], vec![NIC.to_owned()]);
    (spec.kernel, spec.memory) = (Some(kernel), Some(256));
    let mut guest = Guest::start(&spec)?;
    let version = guest.ask("kernel", json!(null), SHORT)?;
    ensure!(
        version.as_str().is_some_and(|it| it.starts_with(kernel)),
        "the guest runs Linux {version}"
    );
    guest.ask("disk-wait", json!("xvda"), SHORT)?;
    let order = json!({ "name": "xvda", "seed": 73, "requests": 200, "mib": 8 });
    let sum = guest.ask("disk-scribble", order, LONG)?;
    ensure!(sum == disk.sum(8)?, "image checksum differs from the guest's");
    guest.ask("disk-flush", json!("xvda"), SHORT)?;
    let address = format!("{}/24", address(&guest, 0));
    guest.ask("nic-up", json!({ "name": "eth0", "address": address }), SHORT)?;
    let echo = json!({ "server": "10.0.0.1", "sizes": [8, 64, 1472, 9000], "rounds": 3 });
    guest.ask("nic-echo", echo, SHORT)?;
    lab.watched(guest, |guest| guest.power_off())?;
    lab.nothing_left(&before)
}

/// Timeout until an HVM guest's firmware starts iPXE under emulation.
const BOOT: std::time::Duration = std::time::Duration::from_secs(150);

fn ipxe(lab: &mut Lab) -> Result<()> {
    let before = lab.settled()?;
    let server = http::serve("10.0.0.1:8069")?;
    // The name of the second script is only known to clients that have read the first one.
    let padding = "# every byte of this comes through a netif ring\n".repeat(300);
    let first = format!("#!ipxe\n{padding}chain http://10.0.0.1:8069/{}\n", server.secret());
    server.offer("/first", first.into_bytes());
    server.offer(&format!("/{}", server.secret()), b"#!ipxe\npoweroff\n".to_vec());
    let mut spec = Spec::new(lab.kind, lab.backend);
    spec.nics = vec!["bridge=xenbr0,script=vif-bridge,type=vif".to_owned()];
    spec.loader = Some("ipxe.lkrn");
    spec.extra = Some(
        "ifopen net0 && set net0/ip 10.0.0.77 && set net0/netmask 255.255.255.0 && \
         chain http://10.0.0.1:8069/first"
            .to_owned(),
    );
    let mut guest = Guest::start_alone(&spec)?;
    let fetched = server.wait_for(&format!("/{}", server.secret()), BOOT);
    ensure!(fetched, "iPXE fetched {:?}", server.requests());
    guest.destroy()?;
    lab.nothing_left(&before)
}

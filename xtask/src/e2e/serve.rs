//! Disk images' files, fetched from the guest; an orderly shutdown.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::image::{self, Entry};
use super::machine::Machine;
use super::{Checks, World, fetch, inputs, proc};
use crate::{exec, tools};

/// Tests an ext4 image, a FAT image, and the demo image.
pub fn run(world: &World, checks: &mut Checks) -> Result<()> {
    let folder = world.dir().join("ext4");
    image::folder(&folder, false)?;
    let disk = image::ext4(world.dir().join("ext4.img"), &folder)?;
    ext4(world, checks, &disk, &folder)?;

    let folder = world.dir().join("fat");
    image::folder(&folder, true)?;
    let disk = image::fat(world.dir().join("fat.img"), &folder)?;
    let entries = image::entries(&folder)?;
    checks.check("fat: every file arrives whole", || {
        let mut machine = Machine::start(world, &["run", "--disk", text(&disk), "--nic"])?;
        let url = machine.url()?;
        fetch::all(world, &url, &entries, true)?;
        end(&mut machine)
    });
    checks.check("demo image: what its SHA256SUMS names arrives whole", || {
        let mut machine = Machine::start(world, &["run", "--nic"])?;
        let url = machine.url()?;
        let entries = sums(&fetch::text(world, &format!("{url}SHA256SUMS"))?)?;
        ensure!(entries.len() > 3, "only {} files", entries.len());
        fetch::all(world, &url, &entries, false)?;
        end(&mut machine)
    });
    Ok(())
}

/// Runs all checks that use the same machine, one after another.
fn ext4(world: &World, checks: &mut Checks, disk: &Path, folder: &Path) -> Result<()> {
    let entries = image::entries(folder)?;
    let started = checks.check("ext4: the guest has an address", || {
        let mut machine = Machine::start(world, &["run", "--disk", text(disk), "--nic"])?;
        let url = machine.url()?;
        Ok((machine, url))
    });
    let Some((mut machine, url)) = started else { return Ok(()) };

    checks.check("ext4: every file arrives whole, one connection", || {
        fetch::all(world, &url, &entries, false)
    });
    checks.check("ext4: every file arrives whole, eight connections", || {
        fetch::all(world, &url, &entries, true)
    });
    checks.check("ext4: a part of a file is that part", || {
        let big = folder.join("big.bin");
        fetch::range(world, &format!("{url}big.bin"), &big, 1_000_001, 3_333_333)
    });
    checks.check("what is not on the disk is not found", || {
        let status = fetch::status(world, &format!("{url}no/such/file"))?;
        ensure!(status == "404", "HTTP status {status}");
        Ok(())
    });
    checks.check("/ is a page that lists the disk", || {
        let page = fetch::text(world, &url)?;
        ensure!(page.contains("<html") && page.contains("big.bin"), "it says:\n{page}");
        Ok(())
    });
    checks.check("status.json shows both devices connected", || {
        connected(&fetch::text(world, &format!("{url}.pvio/status.json"))?)
    });
    checks.check("xenstore-ls shows both devices in state 4", || {
        in_state_4(&xenstore_ls(&machine.state.join("xenstore.sock"))?)
    });
    checks.check("with nothing to do, nothing spins", || proc::idle(&machine.processes()));
    checks.check("a disk in use is refused, and why", || {
        let state = world.dir().join("other");
        let what = format!("disk image {} is in use by another program", disk.display());
        let help = "stop that program first, or open the image read-only in both";
        let arguments = ["check", "--disk", text(disk), "--overwrite"];
        inputs::refused(world, &arguments, &state, &what, help)
    });
    checks.check("a state directory in use is refused, and why", || {
        let what = format!("a pvio hypervisor is running in {} already", machine.state.display());
        let help = "stop it, or name another directory";
        inputs::refused(world, &["run", "--disk", text(disk)], &machine.state, &what, help)
    });
    checks.check("Ctrl-C ends it with exit code 0, and nothing is left", || end(&mut machine));
    Ok(())
}

/// Sends SIGINT; checks for exit code 0 and that nothing is left.
pub fn end(machine: &mut Machine<'_>) -> Result<()> {
    let status = machine.interrupt()?;
    ensure!(status.success(), "after Ctrl-C: {status}; pvio said:\n{}", machine.log());
    machine.nothing_left()
}

/// Checks that frontend and backend of both devices are connected.
fn connected(json: &str) -> Result<()> {
    let status: Value = serde_json::from_str(json).with_context(|| format!("not JSON:\n{json}"))?;
    for kind in ["disk", "nic"] {
        let devices = status["devices"].as_array().into_iter().flatten();
        let device = devices.into_iter().find(|device| device["kind"] == kind);
        let device = device.with_context(|| format!("no {kind} in:\n{json}"))?;
        let states = [&device["state"], &device["backend_state"]];
        ensure!(states.iter().all(|state| *state == "Connected"), "{kind} is {states:?}");
    }
    ensure!(status["fs"].is_object(), "no file system in:\n{json}");
    Ok(())
}

/// Returns the whole xenstore, one line per node: `/local/domain/2/device/vbd/51712/state = "4"`.
fn xenstore_ls(socket: &Path) -> Result<String> {
    let mut list = tools::program("xenstore-ls")?;
    // `-s` forces the socket, instead of a detection of Xen.
    list.args(["-s", "-f"]).env("XENSTORED_PATH", socket);
    exec::succeed(&mut list, Duration::from_secs(20))
}

/// Checks that frontend and backend of a disk and a NIC have state 4.
fn in_state_4(listing: &str) -> Result<()> {
    for place in ["/device/vbd/", "/device/vif/", "/backend/vbd/", "/backend/vif/"] {
        let lines = listing.lines().filter_map(|line| line.split_once(" = "));
        let mut states = lines
            .filter(|(path, _)| path.contains(place) && path.ends_with("/state"))
            .map(|(_, state)| state.trim());
        let state = states.next().with_context(|| format!("no {place} in:\n{listing}"))?;
        ensure!(state == "\"4\"", "{place}…/state is {state}");
    }
    Ok(())
}

/// Parses a SHA256SUMS file.
fn sums(file: &str) -> Result<Vec<Entry>> {
    let entry = |line: &str| {
        let (hex, path) = line.split_once("  ")?;
        let mut sum = [0; 32];
        for (byte, digits) in sum.iter_mut().zip(hex.as_bytes().chunks(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
        }
        (hex.len() == 64).then(|| Entry { path: path.to_owned(), sum })
    };
    let entries = file.lines().map(|line| entry(line).with_context(|| format!("no sum: {line}")));
    entries.collect()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("the scratch folder's path is text")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_not_in_connected_state_is_detected() {
        let both = "/local/domain/2/device/vbd/51712/state = \"4\"\n\
                    /local/domain/2/device/vif/0/state = \"4\"\n\
                    /local/domain/1/backend/vbd/2/51712/state = \"4\"\n\
                    /local/domain/1/backend/vif/2/0/state = \"4\"\n";
        assert!(in_state_4(both).is_ok());
        assert!(in_state_4(&both.replacen('4', "5", 4)).is_err());
        assert!(in_state_4(&both[..60]).is_err());
    }

    #[test]
    fn sha256_list_is_parsed() {
        let hex = "ab".repeat(32);
        let entries = sums(&format!("{hex}  docs/a b.txt\n")).unwrap();
        assert_eq!((entries[0].path.as_str(), entries[0].sum), ("docs/a b.txt", [0xab; 32]));
        assert!(sums("abc  short\n").is_err());
    }
}

//! Domains that are killed while in use. A driver domain is restarted and its guest continues. If
//! the guest or the hypervisor ends, everything ends, nothing is left, and no process is in a busy
//! loop.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use rustix::process::Signal;

use super::image::{self, Entry};
use super::machine::Machine;
use super::{Checks, World, fetch, proc, serve};
use crate::exec::{Group, succeed};

/// Kills each process of a machine once.
pub fn run(world: &World, checks: &mut Checks) -> Result<()> {
    let folder = world.dir().join("ext4");
    let disk = world.dir().join("ext4.img").display().to_string();
    let big = Entry { path: "big.bin".to_owned(), sum: image::sum(&folder.join("big.bin"))? };
    let arguments = ["run", "--disk", disk.as_str(), "--nic"];

    checks.check("guest killed in the middle of a download", || {
        let mut machine = Machine::start(world, &arguments)?;
        let url = machine.url()?;
        let download = slow_download(world, &url)?;
        machine.kill(machine.domain("guest")?, Signal::KILL)?;
        let status = machine.wait()?;
        drop(download);
        let log = machine.log();
        ensure!(status.code() == Some(1), "{status}:\n{log}");
        let why =
            "pvio: the guest ended unexpectedly (killed), and all other processes were stopped";
        ensure!(log.lines().any(|line| line == why), "it does not say why:\n{log}");
        machine.nothing_left()
    });
    checks.check("driver domain killed in the middle of a download", || {
        let mut machine = Machine::start(world, &arguments)?;
        let url = machine.url()?;
        let download = slow_download(world, &url)?;
        machine.kill(machine.domain("driver")?, Signal::KILL)?;
        recovered(world, &mut machine, &big)?;
        drop(download);
        serve::end(&mut machine)
    });
    checks.check("driver domain killed while nothing happens", || {
        let mut machine = Machine::start(world, &arguments)?;
        machine.url()?;
        machine.kill(machine.domain("driver")?, Signal::KILL)?;
        recovered(world, &mut machine, &big)?;
        proc::idle(&machine.processes())?;
        serve::end(&mut machine)
    });
    checks.check("hypervisor killed: its domains end, and its directory can be used again", || {
        let mut machine = Machine::start(world, &arguments)?;
        machine.url()?;
        machine.kill(machine.id(), Signal::KILL)?;
        machine.wait()?;
        machine.no_process_left()?;
        let mut again = Machine::start_in(world, &machine.state, &arguments)?;
        again.url()?;
        serve::end(&mut again)
    });
    Ok(())
}

/// Starts a download of the big file that takes some time.
fn slow_download(world: &World, url: &str) -> Result<Group> {
    let to = world.dir().join("slow.bin");
    let _ = std::fs::remove_file(&to);
    let mut curl = fetch::curl(world)?;
    curl.args(["--limit-rate", "2M", "--max-time", "60", "--output"]).arg(&to);
    curl.arg(format!("{url}big.bin"));
    let curl = Group::spawn(curl.stdin(Stdio::null()).stderr(Stdio::null()))?;
    for _ in 0..400 {
        if std::fs::metadata(&to).is_ok_and(|file| file.len() > 1 << 20) {
            return Ok(curl);
        }
        if let Some(status) = curl.ended()? {
            bail!("the download ended with {status} before enough of it was received");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    bail!("the download does not begin")
}

/// Waits until the machine serves the complete big file again.
fn recovered(world: &World, machine: &mut Machine<'_>, big: &Entry) -> Result<()> {
    let restarted = "the driver domain ended (killed) and was started again";
    machine.wait_for("a new driver domain", |machine| {
        Ok(machine.log().contains(restarted).then_some(()))
    })?;
    let url = machine.url()?;
    machine.wait_for("an answer", |_| {
        let mut curl = fetch::curl(world)?;
        curl.args(["--max-time", "5", "--output", "/dev/null"]);
        let asked = succeed(curl.arg(format!("{url}.pvio/status.json")), Duration::from_secs(10));
        Ok(asked.ok())
    })?;
    fetch::all(world, &url, std::slice::from_ref(big), false)
}

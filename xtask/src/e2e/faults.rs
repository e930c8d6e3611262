//! A domain killed while it works: the others recover or end, and nothing is left or spins.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;

use super::image::{self, Entry};
use super::machine::Machine;
use super::{Checks, World, fetch, proc, serve};
use crate::exec::{Group, succeed};

/// Each process of the machine killed once.
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
        let survived = settle(world, &mut machine, &big)?;
        drop(download);
        close(&mut machine, survived)
    });
    checks.check("driver domain killed in the middle of a download", || {
        let mut machine = Machine::start(world, &arguments)?;
        let url = machine.url()?;
        let download = slow_download(world, &url)?;
        machine.kill(machine.domain("driver")?, Signal::KILL)?;
        let survived = settle(world, &mut machine, &big)?;
        drop(download);
        close(&mut machine, survived)
    });
    checks.check("driver domain killed while nothing happens", || {
        let mut machine = Machine::start(world, &arguments)?;
        machine.url()?;
        machine.kill(machine.domain("driver")?, Signal::KILL)?;
        let survived = settle(world, &mut machine, &big)?;
        close(&mut machine, survived)
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

/// A download of the big file that has begun and will take a while.
fn slow_download(world: &World, url: &str) -> Result<Group> {
    let to = world.dir().join("slow.bin");
    let _ = std::fs::remove_file(&to);
    let mut curl = fetch::curl(world)?;
    curl.args(["--limit-rate", "2M", "--max-time", "60", "--output"]).arg(&to);
    curl.arg(format!("{url}big.bin"));
    let mut curl = Group::spawn(curl.stdin(Stdio::null()).stderr(Stdio::null()))?;
    for _ in 0..400 {
        if std::fs::metadata(&to).is_ok_and(|file| file.len() > 1 << 20) {
            return Ok(curl);
        }
        if let Some(status) = curl.ended()? {
            bail!("the download ended with {status} before it was well begun");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    bail!("the download does not begin")
}

/// Waits until the machine serves the big file whole again (true) or ended by itself (false).
fn settle(world: &World, machine: &mut Machine<'_>, big: &Entry) -> Result<bool> {
    for _ in 0..60 {
        if let Some(status) = machine.ended()? {
            ensure!(status.code().is_some(), "pvio died of {status}:\n{}", machine.log());
            return Ok(false);
        }
        // It may have another address by now.
        let url = machine.last_url().context("it had an address")?;
        let mut curl = fetch::curl(world)?;
        curl.args(["--max-time", "5", "--output", "/dev/null", &format!("{url}.pvio/status.json")]);
        if succeed(&mut curl, Duration::from_secs(10)).is_ok() {
            fetch::all(world, &url, std::slice::from_ref(big), false)?;
            return Ok(true);
        }
        std::thread::sleep(Duration::from_millis(500));
    }
    bail!("neither recovered nor ended; pvio said:\n{}", machine.log())
}

/// A machine that survived is at rest and ends like any other; one that did not said why.
fn close(machine: &mut Machine<'_>, survived: bool) -> Result<()> {
    if survived {
        proc::idle(&machine.processes())?;
        return serve::end(machine);
    }
    let log = machine.log();
    let says_why = log.lines().any(|line| line.starts_with("error: "));
    ensure!(says_why, "it ended without a line that says why:\n{log}");
    machine.nothing_left()
}

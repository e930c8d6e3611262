//! What the command says when it cannot do what it is asked: one line, which is the right one.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{Checks, World, image};
use crate::exec::{self, Group};

/// Disks that are none.
pub fn run(world: &World, checks: &mut Checks) -> Result<()> {
    let dir = world.dir();
    let path = |name: &str| dir.join(name).display().to_string();
    image::blank(&dir.join("odd.img"), 1000)?;
    image::blank(&dir.join("none.img"), 0)?;
    fs::create_dir(dir.join("folder"))?;
    let odd = |name, size| {
        format!(
            "disk image {0} has {size} bytes, which is not a positive multiple of 512; \
             round it up: truncate -s %512 {0}",
            path(name)
        )
    };
    let cases = [
        (
            "missing.img",
            format!(
                "disk image {0} does not exist; check the path, or make one: truncate -s 1G {0}",
                path("missing.img")
            ),
        ),
        (
            "folder",
            format!("{} is neither a file nor a block device; name a disk image", path("folder")),
        ),
        ("odd.img", odd("odd.img", 1000)),
        ("none.img", odd("none.img", 0)),
    ];
    for (disk, expected) in cases {
        checks.check(&format!("refused, and why: {disk}"), || {
            let arguments = ["run", "--disk", &path(disk), "--nic"];
            refused(world, &arguments, &dir.join("refused"), &expected)
        });
    }
    Ok(())
}

/// Runs the command, which must fail, print nothing but one line on standard error that ends with
/// `expected`, and leave nothing running.
pub fn refused(world: &World, arguments: &[&str], state: &Path, expected: &str) -> Result<()> {
    let before = world.net.processes()?;
    let out = world.dir().join("refused.out");
    let err = world.dir().join("refused.err");
    let mut command = world.net.command(&world.pvio)?;
    command.args(arguments).arg("--state-dir").arg(state).stdin(Stdio::null());
    command.stdout(fs::File::create(&out)?).stderr(fs::File::create(&err)?);
    let status = Group::spawn(&mut command)?.wait(Duration::from_secs(30));
    let (out, err) = (fs::read_to_string(out)?, fs::read_to_string(err)?);
    let said = format!("it said:\n{out}{err}");
    let status = status.with_context(|| said.clone())?;
    ensure!(!status.success(), "{}: took it; {said}", exec::shown(&command));
    ensure!(status.code().is_some(), "{}: {status}; {said}", exec::shown(&command));
    ensure!(err.lines().count() == 1 && out.is_empty(), "not one line of error; {said}");
    ensure!(err.trim_end().ends_with(expected), "expected: {expected}\n{said}");
    let mut left = world.net.processes()?;
    left.retain(|pid| !before.contains(pid));
    ensure!(left.is_empty(), "processes left: {left:?}");
    Ok(())
}

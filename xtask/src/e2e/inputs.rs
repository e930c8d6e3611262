//! The command's messages for invalid input: a line with the problem, and one with the remedy.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{Checks, World, image};
use crate::exec::{self, Group};

/// Runs the command with invalid disks.
pub fn run(world: &World, checks: &mut Checks) -> Result<()> {
    let dir = world.dir();
    let path = |name: &str| dir.join(name).display().to_string();
    image::blank(&dir.join("odd.img"), 1000)?;
    image::blank(&dir.join("none.img"), 0)?;
    fs::create_dir(dir.join("folder"))?;
    let odd = |name, size, larger| {
        let disk = path(name);
        (
            format!("disk image {disk} has {size} bytes, which is not a positive multiple of 512"),
            format!(
                "check that it was copied whole, then make it larger, to {larger} bytes (truncate -s \
                 {larger} for a raw file, qemu-img resize for others)"
            ),
        )
    };
    let missing = path("missing.img");
    let cases = [
        (
            "missing.img",
            (
                format!("disk image {missing} does not exist"),
                "check the path, and that the file system it is on is mounted".to_owned(),
            ),
        ),
        (
            "folder",
            (
                format!("{} is neither a file nor a block device", path("folder")),
                "name a disk image".to_owned(),
            ),
        ),
        ("odd.img", odd("odd.img", 1000, 1024)),
        ("none.img", odd("none.img", 0, 512)),
    ];
    for command in ["run", "check"] {
        for (disk, (what, help)) in &cases {
            checks.check(&format!("{command} refuses, and says why: {disk}"), || {
                let state = dir.join("refused");
                refused(world, &[command, "--disk", &path(disk)], &state, what, help)
            });
        }
    }
    checks.check("check refuses to overwrite what is no scratch image", || {
        let disk = path("ext4.img");
        let bytes = fs::read(&disk)?;
        let first = bytes.iter().position(|byte| *byte != 0).context("an image of something")?;
        let what = format!(
            "{disk} cannot be overwritten: it holds an ext2/3/4 file system (first at byte {first})"
        );
        let help =
            format!("use an empty scratch image, or destroy the data in {disk} with --overwrite");
        refused(world, &["check", "--disk", &disk], &dir.join("refused"), &what, &help)?;
        ensure!(fs::read(&disk)? == bytes, "and yet it changed");
        Ok(())
    });
    Ok(())
}

/// Runs the command, which must exit with code 2, print a line with the problem and one
/// with the remedy, and leave no process.
pub fn refused(
    world: &World,
    arguments: &[&str],
    state: &Path,
    what: &str,
    help: &str,
) -> Result<()> {
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
    ensure!(status.code() == Some(2), "{}: {status}; {said}", exec::shown(&command));
    let expected = format!("pvio: {what}\nhelp: {help}\n");
    ensure!(err == expected && out.is_empty(), "expected:\n{expected}{said}");
    let mut left = world.net.processes()?;
    left.retain(|pid| !before.contains(pid));
    ensure!(left.is_empty(), "processes left: {left:?}");
    Ok(())
}

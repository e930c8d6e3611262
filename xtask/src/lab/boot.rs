//! QEMU running Xen and dom0: its console, its end; no process survives.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result};

use super::cache::Cache;
use crate::exec::Group;
use crate::tools;

/// Number of the console's last lines that are printed on a failure.
const TAIL: usize = 60;

/// All features that QEMU can emulate, except those that it emulates wrongly for Xen. With SMAP no
/// PV dom0 boots. With XSAVE the vector registers are sometimes lost (about one in thirty programs
/// crashed because of that).
const CPU: &str = "max,-smap,-xsave";

/// Configuration of a boot.
pub struct Machine<'a> {
    pub cache: &'a Cache,
    /// dom0's image.
    pub image: &'a Path,
    /// A directory of the host that is `/share` in dom0.
    pub share: &'a Path,
    /// Arguments for dom0's kernel command line.
    pub words: &'a str,
    /// Derive the clock from the number of executed instructions.
    pub icount: bool,
}

/// A booted machine; QEMU is killed when it is dropped.
pub struct Boot {
    qemu: Group,
    tail: Arc<Mutex<VecDeque<String>>>,
}

impl Machine<'_> {
    /// Returns QEMU's command. QEMU's options are separated by commas, so every file has a plain
    /// name in `dir`.
    fn command(&self, dir: &Path, serial: &str) -> Result<Command> {
        for (name, to) in [
            ("xen", self.cache.xen()),
            ("vmlinux", self.cache.vmlinux()),
            ("initrd", self.image.to_path_buf()),
            ("share", self.share.to_path_buf()),
        ] {
            let link = dir.join(name);
            if link.symlink_metadata().is_ok() {
                std::fs::remove_file(&link)?;
            }
            symlink(to, link)?;
        }
        let mut qemu = tools::program("qemu-system-x86_64")?;
        qemu.current_dir(dir);
        qemu.args(["-accel", "tcg", "-cpu", CPU, "-smp", "1", "-m", "3G"]);
        qemu.args(["-display", "none", "-serial", serial, "-monitor", "none", "-nic", "none"]);
        qemu.args(["-no-reboot", "-kernel", "xen"]);
        qemu.args(["-append", "console=com1 com1=115200 dom0_mem=1792M,max:1792M loglvl=all"]);
        let linux = format!("vmlinux console=hvc0 panic=-1 {},initrd", self.words);
        qemu.arg("-initrd").arg(linux);
        qemu.args(["-virtfs", "local,path=share/,mount_tag=share,security_model=none"]);
        if self.icount {
            qemu.args(["-icount", "shift=1,sleep=off"]);
        }
        Ok(qemu)
    }

    /// Starts the machine; the log of its console is written to `dir`.
    pub fn start(&self, dir: &Path, log: &str) -> Result<Boot> {
        let mut command = self.command(dir, "stdio")?;
        let (mut read, write) = std::io::pipe()?;
        command.stdin(Stdio::null()).stdout(write.try_clone()?).stderr(write);
        let mut file = File::create(dir.join(log)).context("the console's log")?;
        let qemu = Group::spawn(&mut command)?;
        drop(command);
        let tail = Arc::new(Mutex::new(VecDeque::new()));
        let lines = Arc::clone(&tail);
        thread::spawn(move || {
            let mut line = Vec::new();
            let mut bytes = [0; 4096];
            while let Ok(n @ 1..) = read.read(&mut bytes) {
                let _ = file.write_all(&bytes[..n]);
                for byte in &bytes[..n] {
                    if *byte != b'\n' {
                        line.push(*byte);
                        continue;
                    }
                    let mut lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
                    if lines.len() == TAIL {
                        lines.pop_front();
                    }
                    lines.push_back(String::from_utf8_lossy(&line).trim_end().to_owned());
                    line.clear();
                }
            }
        });
        Ok(Boot { qemu, tail })
    }

    /// Runs the machine with this terminal as its console, until it ends. Ctrl-A X ends QEMU.
    pub fn interactive(&self, dir: &Path) -> Result<bool> {
        let mut qemu = self.command(dir, "mon:stdio")?;
        Ok(qemu.status().context("run QEMU")?.success())
    }
}

impl Boot {
    /// Returns whether QEMU has ended.
    pub fn ended(&self) -> Result<bool> {
        Ok(self.qemu.ended()?.is_some())
    }

    /// Returns the last lines of the console.
    pub fn tail(&self, lines: usize) -> String {
        let tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        let skipped = tail.len().saturating_sub(lines);
        tail.iter().skip(skipped).map(|line| format!("{line}\n")).collect()
    }
}

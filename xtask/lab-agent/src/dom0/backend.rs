//! Whose backends serve. One at a time: a backend takes every device of its kind it sees.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

use super::outcome::Skip;
use super::wait::wait_until;
use crate::sys::{self, modules};

/// Who serves the guests' devices.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// `pvio serve`, disks and NICs.
    Pvio,
    /// The kernel's xen-blkback and xen-netback.
    Linux,
    /// Disks by a QEMU process for each guest; NICs by xen-netback.
    Qdisk,
    /// Disks by a pvio process for each guest, which `xl` takes for QEMU; NICs by xen-netback.
    #[serde(rename = "pvio-dm")]
    PvioDm,
}

/// Further words for `pvio serve`.
pub type Words = &'static [&'static str];

/// pvio, by the name that makes it a device model.
pub const DEVICE_MODEL: &str = "/usr/bin/pvio-dm";
const PVIO: &str = "/usr/bin/pvio";
/// Its log.
pub const PVIO_LOG: &str = "/var/log/pvio.log";
/// What it printed.
pub const PVIO_OUTPUT: &str = "/var/log/pvio.out";
const KERNELS: &[&str] = &["xen-netback", "xen-blkback"];
/// What it defaults to; said, so that the next scenario gets one started anew.
const BESIDE: Words = &["--on-stop", "close"];

/// What serves now.
#[derive(Default)]
pub struct Backends {
    pvio: Option<(Child, Words)>,
    kernels: bool,
}

impl Backends {
    /// Makes `backend` serve, and nothing else.
    ///
    /// # Errors
    /// It does not start, or the one before does not stop; [`Skip`] if there is no such backend.
    pub fn serve(&mut self, backend: Backend, words: Words) -> Result<()> {
        if backend == Backend::Pvio {
            if self.pvio.as_ref().is_some_and(|(_, running)| *running == words) {
                return Ok(());
            }
            self.stop()?;
            return self.start_pvio(words);
        }
        if backend == Backend::PvioDm && !fs::exists(DEVICE_MODEL)? {
            return Err(Skip("pvio was not built for this run".to_owned()).into());
        }
        if self.kernels && self.pvio.is_none() {
            return Ok(());
        }
        self.stop()?;
        self.load_kernels()
    }

    /// Makes both serve: the kernel what is its own, and pvio the kinds nobody else claims.
    ///
    /// # Errors
    /// As for [`serve`](Self::serve).
    pub fn serve_beside_kernel(&mut self) -> Result<()> {
        self.stop()?;
        self.load_kernels()?;
        self.start_pvio(BESIDE)
    }

    fn load_kernels(&mut self) -> Result<()> {
        for name in KERNELS {
            modules::load(name)?;
        }
        self.kernels = true;
        Ok(())
    }

    /// The process under test, while it serves.
    pub fn pvio(&self) -> Option<u32> {
        self.pvio.as_ref().map(|(child, _)| child.id())
    }

    /// Kills pvio as a crash would.
    ///
    /// # Errors
    /// It does not run.
    pub fn kill_pvio(&mut self) -> Result<()> {
        let (mut child, _) = self.pvio.take().context("pvio does not serve")?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Checks that pvio, if it should serve, lives.
    ///
    /// # Errors
    /// It does not.
    pub fn alive(&mut self) -> Result<()> {
        if let Some((child, _)) = &mut self.pvio
            && let Some(status) = child.try_wait()?
        {
            self.pvio = None;
            bail!("pvio serve ended: {status}");
        }
        Ok(())
    }

    /// Ends whatever serves, in good order.
    ///
    /// # Errors
    /// It does not end.
    pub fn stop(&mut self) -> Result<()> {
        if let Some((mut child, _)) = self.pvio.take() {
            let _ = kill_process(Pid::from_child(&child), Signal::TERM);
            let ended = wait_until(Duration::from_secs(20), || Ok(child.try_wait()?.is_some()))?;
            if !ended {
                child.kill()?;
                child.wait()?;
                bail!("pvio serve did not end within 20 s of SIGTERM");
            }
        }
        if self.kernels {
            for name in KERNELS {
                modules::unload(name)?;
            }
            self.kernels = false;
        }
        Ok(())
    }

    fn start_pvio(&mut self, words: Words) -> Result<()> {
        if !fs::exists(PVIO)? {
            return Err(Skip("pvio was not built for this run".to_owned()).into());
        }
        let help = sys::run(&[PVIO, "serve", "--help"], Duration::from_secs(10))?;
        if !help.status.success() {
            return Err(Skip("this pvio has no `serve`".to_owned()).into());
        }
        let mut serve = Command::new(PVIO);
        serve.args(["serve", "--log", PVIO_LOG]).args(words);
        let output = File::options().create(true).append(true).open(PVIO_OUTPUT)?;
        serve.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(output);
        let mut child = serve.spawn().context("start pvio serve")?;
        let lines = BufReader::new(child.stdout.take().context("its output")?).lines();
        let (sender, ready) = channel();
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                if line.trim() == "ready" {
                    let _ = sender.send(());
                }
            }
        });
        if ready.recv_timeout(Duration::from_secs(20)).is_err() {
            child.kill()?;
            let status = child.wait()?;
            let said = fs::read_to_string(PVIO_OUTPUT).unwrap_or_default();
            bail!("pvio serve was not ready within 20 s ({status}): {}", said.trim_end());
        }
        self.pvio = Some((child, words));
        Ok(())
    }
}

//! The backends under test. Only one serves at a time, since a backend takes every device of its
//! kind.

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

/// The backends that serve the guests' devices.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// `pvio serve`: disks and NICs.
    Pvio,
    /// The kernel's xen-blkback and xen-netback.
    Linux,
    /// Disks: a QEMU process for each guest; NICs: xen-netback.
    Qdisk,
    /// Disks: a pvio process for each guest, started by `xl` in place of QEMU; NICs: xen-netback.
    #[serde(rename = "pvio-dm")]
    PvioDm,
}

/// Further arguments of `pvio serve`.
pub type Words = &'static [&'static str];

/// Path of pvio under the name that makes it a device model.
pub const DEVICE_MODEL: &str = "/usr/bin/pvio-dm";
const PVIO: &str = "/usr/bin/pvio";
/// Log of pvio.
pub const PVIO_LOG: &str = "/var/log/pvio.log";
/// Output of pvio.
pub const PVIO_OUTPUT: &str = "/var/log/pvio.out";
const KERNELS: &[&str] = &["xen-netback", "xen-blkback"];
/// Arguments with the default values. They differ from no arguments, so that the next scenario
/// starts a new process.
const BESIDE: Words = &["--on-stop", "close"];

/// The backends that are running.
#[derive(Default)]
pub struct Backends {
    pvio: Option<(Child, Words)>,
    kernels: bool,
}

impl Backends {
    /// Starts `backend` and stops the others.
    ///
    /// # Errors
    /// It does not start, or another one does not stop; [`Skip`] if the backend is not available.
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

    /// Starts the kernel's backends, and pvio for the kinds that the kernel does not serve.
    ///
    /// # Errors
    /// Those of [`serve`](Self::serve).
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

    /// Returns the process id of `pvio serve`, if it is running.
    pub fn pvio(&self) -> Option<u32> {
        self.pvio.as_ref().map(|(child, _)| child.id())
    }

    /// Kills pvio with SIGKILL.
    ///
    /// # Errors
    /// It is not running.
    pub fn kill_pvio(&mut self) -> Result<()> {
        let (mut child, _) = self.pvio.take().context("pvio does not serve")?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Checks that `pvio serve` has not ended unexpectedly.
    ///
    /// # Errors
    /// It has.
    pub fn alive(&mut self) -> Result<()> {
        if let Some((child, _)) = &mut self.pvio
            && let Some(status) = child.try_wait()?
        {
            self.pvio = None;
            bail!("pvio serve ended: {status}");
        }
        Ok(())
    }

    /// Stops all backends with SIGTERM.
    ///
    /// # Errors
    /// A backend does not end.
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

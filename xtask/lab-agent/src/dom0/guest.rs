//! A guest: created by `xl`, controlled over its console, destroyed.

use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::backend::{Backend, DEVICE_MODEL};
use super::console::Console;
use super::wait::{LONG, wait_until};
use super::{words, xs};
use crate::link::{HELLO, Request};
use crate::sys::{self, run::Flake, took};

/// The type of a guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Paravirtual.
    Pv,
    /// With (emulated) hardware virtualisation, without a device model.
    Pvh,
    /// With hardware virtualisation, a device model and firmware.
    Hvm,
}

/// Programs in a guest's image, in addition to the agent, `ip` and `ethtool`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Programs {
    /// None.
    Few,
    /// mke2fs, e2fsck, fstrim, blkdiscard, ping, iperf3.
    Tools,
    /// Those and fio.
    Fio,
    /// pvio, for a driver domain.
    Pvio,
}

impl Programs {
    /// Returns the parts of the image, each of which is a file in `/lab`.
    fn parts(self) -> &'static [&'static str] {
        match self {
            Self::Few => &["guest"],
            Self::Tools => &["guest", "tools"],
            Self::Fio => &["guest", "tools", "fio"],
            Self::Pvio => &["guest", "pvio"],
        }
    }

    /// Returns the memory in MiB of a guest with one processor.
    fn memory(self) -> u32 {
        match self {
            Self::Few => 160,
            Self::Tools | Self::Pvio => 256,
            Self::Fio => 512,
        }
    }

    /// Returns the image, with the modules of `kernel` if it is not the default one. The image is
    /// assembled on first use.
    fn ramdisk(self, kernel: Option<&str>) -> Result<PathBuf> {
        let parts = self.parts().iter().map(|part| format!("/lab/{part}.cpio"));
        let modules = kernel.map(|name| format!("{KERNELS}/modules-{name}.cpio"));
        let parts: Vec<_> = parts.chain(modules).collect();
        if let [alone] = &parts[..] {
            return Ok(PathBuf::from(alone));
        }
        let names: Vec<_> = parts.iter().filter_map(|part| part.rsplit('/').next()).collect();
        let whole = PathBuf::from(format!("/run/{}", names.join("+")));
        if !whole.exists() {
            let mut out = File::create(&whole)?;
            for part in &parts {
                io::copy(&mut File::open(part)?, &mut out)?;
            }
        }
        Ok(whole)
    }
}

/// Configuration of a guest.
#[derive(Clone)]
pub struct Spec {
    /// Its type.
    pub kind: Kind,
    /// Entries of `disk=[…]`.
    pub disks: Vec<String>,
    /// Entries of `vif=[…]`.
    pub nics: Vec<String>,
    /// The program that `xl` starts as its device model, if not the default one.
    pub device_model: Option<&'static str>,
    /// The kernel or boot loader to boot, if not the default kernel.
    pub loader: Option<&'static str>,
    /// Name of another Debian kernel, in [`KERNELS`].
    pub kernel: Option<&'static str>,
    /// The complete command line of what boots, if that is not the agent's kernel.
    pub extra: Option<String>,
    /// Number of processors.
    pub processors: u32,
    /// Memory in MiB, if not the default for its devices and programs.
    pub memory: Option<u32>,
    /// Programs in its image.
    pub programs: Programs,
    /// Further lines of its configuration.
    pub lines: Vec<String>,
    /// Arguments of the agent on the kernel's command line.
    pub words: String,
}

/// A running guest; destroyed when dropped.
pub struct Guest {
    /// Name of the domain.
    pub name: String,
    /// Number of the domain.
    pub domain: u32,
    console: Console,
    number: u64,
    ended: bool,
}

/// Directory of other kernels, which the host provides: `vmlinux-NAME` and `modules-NAME.cpio`, or
/// `NAME.missing` with the reason.
pub const KERNELS: &str = "/share/kernels";

/// Timeout of a boot. An HVM guest takes a minute under emulation on an idle machine.
const BOOT: Duration = Duration::from_secs(150);
const XL: Duration = Duration::from_secs(60);

impl Guest {
    /// Creates a guest and waits until its agent is ready.
    ///
    /// # Errors
    /// `xl` fails, or the guest does not boot.
    pub fn start(spec: &Spec) -> Result<Self> {
        let mut guest = Self::start_alone(spec)?;
        guest.hello()?;
        Ok(guest)
    }

    /// Creates a guest and does not wait for an agent.
    ///
    /// # Errors
    /// `xl` fails.
    pub fn start_alone(spec: &Spec) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(1);
        let name = format!("guest{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let file = format!("/run/{name}.cfg");
        fs::write(&file, spec.config(&name)?)?;
        let made = sys::succeed(&["xl", "create", "-q", &file], XL);
        if made.is_err() {
            let _ = sys::run(&["xl", "destroy", &name], XL);
        }
        made?;
        let domain = xs::domain(&name)?.with_context(|| format!("{name} is not there"))?;
        let console = open_console(domain)?;
        Ok(Self { name, domain, console, number: HELLO, ended: false })
    }

    /// Sends a request to the guest's agent and waits for the reply.
    ///
    /// # Errors
    /// The agent reports an error, does not reply in time, or the guest is gone.
    pub fn ask(&mut self, verb: &str, arguments: Value, patience: Duration) -> Result<Value> {
        self.number += 1;
        let request = Request { number: self.number, verb: verb.to_owned(), arguments };
        self.console.send(&request)?;
        let start = Instant::now();
        let answer = self.console.answer(self.number, patience);
        took::since(start, format!("{} {verb}", self.name));
        let answer = answer.with_context(|| format!("while {} was to {verb}", self.name))?;
        match answer.map(|answer| answer.outcome) {
            Some(Ok(value)) => Ok(value),
            Some(Err(text)) if text.starts_with("emulation flake") => Err(Flake(text).into()),
            Some(Err(text)) => Err(anyhow!("{} {verb}: {text}", self.name)),
            None => {
                bail!("{} did not finish {verb} in {} s", self.name, patience.as_secs())
            }
        }
    }

    /// Runs a program of its image, which must succeed; returns the output.
    ///
    /// # Errors
    /// The program fails.
    pub fn program(&mut self, line: &str) -> Result<String> {
        let words: Vec<_> = line.split_whitespace().collect();
        let order = json!({ "words": words, "seconds": LONG.as_secs() });
        let said = self.ask("run", order, LONG + Duration::from_secs(10))?;
        Ok(said.as_str().unwrap_or_default().to_owned())
    }

    /// Sends a request that has no reply.
    ///
    /// # Errors
    /// The guest is gone.
    pub fn tell(&mut self, verb: &str) -> Result<()> {
        self.number += 1;
        let (number, verb) = (self.number, verb.to_owned());
        self.console.send(&Request { number, verb, arguments: Value::Null })
    }

    /// Waits until the domain does not exist any more.
    ///
    /// # Errors
    /// It still exists.
    pub fn wait_gone(&mut self, patience: Duration) -> Result<()> {
        let path = format!("/local/domain/{}", self.domain);
        if !wait_until(patience, || Ok(xs::read(&path)?.is_none()))? {
            bail!("{} is still there after {} s", self.name, patience.as_secs());
        }
        self.ended = true;
        Ok(())
    }

    /// Has the guest power itself off, and waits.
    ///
    /// # Errors
    /// The domain still exists.
    pub fn power_off(&mut self) -> Result<()> {
        self.tell("poweroff")?;
        self.wait_gone(Duration::from_secs(40))
    }

    /// Destroys the guest.
    ///
    /// # Errors
    /// `xl` fails.
    pub fn destroy(&mut self) -> Result<()> {
        self.ended = true;
        // The guest may already be gone. `xl` itself may crash, which has happened under emulation.
        let gone = wait_until(XL, || {
            let ran = sys::run(&["xl", "destroy", &self.name], XL)?;
            Ok(ran.status.success() || xs::domain(&self.name)?.is_none())
        })?;
        ensure!(gone, "xl does not destroy {}", self.name);
        Ok(())
    }

    /// Restores a saved guest as another domain of the same VM, while this one still exists.
    ///
    /// # Errors
    /// `xl` fails.
    pub fn restore_beside(&self, saved: &str) -> Result<Self> {
        let name = format!("{}--incoming", self.name);
        let config = fs::read_to_string(format!("/run/{}.cfg", self.name))?;
        let vm = xs::must_read(&format!("/local/domain/{}/vm", self.domain))?;
        let uuid = vm.trim_start_matches("/vm/");
        let config = config.replace(&format!("\"{}\"", self.name), &format!("\"{name}\""));
        let file = format!("/run/{name}.cfg");
        fs::write(&file, format!("{config}uuid=\"{uuid}\"\n"))?;
        sys::succeed(&["xl", "restore", &file, saved], XL)?;
        let domain = xs::domain(&name)?.with_context(|| format!("{name} is not there"))?;
        let console = open_console(domain)?;
        Ok(Self { name, domain, console, number: self.number, ended: false })
    }

    /// Opens the new domain and console of a guest that has rebooted.
    ///
    /// # Errors
    /// The guest does not boot again.
    pub fn reopen(&mut self) -> Result<()> {
        let (old, name) = (self.domain, self.name.clone());
        let mut new = None;
        wait_until(BOOT, || {
            new = xs::domain(&name)?.filter(|domain| *domain != old);
            Ok(new.is_some())
        })?;
        self.domain = new.with_context(|| format!("{name} did not come back"))?;
        self.console = open_console(self.domain)?;
        self.number = HELLO;
        self.hello()
    }

    /// Opens the domain and console of a guest that was restored, possibly under another number.
    /// The guest continues where it was saved.
    ///
    /// # Errors
    /// The guest does not exist or does not reply.
    pub fn reattach(&mut self) -> Result<()> {
        let domain = xs::domain(&self.name)?;
        self.domain = domain.with_context(|| format!("{} is not there", self.name))?;
        self.ended = false;
        self.console = open_console(self.domain)?;
        self.ask("hello", Value::Null, BOOT).map(drop)
    }

    /// Returns whether its agent replies.
    pub fn lives(&mut self) -> bool {
        !self.ended && self.ask("hello", Value::Null, Duration::from_secs(20)).is_ok()
    }

    /// Returns the last lines of its console.
    pub fn log(&self) -> Vec<String> {
        self.console.tail(30)
    }

    fn hello(&mut self) -> Result<()> {
        let start = Instant::now();
        let hello = self.console.answer(HELLO, BOOT);
        took::since(start, format!("{} boots", self.name));
        let missing = || Flake(format!("{} did not boot: {}", self.name, self.log().join("\n")));
        match hello {
            Ok(Some(_)) => Ok(()),
            Ok(None) | Err(_) => Err(missing().into()),
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        // A guest that is still running here means that its scenario failed.
        if let Ok(Value::Object(logs)) = self.ask("logs", Value::Null, Duration::from_secs(10)) {
            for (log, lines) in logs {
                let lines: Vec<String> = serde_json::from_value(lines).unwrap_or_default();
                words::keep(&format!("{} {log}", self.name), &lines);
            }
        }
        words::keep(&self.name, &self.log());
        let _ = self.destroy();
    }
}

impl Spec {
    /// Returns a configuration without devices.
    pub fn new(kind: Kind, backend: Backend) -> Self {
        let (disks, nics, lines) = (Vec::new(), Vec::new(), Vec::new());
        let device_model = (backend == Backend::PvioDm).then_some(DEVICE_MODEL);
        let (loader, kernel, extra, processors, memory) = (None, None, None, 1, None);
        let (programs, words) = (Programs::Few, String::new());
        Self {
            kind,
            disks,
            nics,
            device_model,
            loader,
            kernel,
            extra,
            processors,
            memory,
            programs,
            lines,
            words,
        }
    }

    fn config(&self, name: &str) -> Result<String> {
        let quoted = |lines: &[String]| {
            lines.iter().map(|line| format!("'{line}'")).collect::<Vec<_>>().join(",")
        };
        let kind = match self.kind {
            Kind::Pv => "type=\"pv\"",
            // QEMU 7.2 cannot scale the time stamp counter in nested virtualisation.
            Kind::Pvh => "type=\"pvh\"\ntsc_mode=\"native\"",
            Kind::Hvm => "type=\"hvm\"\ntsc_mode=\"native\"\nvga=\"none\"\nvnc=0\nusb=0",
        };
        // blkfront allocates pages for every request of every queue.
        let memory = if self.processors > 1 { 1024 } else { self.programs.memory() };
        let memory = self.memory.unwrap_or(memory);
        let kernel = match self.loader {
            Some(loader) => format!("kernel=\"/lab/{loader}\""),
            // Its firmware reads the image byte by byte.
            None if self.kind == Kind::Hvm => {
                ensure!(self.programs == Programs::Few, "an HVM guest has few programs");
                "kernel=\"/lab/vmlinuz\"\nramdisk=\"/lab/guest.cpio.gz\"".to_owned()
            }
            None => {
                let ramdisk = self.programs.ramdisk(self.kernel)?;
                let kernel = match self.kernel {
                    Some(name) => format!("{KERNELS}/vmlinux-{name}"),
                    None => "/lab/vmlinux".to_owned(),
                };
                format!("kernel=\"{kernel}\"\nramdisk=\"{}\"", ramdisk.display())
            }
        };
        // Without rodata=off, the kernel checks all its page tables for half a second.
        let extra = self.extra.clone().unwrap_or_else(|| {
            format!("console=hvc0 panic=-1 loglevel=5 rodata=off {}", self.words)
        });
        let mut text = format!(
            "name=\"{name}\"\n{kind}\n{kernel}\n\
             extra=\"{extra}\"\nmemory={memory}\nvcpus={}\n\
             disk=[{}]\nvif=[{}]\n\
             on_poweroff=\"destroy\"\non_crash=\"destroy\"\non_reboot=\"restart\"\n",
            self.processors,
            quoted(&self.disks),
            quoted(&self.nics),
        );
        if let Some(program) = self.device_model {
            text += &format!("device_model_override=\"{program}\"\n");
        }
        for line in &self.lines {
            text += &format!("{line}\n");
        }
        Ok(text)
    }
}

/// Opens a domain's console. Must be called once per domain: with two readers, each would get some
/// of the replies.
fn open_console(domain: u32) -> Result<Console> {
    let path = format!("/local/domain/{domain}/console/tty");
    let mut terminal = None;
    wait_until(Duration::from_secs(20), || {
        terminal = xs::read(&path)?.filter(|value| !value.is_empty());
        Ok(terminal.is_some())
    })?;
    Console::open(&terminal.with_context(|| format!("no {path}"))?)
}

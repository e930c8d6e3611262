//! A hosted machine whose driver domain is a process of the `pvio` command.

use crate::pin::pin;
use anyhow::{Context, Result, bail, ensure};
use pvio_blkfront::Shape;
use pvio_blkfront::blocking::BlockingDisk;
use pvio_grant_table::DomId;
use pvio_hosted::{Domain, DomainConfig, Hypervisor};
use pvio_xenbus::client::Client;
use pvio_xenbus::handshake::common::{BackendKind, DeviceAddr};
use pvio_xenbus::handshake::vbd::{Mode, ToolstackBack, create_device};
use rustix::process::{Pid, Signal, kill_process};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// How long a device may take to connect.
const PATIENCE: Duration = Duration::from_secs(20);

/// The machine.
pub struct Machine {
    hypervisor: Hypervisor,
    driver: DomId,
    child: Child,
}

/// A guest with one disk, which is not attached.
pub struct Guest {
    pub domain: Domain,
    pub addr: DeviceAddr,
}

impl Machine {
    /// Starts the machine, with its driver domain on the second core.
    pub fn start(dir: &Path) -> Result<Self> {
        let hypervisor = Hypervisor::start(dir.join("machine"))?;
        let driver = hypervisor.create_domain(DomainConfig::new("driver").rejoinable(true))?;
        let mut command = Command::new(pvio()?);
        command.args(["domain", "driver", "--domid", &driver.0.to_string()]);
        command.arg("--state-dir").arg(hypervisor.state_dir());
        command.arg("--parent").arg(std::process::id().to_string());
        pin(1);
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
        pin(0);
        let mut machine = Self { hypervisor, driver, child: child.context("pvio")? };
        let stdout = machine.child.stdout.take().context("its output")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        ensure!(line.trim_end() == "ready", "the driver domain does not start: {line:?}");
        Ok(machine)
    }

    /// Creates a guest with a disk.
    pub fn guest(&self, name: &str, image: &Path) -> Result<Guest> {
        let config = DomainConfig::new(name).memory_pages(16_384).grant_frames(64);
        let id = self.hypervisor.create_domain(config)?;
        let addr = DeviceAddr::new(BackendKind::Vbd, self.driver, id, 51712);
        let mut back = ToolstackBack::new(addr, image.to_str().context("the image's path")?);
        back.mode = Mode::ReadOnly;
        create_device(&mut self.hypervisor.xenstore()?, addr, &back)?;
        Ok(Guest { domain: Domain::join(self.hypervisor.state_dir(), id)?, addr })
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It stops the processes of the disks.
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        let _ = self.child.wait();
    }
}

impl Guest {
    /// Attaches the disk with a queue of this size.
    pub fn attach(&self, shape: Shape) -> Result<BlockingDisk<Domain, Client>> {
        let xs = self.domain.xenstore()?;
        Ok(BlockingDisk::attach_with(self.domain.clone(), xs, self.addr, shape, PATIENCE)?)
    }
}

/// Returns the path of the command, which is built into the same directory as this program.
fn pvio() -> Result<PathBuf> {
    let path = std::env::current_exe()?.with_file_name("pvio");
    if !path.exists() {
        bail!(
            "{} does not exist: run `cargo xtask bench neighbours`, which builds it",
            path.display()
        );
    }
    Ok(path)
}

//! The driver domain: serves every device the toolstack makes for it, until it is told to end.

use super::stop::{Bell, Stop, sleep};
use super::{JoinArgs, Said};
use crate::cli::Cidr;
use crate::failure::Failure;
use clap::Args;
use pvio_blkback::Vbd;
use pvio_blkback::host::ImageServer;
use pvio_grant_table::DomId;
use pvio_hosted::Domain;
use pvio_xenbus::client::Client;
use pvio_xenbus::driver::{BackendDriver, Life};
use pvio_xenbus::handshake::common::{DeviceAddr, DeviceClass, backend_root, list_backends};
use pvio_xenbus::{XenbusState, Xenstore, XsError};
use std::os::fd::AsFd;
use std::sync::Arc;

/// `pvio domain driver`.
#[derive(Debug, Args)]
pub struct DriverArgs {
    #[command(flatten)]
    /// What every child is told.
    pub join: JoinArgs,
    /// An earlier one died: frontends that are connected still have to start over
    #[arg(long)]
    pub restarted: bool,
    /// An address of the host on each NIC's tap
    #[arg(long, value_name = "CIDR")]
    pub host_ip: Option<Cidr>,
}

/// The token of the watches for new devices.
const NEW: &str = "pvio-new-devices";

/// Runs it.
///
/// # Errors
/// When the hypervisor is gone, or was never there.
pub fn run(args: &DriverArgs) -> Result<(), Failure> {
    let bell = Bell::new()?;
    let stop = Stop::on_signal(bell.clone())?;
    let domain = super::join(&args.join)?;
    let xs = domain.xenstore().map_err(Failure::of)?;
    let mut driver = Driver { domain, xs, bell, restarted: args.restarted, devices: Vec::new() };
    let served = driver.serve(&stop).map_err(|e| lost(&e));
    for device in &mut driver.devices {
        device.shut_down(&mut driver.xs);
    }
    served
}

fn lost(e: &XsError) -> Failure {
    Failure::new(format!("the hypervisor is gone: {e}"), "")
}

struct Driver {
    domain: Domain,
    xs: Client,
    bell: Bell,
    restarted: bool,
    devices: Vec<Backend>,
}

/// A backend of either kind.
enum Backend {
    Disk(BackendDriver<Vbd<Domain, ImageServer>>),
}

impl Driver {
    fn serve(&mut self, stop: &Stop) -> Result<(), XsError> {
        let own: DomId = self.domain.id();
        for class in DeviceClass::ALL {
            self.xs.watch(&backend_root(class, own), NEW)?;
        }
        self.look_for_devices()?;
        Said::Ready.say();
        while !stop.is_told() {
            let mut news = false;
            while let Some(event) = self.xs.poll_event()? {
                news |= event.token == NEW;
                self.step(Some(&event.token))?;
            }
            if news {
                self.look_for_devices()?;
            }
            let fds = [self.xs.as_fd(), self.bell.as_fd()];
            // A failure to sleep would be a spin; there is no reason for it but memory.
            if sleep(&fds, None).is_err() {
                return Err(XsError::Closed);
            }
            self.bell.take();
            // Rung by a worker that ended by itself: any of them.
            self.step(None)?;
        }
        Ok(())
    }

    fn look_for_devices(&mut self) -> Result<(), XsError> {
        for class in DeviceClass::ALL {
            for addr in list_backends(&mut self.xs, class, self.domain.id())? {
                if self.devices.iter().all(|d| d.addr() != addr)
                    && let Some(mut device) = self.backend(addr)
                {
                    tracing::info!(device = %addr.backend_path(), "serving");
                    device.step(&mut self.xs)?;
                    self.devices.push(device);
                }
            }
        }
        Ok(())
    }

    fn backend(&self, addr: DeviceAddr) -> Option<Backend> {
        let bell = self.bell.clone();
        match addr.class {
            DeviceClass::Vbd => {
                let server = ImageServer::new(Arc::new(move || bell.ring()));
                let class = Vbd::new(self.domain.clone(), server);
                Some(Backend::Disk(if self.restarted {
                    BackendDriver::restarted(addr, class)
                } else {
                    BackendDriver::new(addr, class)
                }))
            }
            DeviceClass::Vif => None,
        }
    }

    /// Steps the device of that token, or all; forgets those that are gone.
    fn step(&mut self, token: Option<&str>) -> Result<(), XsError> {
        let mut failed = None;
        let xs = &mut self.xs;
        self.devices.retain_mut(|device| {
            if failed.is_some() || token.is_some_and(|t| t != device.token()) {
                return true;
            }
            let before = device.state();
            let life = device.step(xs);
            if device.state() != before {
                tracing::info!(device = device.token(), state = ?device.state(), "changed");
            }
            match life {
                Ok(life) => life == Life::Alive,
                Err(e) => {
                    failed = Some(e);
                    true
                }
            }
        });
        failed.map_or(Ok(()), Err)
    }
}

impl Backend {
    fn addr(&self) -> DeviceAddr {
        match self {
            Self::Disk(driver) => driver.addr(),
        }
    }

    fn token(&self) -> &str {
        match self {
            Self::Disk(driver) => driver.token(),
        }
    }

    fn state(&self) -> XenbusState {
        match self {
            Self::Disk(driver) => driver.state(),
        }
    }

    fn step(&mut self, xs: &mut Client) -> Result<Life, XsError> {
        match self {
            Self::Disk(driver) => driver.step(xs),
        }
    }

    fn shut_down(&mut self, xs: &mut Client) {
        let done = match self {
            Self::Disk(driver) => driver.shut_down(xs),
        };
        if let Err(e) = done {
            tracing::warn!(device = self.token(), "not closed in good order: {e}");
        }
    }
}
